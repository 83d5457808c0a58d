"""Training: what is learnt from is what will be asked, and an interrupted run goes on as if it had not been."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from spatiotoken.answer import prepare_inputs
from spatiotoken.probe import training
from spatiotoken.probe.dataset import clip_metadata
from spatiotoken.probe.evaluate import load_probe_model
from spatiotoken.probe.models import PROBE_MODEL_TYPES, build_untrained
from spatiotoken.probe.questions import all_questions, briefed_questions
from spatiotoken.probe.scenes import FAMILIES, sample_scenes
from spatiotoken.probe.training import COURSES, Course, Lesson, Packer, Pupil, cell_labels, glimpses

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_probe.py"


@pytest.mark.parametrize("model_type", PROBE_MODEL_TYPES)
@pytest.mark.parametrize("num_frames", [8, 16])
def test_packed_questions_are_learnt_as_they_are_asked(model_type: str, num_frames: int) -> None:
    """The loss of a batch is that of the model itself on what its processor makes of each question alone."""
    model, processor = build_untrained(model_type, 0)
    packer = Packer(processor, 0)
    samples = torch.arange(3)
    batch = packer.batch(samples, Lesson(1, 3, num_frames))
    asked = [
        packer._chosen(questions, sample)
        for sample, questions in enumerate(all_questions(sample_scenes(0, samples, num_frames=num_frames)))
    ]
    end = processor.tokenizer.eos_token
    losses = []
    with torch.no_grad():
        for frames, questions in zip(batch.frames, asked, strict=True):
            for question in questions:
                inputs = prepare_inputs(processor, frames, question.text, clip_metadata(num_frames))
                answer = torch.tensor([processor.tokenizer(question.answer + end)["input_ids"]])
                length = inputs["input_ids"].shape[1]
                for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
                    if name in inputs:
                        more = answer if name == "input_ids" else torch.full_like(answer, int(name == "attention_mask"))
                        inputs[name] = torch.cat([inputs[name], more], dim=1)
                logits = model(**inputs).logits[0, length - 1 : -1]
                losses.append(torch.nn.functional.cross_entropy(logits, answer[0], reduction="none"))
        for on_cpu in (False, True):
            answering = Pupil(model, processor, on_cpu)(batch)["answering"]
            torch.testing.assert_close(answering, torch.cat(losses).mean(), atol=1e-5, rtol=1e-5)


def test_families_take_turns() -> None:
    _, processor = build_untrained("qwen2_5_vl", 0)
    scenes = sample_scenes(0, torch.arange(70))
    for sample, questions in enumerate(all_questions(scenes)):
        chosen = Packer(processor, 0)._chosen(questions, sample)
        assert {question.family for question in chosen} == {question.family for question in questions}
        assert len(chosen) == min(8, len(questions))
        assert len(set(map(id, chosen))) == len(chosen)


def test_cell_labels() -> None:
    scenes = sample_scenes(0, torch.arange(14))
    labels = cell_labels(scenes)
    assert labels.shape == (14, 16, 4, 4, 6 + 6 + 36 + 8 + 6)
    needle = briefed_questions(scenes)[5]
    assert needle.family == "needle"
    letters = labels[5, :, :, :, 48:56]
    shown = letters.any(dim=-1).any(dim=-1).any(dim=-1).nonzero().flatten().tolist()
    assert shown == list(range(*needle.frames))
    assert letters.any(dim=0).any(dim=0).any(dim=0).nonzero().flatten().tolist() == [int(scenes.letter[5])]
    assert torch.equal(labels[..., 12:48].unflatten(-1, (6, 6)).any(dim=-1), labels[..., :6])


def test_glimpses_show_letters() -> None:
    scenes = sample_scenes(0, torch.arange(32), num_frames=8)
    seen = glimpses(0, torch.arange(32), Lesson(1, 32, 8))
    assert seen.frames.shape == (32, 2, 3, 64, 64)
    assert torch.equal(seen.labels[..., 48:56].flatten(1).any(dim=1), scenes.letter_frame >= 0)


def test_heads_are_pointed_at_what_is_asked_about() -> None:
    """Two things each, or one thing at its beginning and end; where answers begin is where their targets do."""
    _, processor = build_untrained("llava_onevision", 0)
    batch = Packer(processor, 0).batch(torch.arange(12), Lesson(1, 12, 8, places=4, pointing=1.0))
    families = batch.families.gather(1, batch.begins.clamp(min=0)).masked_fill(batch.begins < 0, -2)
    assert (batch.targets.gather(1, batch.begins.clamp(min=0))[batch.begins >= 0] >= 0).all()
    assert (families >= 0).sum() == (batch.families >= 0).sum()
    seen = batch.shown.flatten(3).any(dim=3)
    assert seen[(families != FAMILIES.index("counting")) & (families > -2)].all()
    assert not seen[(families == FAMILIES.index("counting")) | (families == -2)].any()
    start, end = batch.shown[families == FAMILIES.index("motion")].flatten(3).any(dim=3).unbind(dim=1)
    assert (start.int().argmax(dim=1) < end.int().argmax(dim=1)).all()
    first, second = batch.shown[families == FAMILIES.index("spatial")].unbind(dim=1)
    assert (first != second).flatten(1).any(dim=1).all()


def test_rates_rise_and_fall() -> None:
    for course in COURSES.values():
        first = course.warm_up.steps
        rates = [course.rates(step) for step in range(course.steps)]
        assert max(tower for tower, _ in rates[:first]) == pytest.approx(course.rate, rel=0.02)
        assert max(tower for tower, _ in rates[first:]) == pytest.approx(course.tower_rate, rel=0.02)
        assert max(rest for _, rest in rates[first:]) == pytest.approx(course.rate, rel=0.02)
        assert rates[-1][1] < 0.1 * course.rate and min(min(pair) for pair in rates) > 0  # a wave may be cut short
        with pytest.raises(IndexError):
            course.lesson(course.steps)
    with pytest.raises(ValueError, match="waves"):
        Course(Lesson(2, 2, 8), (Lesson(3, 2, 8),), waves=((2, 4),))
    cut = Course(Lesson(2, 2, 8), (Lesson(300, 2, 8),), waves=((100, 200), (200, 200)))
    assert cut.rates(101)[1] == pytest.approx(cut.rate / 2, rel=0.02)  # half down, and up again from the start
    assert cut.rates(102)[1] == pytest.approx(cut.rate / 100, rel=0.02)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    short = Course(Lesson(2, 2, 8), (Lesson(1, 2, 8, max_objects=2), Lesson(2, 2, 9)), rehearsed=2)
    monkeypatch.setattr(training, "COURSES", {kind: short for kind in PROBE_MODEL_TYPES})
    spec = importlib.util.spec_from_file_location("train_probe", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("model_type", PROBE_MODEL_TYPES)
def test_interrupted_training_goes_on(
    model_type: str, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if model_type == "qwen2_5_vl":  # whose temporal units are pairs of frames
        training.COURSES[model_type] = Course(Lesson(2, 2, 8), (Lesson(3, 2, 8),), rehearsed=2)

    def train(folder: str, *more: str) -> Path:
        arguments = ["--model-type", model_type, "--output", str(tmp_path / folder), "--cpu", "--questions", "14"]
        monkeypatch.setattr(sys, "argv", ["train_probe.py", *arguments, *more])
        script.main()
        return tmp_path / folder / "model"

    whole = train("whole")
    assert not train("parts", "--stop-at", "3").exists()
    parts = train("parts")
    weights, resumed = load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors")
    assert weights.keys() == resumed.keys() and all(torch.equal(weights[name], resumed[name]) for name in weights)
    model, _ = load_probe_model(whole)
    assert model.dtype == torch.float32 and model.config.spatiotoken_probe["steps"] == 5
    assert "| needle |" in (whole / "README.md").read_text()
    steps = [json.loads(line)["step"] for line in (parts / "curves.jsonl").read_text().splitlines()]
    assert steps == [3, 5]  # where it was interrupted, and at the end
    assert json.loads((tmp_path / "parts" / "state" / "progress.json").read_text())["step"] == 5
