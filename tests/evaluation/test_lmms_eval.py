"""lmms-eval itself asks patched models, by its command line and a task of two questions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from spatiotoken import last_report, load_video, patch_model
from spatiotoken.answer import Answer, answer_video, load_model
from spatiotoken.config import load_config
from spatiotoken.evaluation.clips import spread_over
from spatiotoken.evaluation.lmms_models import MODELS, manifests
from spatiotoken.report import ForwardReport
from spatiotoken.video import Video, probe_video
from tests.conftest import DATA, Family

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: `make test-lmms` installs it and runs these tests")

from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from lmms_eval.protocol import ChatVideoContent
from PIL import Image

from spatiotoken.evaluation.lmms_models import model as models

FRAMES, NEW_TOKENS = 8, 6
VIDEOS = ("flipping_a_pancake.mkv", "nasa_13013_rotated.mp4")
QUESTIONS = ("What is happening?", "How many people are there?")
CONFIGS = ("dense", "divprune-25")
FAMILIES = ("qwen3_vl", "llava_onevision")
OWN_PROMPT = "qwen3_vl"

TASK_CODE = """
def videos(doc):
    return [doc["video"]]

def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"] + lmms_eval_specific_kwargs["post_prompt"]

def score(doc, results):
    return {"length": len(results[0])}
"""
TASK = """
task: two_questions
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: generate_until
doc_to_visual: !function asking.videos
doc_to_text: !function asking.question
doc_to_target: question
process_results: !function asking.score
generation_kwargs: {max_new_tokens: 6, temperature: 0, do_sample: false}
metric_list:
  - {metric: length, aggregation: mean, higher_is_better: true}
lmms_eval_specific_kwargs:
  default: {post_prompt: " Answer with one word."}
  spatiotoken_qwen3_vl: {post_prompt: " Describe it in detail."}
