"""Whole evaluations of the tiny model: what is asked, what is written, and that a broken run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spatiotoken import load_video, patched
from spatiotoken.answer import load_model, prepare_inputs
from spatiotoken.evaluation.asking import Asker
from spatiotoken.evaluation.base import DatasetError
from spatiotoken.evaluation.clips import read_clip
from spatiotoken.evaluation.journal import Answered
from spatiotoken.evaluation.plan import Plan, PlanError, Task, make_plan
from spatiotoken.evaluation.run import evaluate, local_engine
from spatiotoken.probe import build_tiny
from tests.evaluation import toy

CONFIGS = ("dense", "random", "evs", "visionzip")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("qwen2_5_vl", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(directory: Path) -> tuple[Any, Any]:
    return load_model(directory)


def planned(directory: Path, configs: Iterable[str] = CONFIGS, dataset: str = "toy", **settings: Any) -> Plan:
    options = {key: settings.pop(key) for key in ("count", "trouble") if key in settings}
    settings = {"num_frames": 4, "batch_size": 2, "dtype": "float32"} | settings
    return make_plan(str(directory), {dataset: options}, list(configs), **settings)


def run(plan: Plan, loaded: tuple[Any, Any], output: Path, share_tower: bool = True, **arguments: Any) -> Any:
    return evaluate(plan, output, local_engine(Asker(plan, *loaded, share_tower=share_tower)), **arguments)


def rows(output: Path) -> dict[tuple[str, str], Answered]:
    lines = [line for path in output.rglob("*.jsonl") for line in path.read_text().splitlines()]
    answers = [Answered(**json.loads(line)) for line in lines]
    assert len({row.key for row in answers}) == len(answers)
    return {(row.config, row.id): row for row in answers}


def test_answers_are_those_of_the_model(directory: Path, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    plan = planned(directory, batch_size=1)
    results = run(plan, loaded, tmp_path)
    found = rows(tmp_path)
    assert len(found) == 5 * len(CONFIGS) and results.asked == 20 and results.failed == 0
    model, processor = loaded
    for question in plan.questions["toy"]:
        clip = read_clip(question, 4)
        inputs = prepare_inputs(processor, clip.frames, question.prompt, clip.metadata())
        for name in CONFIGS:
            with patched(model, name), torch.inference_mode():
                output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
            said = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            row = found[name, question.id]
            assert row.prediction == said and row.frames == list(clip.indices)
            assert row.parsed == (said[:1].lower() or None)
            assert row.visual_tokens and row.ttft_ms and row.peak_memory_bytes
            assert (row.visual_kept == row.visual_tokens) == (name == "dense")
    figures = json.loads((tmp_path / "results.json").read_text())["datasets"]["toy"]
    assert figures["reference"] == "dense" and figures["groups"] == {"parity": ["even", "odd"]}
    for name, one in figures["configs"].items():
        own = [found[name, f"q{number}"].scores for number in range(5)]
        accuracy = sum(scores["accuracy"] for scores in own if scores) / 5
        assert one["metrics"]["accuracy"]["mean"] == one["headline"] == pytest.approx(accuracy)
        assert one["groups"]["parity"]["even"]["n"] == 3 and ("difference" in one) == (name != "dense")
    assert "| dense |" in (tmp_path / "results.md").read_text() == results.page()


def test_the_tower_is_shared_without_a_difference(directory: Path, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    plan = planned(directory)
    run(plan, loaded, tmp_path / "shared")
    run(plan, loaded, tmp_path / "each", share_tower=False)
    assert (tmp_path / "shared" / "results.json").read_bytes() == (tmp_path / "each" / "results.json").read_bytes()


def test_videos_that_cannot_be_read(directory: Path, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """They are counted, and neither stop the run nor spoil the others of their batch."""
    plan = planned(directory, ("dense", "random"), trouble=("corrupted.mp4", "missing"), count=10)
    results = run(plan, loaded, tmp_path)
    assert (results.asked, results.failed) == (20, 8)
    found = rows(tmp_path)
    bad = {key for key, row in found.items() if row.error is not None}
    assert bad == {(name, f"q{number}") for name in ("dense", "random") for number in (3, 4, 8, 9)}
    assert "corrupted.mp4" in str(found["dense", "q3"].error) and "video.mp4" in str(found["dense", "q4"].error)
    figures = results.results["datasets"]["toy"]["configs"]["random"]
    assert (figures["answered"], figures["failed"], figures["difference"]["n"]) == (6, 4, 6)
    assert "4 could not be asked" in results.page()
    # Whatever else is in the batch: questions 0, 1 and 2 alone.
    alone = run(planned(directory, ("dense", "random"), count=3), loaded, tmp_path / "alone")
    assert alone.failed == 0
    for key, row in rows(tmp_path / "alone").items():
        assert row.prediction == found[key].prediction


def test_what_was_asked_when_something_broke(
    directory: Path, loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is no fault of a video stops the run, with all answers before it on disk."""
    plan = planned(directory, ("dense", "evs"), batch_size=1)
    monkeypatch.setattr(toy.Toy, "parse", lambda self, text, question: 1 / 0 if question.id == "q2" else "a")
    with pytest.raises(RuntimeError, match="toy q2 under dense: "):
        run(plan, loaded, tmp_path)
    assert set(rows(tmp_path)) == {(config, name) for config in ("dense", "evs") for name in ("q0", "q1")}