"""


@dataclass
class Run:
    """What lmms-eval wrote of one run: its table, and its samples in the order of the questions."""

    results: dict[str, Any]
    samples: list[dict[str, Any]]

    @property
    def input_tokens(self) -> list[int]:
        return [sample["token_counts"][0]["input_tokens"] for sample in self.samples]


def prompt(family: str, question: str) -> str:
    return question + (" Describe it in detail." if family == OWN_PROMPT else " Answer with one word.")


def lmms_eval(folder: Path, runs: dict[str, dict[str, Any]], *launcher: str) -> dict[str, Run]:
    """Runs of one process, each by its arguments."""
    task = folder / "task"
    task.mkdir()
    rows = [{"video": str(DATA / video), "question": text} for video, text in zip(VIDEOS, QUESTIONS, strict=True)]
    (task / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task / "asking.py").write_text(TASK_CODE)
    (task / "two_questions.yaml").write_text(TASK.replace("QUESTIONS", str(task / "questions.jsonl")))
    common = {"tasks": "two_questions", "include_path": str(task), "log_samples": True, "device": "cpu"}
    listed = [{**common, **arguments, "output_path": str(folder / name)} for name, arguments in runs.items()]
    (folder / "runs.yaml").write_text(yaml.safe_dump(listed))
    offline = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, *launcher, "-m", "lmms_eval", "--config", str(folder / "runs.yaml")]
    done = subprocess.run(
        command, env=os.environ | offline | {"OMP_NUM_THREADS": "1"}, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    read = {}
    for name in runs:
        # It reports errors and goes on.
        assert (folder / name).is_dir(), f"{name}: {done.stderr[-3000:]}"
        (table,) = (folder / name).glob("*/*_results.json")
        (samples,) = (folder / name).glob("*/*_samples_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        read[name] = Run(json.loads(table.read_text()), sorted(rows, key=lambda row: row["doc_id"]))
    return read


@pytest.fixture(scope="module")
def checkpoints(families: dict[str, Family]) -> dict[str, str]:
    return {name: family.model.config._name_or_path for name, family in families.items()}


@pytest.fixture(scope="module")
def runs(checkpoints: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """One family that is told times and one that is not, under every config."""
    asked = {}
    for family in FAMILIES:
        for config in CONFIGS:
            arguments = f"pretrained={checkpoints[family]},st_config={config},max_num_frames={FRAMES}"
            asked[f"{family}-{config}"] = {"model": f"spatiotoken_{family}", "model_args": arguments}
    return lmms_eval(tmp_path_factory.mktemp("lmms-eval"), asked)


def spread(name: str) -> Video:
    """The frames that are to be shown of a video."""
    return load_video(DATA / name, indices=spread_over(FRAMES, 0, probe_video(DATA / name).num_frames - 1))


def direct(checkpoint: str, config: Any, videos: list[Video], prompts: list[str]) -> list[Answer]:
    """Without lmms-eval: the model, its prompt, its answer."""
    model, processor = load_model(checkpoint)
    patch_model(model, config, processor=processor)
    pairs = zip(videos, prompts, strict=True)
    return [answer_video(model, processor, video, text, max_new_tokens=NEW_TOKENS) for video, text in pairs]


def entered(report: ForwardReport) -> int:
    return report.text_tokens + report.visual_kept


# -- by its command line --


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_model_itself(
    runs: dict[str, Run], checkpoints: dict[str, str], family: str, config: str
) -> None:
    prompts = [prompt(family, question) for question in QUESTIONS]
    run = runs[f"{family}-{config}"]
    answers = direct(checkpoints[family], config, [spread(name) for name in VIDEOS], prompts)
    assert [sample["filtered_resps"].strip() for sample in run.samples] == [answer.text for answer in answers]
    assert run.input_tokens == [entered(answer.report) for answer in answers]
    told = run.results["throughput"]
    assert told["avg_visual_tokens"] == sum(answer.report.visual_tokens for answer in answers) / 2
    assert told["avg_visual_kept"] == sum(answer.report.visual_kept for answer in answers) / 2
    assert [sample["input"] for sample in run.samples] == prompts
    lengths = [len(sample["filtered_resps"].strip()) for sample in run.samples]
    assert run.results["results"]["two_questions"]["length,none"] == sum(lengths) / len(lengths)
    assert run.results["n-samples"]["two_questions"]["effective"] == len(QUESTIONS)


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_tokens_enter_the_language_model(runs: dict[str, Run], family: str) -> None:
    dense, reduced = (runs[f"{family}-{config}"] for config in CONFIGS)
    assert all(kept < all_ for kept, all_ in zip(reduced.input_tokens, dense.input_tokens, strict=True))
    told, cut = dense.results["throughput"], reduced.results["throughput"]
    assert told["avg_visual_kept"] == told["avg_visual_kept_per_layer"] == told["avg_visual_tokens"]
    assert cut["avg_visual_tokens"] == told["avg_visual_tokens"]
    # The texts are the same, so that the rest of the difference is the pictures'.
    saved = sum(dense.input_tokens) - sum(reduced.input_tokens)
    assert saved == len(QUESTIONS) * (told["avg_visual_kept"] - cut["avg_visual_kept"])
    assert cut["avg_visual_kept"] < 0.3 * told["avg_visual_tokens"]


def test_processes_share_the_questions(runs: dict[str, Run], checkpoints: dict[str, str], tmp_path: Path) -> None:
    arguments = f"pretrained={checkpoints['llava_onevision']},st_config=divprune-25,max_num_frames={FRAMES}"
    asked = {"shared": {"model": "spatiotoken_llava_onevision", "model_args": arguments}}
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    shared, alone = lmms_eval(tmp_path, asked, *launcher)["shared"], runs["llava_onevision-divprune-25"]
    assert shared.results["results"] == alone.results["results"]
    for name in ("filtered_resps", "token_counts"):
        assert [sample[name] for sample in shared.samples] == [sample[name] for sample in alone.samples]
    # Costs are told of the first process, which had one of the two questions.
    assert shared.results["throughput"]["total_gen_tokens"] <= NEW_TOKENS


# -- the wrapper --


def ask(wrapper: Any, content: list[dict[str, Any]], **settings: Any) -> Any:
    """One question of a task that says itself what its messages are."""
    wrapper.task_dict = {"task": {"test": [{}]}}
    arguments = ("", lambda doc: [{"role": "user", "content": content}], settings, 0, "task", "test")
    metadata = {"task": "task", "doc_id": 0, "repeats": 1}
    (answer,) = wrapper.generate_until([Instance("generate_until", arguments, 0, metadata)])
    return answer


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def test_every_model_is_one_that_lmms_eval_can_get() -> None:
    for manifest in manifests():
        kind = get_model(manifest.model_id)
        assert issubclass(kind, models.VideoModel) and not kind.is_simple
        assert manifest.model_id == f"spatiotoken_{kind.model_type}"


@pytest.mark.parametrize("name", MODELS)
def test_every_family(checkpoints: dict[str, str], name: str) -> None:
    checkpoint = checkpoints[name.removeprefix("spatiotoken_")]
    wrapper = getattr(models, MODELS[name])(checkpoint, "divprune-25", max_num_frames=FRAMES, device="cpu")
    said = ask(wrapper, [{"type": "video", "url": str(DATA / VIDEOS[0])}, text("Why?")], max_new_tokens=NEW_TOKENS)
    (answer,) = direct(checkpoint, "divprune-25", [spread(VIDEOS[0])], ["Why?"])
    assert said.text.strip() == answer.text
    assert said.token_counts.input_tokens == entered(answer.report) < answer.report.prompt_tokens


@pytest.mark.parametrize("while_decoding", [False, True])
def test_frames_methods(checkpoints: dict[str, str], tmp_path: Path, while_decoding: bool) -> None:
    """They choose among the frames that were read, or, at a rate of candidates, while the file is decoded."""
    path = tmp_path / "few.yaml"
    path.write_text("frames: {method: uniform, num_frames: 4}\ntokens: {method: divprune, retention: 0.5}\n")
    config = load_config(path)
    rate = 2.0 if while_decoding else None
    checkpoint = checkpoints["llava_onevision"]
    wrapper = models.LlavaOneVision(checkpoint, str(path), FRAMES, candidate_fps=rate, device="cpu")
    said = ask(wrapper, [{"type": "video", "url": str(DATA / VIDEOS[0])}, text("Why?")], max_new_tokens=NEW_TOKENS)
    video = spread(VIDEOS[0])
    if while_decoding:
        video = load_video(DATA / VIDEOS[0], selector=config.frames, candidate_fps=2)
        config = config.model_copy(update={"frames": None})
    (answer,) = direct(checkpoint, config, [video], ["Why?"])
    assert len(video.indices) == (4 if while_decoding else FRAMES)
    assert len(answer.frame_indices) == 4
    assert said.text.strip() == answer.text
    assert said.token_counts.input_tokens == entered(answer.report)


def test_parts_come_in_their_order(checkpoints: dict[str, str]) -> None:
    """An image and half of a video, with words around them."""
    wrapper = models.Qwen2VL(checkpoints["qwen2_vl"], "divprune-25", max_num_frames=4, device="cpu")
    picture = Image.new("RGB", (80, 60), (200, 30, 30))
    path = DATA / VIDEOS[0]
    about = probe_video(path)
    # As tasks without messages of their own hand over a part of a video.
    part = {"type": "video", "path": str(path), "video_start": 0.0, "video_end": about.duration / 2}
    content = [text("First "), {"type": "image", "url": picture}, text(" then "), {"type": "video", "url": part}]
    answer = ask(wrapper, [*content, text(" What changed?")], max_new_tokens=NEW_TOKENS)

    model, processor = load_model(checkpoints["qwen2_vl"])
    patch_model(model, "divprune-25")
    shown = [text("First "), {"type": "image"}, text(" then "), {"type": "video"}, text(" What changed?")]
    frames = load_video(path, indices=spread_over(4, 0, round(about.duration / 2 * about.fps)))
    words = processor.apply_chat_template([{"role": "user", "content": shown}], add_generation_prompt=True)
    pictures = {"images": [picture], "videos": [frames.frames], "do_sample_frames": False}
    inputs = processor(text=[words], return_tensors="pt", **pictures)
    assert words.index("First") < words.index("image_pad") < words.index("then") < words.index("video_pad")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :].tolist()
    assert answer.text == processor.tokenizer.decode(new, skip_special_tokens=True)
    report = last_report(model)
    assert report.visual_kept < report.visual_tokens
    assert answer.token_counts.to_dict() == {
        "input_tokens": entered(report),
        "output_tokens": len(new),
    }


def test_words_alone(checkpoints: dict[str, str]) -> None:
    wrapper = models.LlavaOneVision(checkpoints["llava_onevision"], "divprune-25", device="cpu")
    counts = ask(wrapper, [text("Hello?")], max_new_tokens=2).token_counts
    prompts = wrapper._processor.apply_chat_template(
        [{"role": "user", "content": [text("Hello?")]}], add_generation_prompt=True
    )
    assert counts.input_tokens == len(wrapper._processor.tokenizer(prompts)["input_ids"])


def test_a_part_of_a_video() -> None:
    assert models.place(ChatVideoContent(url="a.mp4")) == (Path("a.mp4"), None)
    assert models.place(ChatVideoContent(url="a.mp4", start_time=1, end_time=2)) == (Path("a.mp4"), (1.0, 2.0))
    with pytest.raises(ValueError, match=r"a\.mp4: both ends of a part must be told, not 1.0 to None"):
        models.place(ChatVideoContent(url="a.mp4", start_time=1))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"max_new_tokens": 1024, "do_sample": False}),
        # lmms-eval's tasks give these together; it is the temperature that counts.
        (
            {"max_new_tokens": 16, "temperature": 0.0, "top_p": 1.0, "num_beams": 1, "do_sample": True},
            {"max_new_tokens": 16, "do_sample": False},
        ),
        ({"temperature": 0.7, "top_p": None}, {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.7}),
        ({"repetition_penalty": 1.2}, {"max_new_tokens": 1024, "do_sample": False, "repetition_penalty": 1.2}),
    ],
)
def test_generation_arguments(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    assert models.generation_arguments(settings) == expected


def test_beam_search_is_refused() -> None:
    with pytest.raises(ValueError, match="num_beams is 3, but must be 1"):
        models.generation_arguments({"num_beams": 3})


@pytest.mark.parametrize(
    ("until", "left"),
    [
        (None, "A. yes\n\nQ: B"),
        (["\n\n"], "A. yes\n\nQ: B"),
        ("Q:", "A. yes\n\n"),
        (["\n\n", "Q:", "yes", ""], "A. "),
    ],
)
def test_answers_end_where_the_task_says(until: Any, left: str) -> None:
    assert models.cut("A. yes\n\nQ: B", until) == left


def test_what_cannot_be_done_is_refused(checkpoints: dict[str, str]) -> None:
    tiny = checkpoints["qwen2_vl"]
    for arguments, message in (
        ({"pretrained": tiny, "st_config": "dense", "batch_size": 4}, "batch_size is 4, but must be 1"),
        ({"pretrained": tiny, "st_config": "dense", "batch_size": "auto"}, "batch_size is auto, but must be 1"),
        ({"pretrained": tiny, "st_config": "dense", "max_num_frames": 0}, "max_num_frames must be at least 1"),
        ({"pretrained": tiny, "st_config": "divprun"}, "did you mean 'divprune'"),
        ({"pretrained": tiny, "st_config": "dense", "dtype": "int8"}, "unknown dtype 'int8'"),
        ({"pretrained": tiny + "-", "st_config": "dense"}, "cannot load model"),
        (
            {"pretrained": checkpoints["qwen3_vl"], "st_config": "dense"},
            "is a qwen3_vl model, and --model says qwen2_vl",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            models.Qwen2VL(**arguments, device="cpu")
    wrapper = models.Qwen2VL(tiny, "dense", device="cpu")
    with pytest.raises(ValueError, match="audio is not supported; supported: text, image, video"):
        ask(wrapper, [{"type": "audio", "url": "a.wav"}, text("What?")])
    for method in (wrapper.loglikelihood, wrapper.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="supported: generate_until"):
            method([])