class Killed(Exception):
    pass


def test_a_broken_run_goes_on(directory: Path, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    plan = planned(directory, count=9, trouble=("corrupted.mp4",))
    run(plan, loaded, tmp_path / "whole")
    expected = (tmp_path / "whole" / "results.json").read_bytes()
    broken = tmp_path / "broken"
    asked: list[Task] = []

    def dying(after: int) -> Any:
        def ask(plan: Plan, tasks: list[Task]) -> Iterator[list[Answered]]:
            for at, answers in enumerate(local_engine(Asker(plan, *loaded))(plan, tasks)):
                if at == after:
                    raise Killed
                asked.append(tasks[at])
                yield answers

        return ask

    for after in (2, 0, 1):
        with pytest.raises(Killed):
            evaluate(plan, broken, dying(after))
        assert not (broken / "results.json").exists()
    # What a kill leaves of a line, and of a batch: the first config of the fourth task was written, the others not.
    part = broken / "rows" / "toy" / "random" / "0-of-1.jsonl"
    part.write_bytes(part.read_bytes()[:-30])
    seen: list[tuple[int, int]] = []
    run(plan, loaded, broken, progress=lambda done, of: seen.append((done, of)))
    assert (broken / "results.json").read_bytes() == expected
    assert [task.start for task in asked] == [0, 2, 4], "nothing is asked twice"
    assert seen[0] == (3 * 8 - 2, 36) and seen[-1] == (36, 36)
    assert len({row.key for row in rows_with_repeats(broken)}) == 36


def rows_with_repeats(output: Path) -> list[Answered]:
    return [Answered(**json.loads(line)) for path in output.rglob("*.jsonl") for line in path.open()]


def test_shards(directory: Path, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    plan = planned(directory, ("dense", "evs"), count=7)
    run(plan, loaded, tmp_path / "whole")
    for part in (2, 0):
        assert run(plan, loaded, tmp_path / "parts", shard=(part, 3)) is None
    assert len(rows(tmp_path / "parts")) == 2 * (7 - 2), "the second task of four is the missing shard's"
    told: list[tuple[int, int]] = []
    run(plan, loaded, tmp_path / "parts", progress=lambda done, of: told.append((done, of)))
    assert told == [(10, 14), (14, 14)]
    assert (tmp_path / "parts" / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()
    with pytest.raises(PlanError, match="shard 3 of 3"):
        run(plan, loaded, tmp_path / "parts", shard=(3, 3))


def test_videos_may_be_mended(
    directory: Path, loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(directory, ("dense",), trouble=("missing",), count=4)
    # By another process than the one that asks again, whose file comes first.
    assert run(plan, loaded, tmp_path, shard=(0, 2)) is None and run(plan, loaded, tmp_path, shard=(1, 2)) is None
    assert run(plan, loaded, tmp_path).failed == 1
    monkeypatch.setattr(toy, "CLIPS", (*toy.CLIPS, toy.CLIPS[0]))
    mended = planned(directory, ("dense",), trouble=("missing",), count=4)
    assert run(mended, loaded, tmp_path).failed == 1, "not asked again by itself"
    assert run(mended, loaded, tmp_path, retry_failed=True).failed == 0
    assert run(mended, loaded, tmp_path).failed == 0, "what was answered counts, not what failed before"


def test_a_run_may_grow_but_not_change(directory: Path, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    run(planned(directory, ("dense",), limit=3), loaded, tmp_path)
    more = run(planned(directory, ("dense", "random")), loaded, tmp_path)
    assert more.asked == 10 and more.failed == 0
    for change, message in (
        ({"num_frames": 5}, r"settings num_frames = 4, not 5"),
        ({"batch_size": 1}, "batch_size"),
        ({"dtype": "bfloat16"}, 'dtype = "float32", not "bfloat16"'),
        ({"candidate_fps": 1.0}, "candidate_fps"),
        ({"overrides": {"tokens.retention": 0.5}}, "configs random"),
        ({"count": 4}, "datasets toy"),
    ):
        with pytest.raises(PlanError, match=message):
            run(planned(directory, ("random",), **change), loaded, tmp_path)  # type: ignore[arg-type]


def test_other_annotations_are_another_run(
    directory: Path, loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(planned(directory, ("dense",)), loaded, tmp_path)
    original = toy.Toy.questions
    monkeypatch.setattr(toy.Toy, "questions", lambda self: list(original(self))[::-1])
    with pytest.raises(PlanError, match="questions toy"):
        run(planned(directory, ("dense",)), loaded, tmp_path)


def test_frames_chosen_in_the_file(directory: Path, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """By the configs that choose frames; the others see frames at equal distances, as ever."""
    plan = planned(
        directory, ("dense", "kmeans"), count=2, candidate_fps=2.0, overrides={"frames.num_frames": 2}, batch_size=2
    )
    run(plan, loaded, tmp_path)
    found = rows(tmp_path)
    selector = plan.built_configs["kmeans"].frames
    for question in plan.questions["toy"]:
        chosen = load_video(question.video, selector=selector, question=question.prompt, candidate_fps=2.0)
        assert found["kmeans", question.id].frames == list(chosen.indices)
        assert found["dense", question.id].frames == list(read_clip(question, 4).indices)
    without = planned(directory, ("kmeans",), count=2, overrides={"frames.num_frames": 2})
    run(without, loaded, tmp_path / "inside")
    for question in without.questions["toy"]:
        seen = rows(tmp_path / "inside")["kmeans", question.id].frames
        assert seen is not None and set(seen) <= set(read_clip(question, 4).indices)


def test_what_a_dataset_may_do(directory: Path, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    results = run(planned(directory, ("dense", "evs"), "toy_constrained"), loaded, tmp_path / "constrained")
    assert {row.prediction for row in rows(tmp_path / "constrained").values()} != {""}
    assert len({row.prediction for row in rows(tmp_path / "constrained").values()}) == 1
    assert results.results["datasets"]["toy_constrained"]["configs"]["evs"]["difference"]["mean"] == 0

    results = run(planned(directory, ("dense", "evs"), "toy_without_answers"), loaded, tmp_path / "none")
    figures = results.results["datasets"]["toy_without_answers"]["configs"]["evs"]
    assert figures["headline"] is None and figures["metrics"] == {} and "difference" not in figures
    assert "| evs |  |" in results.page()
    with pytest.raises(DatasetError, match="5 questions with the id of another"):
        _ = planned(directory, ("dense",), "toy_twice").questions


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "tyo"}, r"unknown dataset 'tyo' \(did you mean 'toy'\?\)"),
        ({"configs": ("dens",)}, "did you mean 'dense'"),
        ({"configs": ("dense", "dense")}, "two configs are called 'dense'"),
        ({"configs": ()}, "there must be a dataset and a config"),
        ({"num_frames": 0}, "num_frames"),
        ({"overrides": {"layers.layer": 2}}, "none of the configs has what is to be set: layers.layer"),
        ({"count": "many"}, "dataset 'toy': count"),
    ],
)
def test_plans_that_make_no_sense(directory: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(directory, **settings)


def test_configs_that_do_not_fit_are_refused_before_anything_is_asked(directory: Path, loaded: tuple[Any, Any]) -> None:
    plan = planned(directory, ("dense", "fastv"), overrides={"layers.layer": 40})
    with pytest.raises(ValueError, match="config 'fastv'"):
        Asker(plan, *loaded).check()


def test_a_limit_is_spread_over_categories_that_count_alike() -> None:
    """MVBench's first 200 questions are all of one task."""
    assert toy.ByParity.macro == "parity"
    plan = planned(Path("model"), ("dense",), "toy_by_parity", count=9, limit=4)
    assert [question.id for question in plan.questions["toy_by_parity"]] == ["q0", "q1", "q6", "q7"]
    everything = planned(Path("model"), ("dense",), "toy_by_parity", count=9)
    assert len(everything.questions["toy_by_parity"]) == 9
    plain = planned(Path("model"), ("dense",), count=9, limit=4)
    assert [question.id for question in plain.questions["toy"]] == ["q0", "q1", "q2", "q3"]
