"""The command line: what it prints where, and how it refuses bad input."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner, Result

import spatiotoken
from spatiotoken import answer as answer_module
from spatiotoken import available, load_config, load_video, patched
from spatiotoken.answer import answer_video, load_model, resolve_device, resolve_dtype
from spatiotoken.cli import app
from spatiotoken.config import config_schema
from spatiotoken.probe import build_tiny, evaluate
from spatiotoken.probe.dataset import examples
from spatiotoken.video import load_thumbnails, select_frames

DATA = Path(__file__).parent / "data"
PANCAKE = str(DATA / "flipping_a_pancake.mkv")
SHORT = str(DATA / "video_90.mov")  # 3 frames
RUN_KEYS = {
    "answer",
    "config",
    "model_type",
    "tokens",
    "stages",
    "prefill_ms",
    "decode_ms",
    "peak_memory_bytes",
    "frames",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("qwen2_5_vl", tmp_path_factory.mktemp("model"))


def invoke(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def run_json(*args: str) -> dict[str, Any]:
    result = invoke("run", "--question", "What?", "--json", "--max-new-tokens", "3", *args)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def assert_refused(result: Result, *culprits: str) -> None:
    assert result.exit_code == 2, (result.stderr, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("spatiotoken: error: ")
    assert result.stderr.count("\n") == 1 and result.stderr.endswith("\n")
    for culprit in culprits:
        assert culprit in result.stderr


# ------------------------------------------------------------------------------------------------ list, show, schema


def test_list() -> None:
    assert json.loads(invoke("list", "--json").stdout) == available()
    table = invoke("list").stdout
    for name in ("divprune", "retention=0.25", "2503.02175", "balanced", "qwen3_vl", "sliding_vertical"):
        assert name in table


def test_show() -> None:
    expected = load_config("balanced", **{"tokens.retention": 0.1, "layers": None}).to_dict()
    args = ("show", "balanced", "--set", "tokens.retention=0.1", "--set", "layers=null")
    assert yaml.safe_load(invoke(*args).stdout) == expected
    assert json.loads(invoke(*args, "--json").stdout) == expected


def test_run_says_how_much_attention_was_computed(model: Path) -> None:
    settings = ("window=16", "columns=4", "sink=2", "block=4")
    args = [part for setting in settings for part in ("--set", f"attention.{setting}")]
    common = ("--model", str(model), "--video", PANCAKE, "--question", "Why?", "--config", "sliding_vertical")
    assert re.search(r"attention pairs\s+computed:\s+\d+%\s+\(gather\)", invoke("run", *common, *args).stdout)
    assert re.search(r"attention pairs\s+computed:\s+100%\s+\(dense\)", invoke("run", *common).stdout)


def test_show_says_between_which_layers(model: Path, tmp_path: Path) -> None:
    shown = json.loads(invoke("show", "fastv", "--model", str(model), "--json").stdout)
    assert shown["resolved"] == {"model": "qwen2_5_vl", "decoder_layers": 4, "layers": [1]}
    assert yaml.safe_load(invoke("show", "divprune", "--model", str(model)).stdout)["resolved"]["layers"] == []
    deep = invoke("show", "fastv", "--set", "layers.layer=7", "--model", str(model))
    assert deep.exit_code == 2 and "7 is layer 7, but the model has only 4" in deep.stderr
    gone = invoke("show", "fastv", "--model", str(tmp_path / "none"))
    assert gone.exit_code == 2 and "cannot load model" in gone.stderr


def test_show_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("tokens: {method: evs, retention: 0.5}\n")
    assert json.loads(invoke("show", str(path), "--json").stdout) == load_config(path).to_dict()


def test_schema() -> None:
    assert json.loads(invoke("schema").stdout) == config_schema()


def test_version_and_help() -> None:
    assert invoke("--version").stdout == f"spatiotoken {spatiotoken.__version__}\n"
    assert invoke("--help").exit_code == 0


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, spatiotoken.cli; print([m for m in ('torch', 'transformers', 'av') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# --------------------------------------------------------------------------------------------------------------- run


def test_run_json(model: Path) -> None:
    data = run_json("--model", str(model), "--video", PANCAKE, "--num-frames", "8", "--set", "tokens.retention=0.5")
    assert data.keys() == RUN_KEYS
    assert isinstance(data["answer"], str)
    expected = load_config("balanced", **{"tokens.retention": 0.5}).to_dict()
    assert data["config"] == {"name": "balanced"} | expected
    assert data["model_type"] == "qwen2_5_vl"
    tokens = data["tokens"]
    assert tokens.keys() == {"prompt", "visual", "visual_kept", "text"}
    assert tokens["prompt"] == tokens["visual"] + tokens["text"]
    assert tokens["visual"] == 4 * 32 and tokens["visual_kept"] == 64
    assert data["stages"].keys() == {"frames", "tokens", "layers"}
    for stage in data["stages"].values():
        assert stage.keys() == {"method", "tokens_in", "tokens_out", "milliseconds"}
    tokens_stage = data["stages"]["tokens"]
    assert (tokens_stage["method"], tokens_stage["tokens_in"], tokens_stage["tokens_out"]) == ("divprune", 128, 64)
    assert data["stages"]["layers"]["tokens_out"] == 32
    assert data["prefill_ms"] > 0 and data["decode_ms"] > 0 and data["peak_memory_bytes"] > 0
    video = load_video(PANCAKE, num_frames=8)
    assert data["frames"] == {"indices": list(video.indices), "seconds": video.timestamps.tolist()}


def test_run_answers_as_generate_does(model: Path) -> None:
    data = run_json("--model", str(model), "--video", PANCAKE, "--num-frames", "8", "--config", "dense")
    loaded, processor = AutoModelForImageTextToText.from_pretrained(model), AutoProcessor.from_pretrained(model)
    video = load_video(PANCAKE, num_frames=8)
    content = [{"type": "video"}, {"type": "text", "text": "What?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    metadata = {"fps": video.metadata.fps, "frames_indices": list(video.indices), "total_num_frames": 310}
    inputs = processor(
        text=[prompt], videos=[video.frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
    )
    output = loaded.generate(**inputs, max_new_tokens=3, do_sample=False)
    text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert data["answer"] == text.strip()
    assert data["stages"] == {} and data["tokens"]["visual_kept"] == data["tokens"]["visual"]


def test_run_prints_answer_and_report(model: Path) -> None:
    result = invoke("run", "--model", str(model), "--video", SHORT, "--question", "What?", "--max-new-tokens", "3")
    assert result.exit_code == 0, result.stderr
    assert "tokens: divprune" in result.stdout and "3 frames seen" in result.stdout
    assert result.stderr == ""


def test_frames_stage_narrows_what_is_said_to_be_seen(model: Path) -> None:
    choice = ("--config", "uniform", "--set", "frames.num_frames=2")
    data = run_json("--model", str(model), "--video", PANCAKE, "--num-frames", "8", *choice)
    read = load_video(PANCAKE, num_frames=8).indices
    # Units of two frames; the middles of two halves of four units are units 1 and 3.
    assert data["frames"]["indices"] == [read[2], read[3], read[6], read[7]]
    assert len(data["frames"]["seconds"]) == 4


def test_last_unit_of_an_odd_video_has_one_frame(model: Path) -> None:
    loaded, processor = load_model(model)
    video = load_video(SHORT)
    for units, expected in ((1, (2,)), (2, (0, 1, 2))):
        with patched(loaded, {"frames": {"method": "uniform", "num_frames": units}}):
            assert answer_video(loaded, processor, video, "What?", max_new_tokens=1).frame_indices == expected


def test_llava_units_are_frames(tmp_path: Path) -> None:
    loaded, processor = load_model(build_tiny("llava_onevision", tmp_path))
    video = load_video(PANCAKE, num_frames=8)
    with patched(loaded, {"frames": {"method": "uniform", "num_frames": 2}}):
        seen = answer_video(loaded, processor, video, "What?", max_new_tokens=1).frame_indices
    assert seen == (video.indices[2], video.indices[6])


def test_frames_are_chosen_while_the_file_is_decoded(model: Path) -> None:
    """Unless a number of frames is asked for, among which the model then chooses."""
    args = ("--model", str(model), "--video", PANCAKE, "--config", "kmeans", "--set", "frames.num_frames=6")
    data = run_json(*args)
    chosen = load_video(PANCAKE, selector=load_config("kmeans", **{"frames.num_frames": 6}).frames)
    assert data["frames"]["indices"] == list(chosen.indices) and data["stages"] == {}
    assert data["config"]["frames"] == load_config("kmeans", **{"frames.num_frames": 6}).to_dict()["frames"]
    assert run_json(*args, "--candidate-fps", "4")["frames"]["indices"] != data["frames"]["indices"]
    assert run_json(*args, "--num-frames", "16")["stages"]["frames"]["tokens_in"] == 8 * 32


@pytest.mark.parametrize("config", ["slow_fast", "aks"])
def test_frames_that_only_the_model_can_choose(config: str, model: Path) -> None:
    """Of several sizes, or described by its own tower."""
    more = ("--set", "frames.num_frames=4", *(("--set", "frames.scorer=tower") if config == "aks" else ()))
    data = run_json("--model", str(model), "--video", PANCAKE, "--config", config, *more)
    assert data["stages"]["frames"]["tokens_out"] < data["stages"]["frames"]["tokens_in"]


def test_times_in_words(model: Path, tmp_path: Path) -> None:
    llava = build_tiny("llava_onevision", tmp_path / "llava")
    args = ("--video", PANCAKE, "--num-frames", "4", "--config", "dense", "--timestamps")
    told = run_json("--model", str(llava), *args)["tokens"]
    plain = run_json("--model", str(llava), *args[:-1])["tokens"]
    assert told["visual"] == plain["visual"] and told["text"] > plain["text"]
    result = invoke("run", "--question", "What?", "--model", str(model), *args)
    assert_refused(result, "qwen2_5_vl tells the time by itself", "llava_onevision")


def test_half_precision(model: Path) -> None:
    loaded, processor = load_model(model, dtype=resolve_dtype("bfloat16"), device=resolve_device("cpu"))
    assert str(loaded.dtype) == "torch.bfloat16"
    with patched(loaded, "balanced"):
        assert answer_video(loaded, processor, load_video(SHORT), "What?", max_new_tokens=1).report.visual_kept > 0


def test_default_frames(model: Path) -> None:
    data = run_json("--model", str(model), "--video", PANCAKE, "--config", "dense")
    assert data["frames"]["indices"] == list(load_video(PANCAKE, num_frames=64).indices)


def test_subprocess_without_a_model_prints_one_json_object() -> None:
    # The console script itself, with the built-in model: the only run here that shares no process with pytest.
    command = [str(Path(sys.executable).with_name("spatiotoken")), "run", "--video", SHORT, "--question", "What?"]
    result = subprocess.run([*command, "--max-new-tokens", "2", "--json"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout).keys() == RUN_KEYS
    assert result.stdout.startswith("{") and result.stdout.endswith("}\n")
    assert "coloured shapes" in result.stderr


@pytest.mark.parametrize("config", ["balanced", "evs"])
def test_run_without_a_video_makes_one(config: str) -> None:
    result = invoke("run", "--json", "--config", config)
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data.keys() == RUN_KEYS | {"question", "expected", "dense"}
    assert data["dense"].keys() == RUN_KEYS - {"config", "model_type"}
    (example,) = examples("test", 1)
    assert (data["question"], data["expected"]) == (example.question, example.answer)
    assert data["dense"]["answer"] == data["answer"] == example.answer
    assert data["tokens"]["visual_kept"] < data["dense"]["tokens"]["visual_kept"] == 128
    assert data["frames"]["seconds"] == [frame / 4 for frame in data["frames"]["indices"]]


def test_run_without_a_video_shows_both_answers() -> None:
    result = invoke("run", "--example", "5", "--config", "light")
    assert result.exit_code == 0, result.stderr
    assert "tower" not in result.stdout
    for text in (
        "Which letter flashes up?  (the right answer: ",
        "unpatched",
        "light",
        "into the language model",
        "128",
    ):
        assert text in result.stdout


def test_run_tells_of_the_vision_tower() -> None:
    result = invoke("run", "--example", "5", "--config", "dense", "--set", "vision.method=tome")
    assert result.exit_code == 0, result.stderr
    # Of the 64 patches of each of 8 temporal units 64, 52, 40 and 28 enter the four layers.
    (row,) = (line for line in result.stdout.splitlines() if "rows of a tower layer, mean" in line)
    assert re.findall(r"\d+", row) == ["512", str(sum(8 * rows for rows in (64, 52, 40, 28)) // 4)]


# --------------------------------------------------------------------------------------------------------- bad input


# ------------------------------------------------------------------------------------------------------------ frames


def test_frames_json() -> None:
    result = invoke("frames", "--video", PANCAKE, "--config", "kffocus", "--set", "frames.num_frames=5", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    config = load_config("kffocus", **{"frames.num_frames": 5})
    selection = select_frames(PANCAKE, config.frames)
    assert data["config"] == {"name": "kffocus"} | config.to_dict() and data["video"]["num_frames"] == 310
    assert data["candidates"] == len(selection.candidates)
    assert [row["index"] for row in data["frames"]] == list(selection.indices)
    scores = selection.choice.scores
    assert scores is not None
    for row, at in zip(data["frames"], selection.choice.indices, strict=True):
        assert row == {
            "index": selection.candidates[at],
            "seconds": selection.seconds[at],
            "score": pytest.approx(float(scores[at])),
            "scale": 1.0,
        }


def test_frames_table_and_sheet(tmp_path: Path) -> None:
    """The sheet shows the chosen frames, and a mark for each on the timeline."""
    path = tmp_path / "sheet.png"
    result = invoke(
        "frames", "--video", PANCAKE, "--config", "uniform", "--set", "frames.num_frames=3", "--sheet", str(path)
    )
    assert result.exit_code == 0, result.stderr
    selection = select_frames(PANCAKE, load_config("uniform", **{"frames.num_frames": 3}).frames)
    assert all(str(index) in result.stdout for index in selection.indices)
    sheet = torch.from_numpy(np.array(Image.open(path)))
    thumbnails = load_thumbnails(PANCAKE, selection.indices, short_side=112)
    _, _, height, width = thumbnails.shape
    for number, picture in enumerate(thumbnails):
        left = 4 + number * (width + 4)
        assert torch.equal(sheet[4 : 4 + height, left : left + width], picture.permute(1, 2, 0))
    red = (sheet == torch.tensor([0xD0, 0x30, 0x20])).all(dim=-1).any(dim=0)
    marks = (red[1:] & ~red[:-1]).nonzero()[:, 0]
    expected = [
        second / selection.metadata.duration * sheet.shape[1]
        for second in (selection.seconds[i] for i in selection.choice.indices)
    ]
    assert len(marks) == 3 and max(abs(a - b) for a, b in zip(marks.tolist(), expected, strict=True)) < 8


@pytest.mark.parametrize(
    ("args", "culprits"),
    [
        (("--config", "divprune"), ("config 'divprune' has no frames method",)),
        (("--config", "aks"), ("compares frames with the question",)),
        (("--config", "aks", "--question", "?", "--set", "frames.scorer=tower"), ("patch_model",)),
        (("--config", "kmeans", "--candidate-fps", "0"), ("candidate_fps must be positive",)),
        (("--config", "kmeans", "--sheet", "/no/such/folder/sheet.png"), ("/no/such/folder/sheet.png",)),
        (("--config", "kmeans", "--sheet", "sheet.nothing"), (".nothing",)),
        (("--config", "kmeans", "--set", "frames.scorer.kind=dino"), ("frames.scorer.kind", "'dinov2'")),
    ],
)
def test_frames_refuses(args: Sequence[str], culprits: Sequence[str]) -> None:
    assert_refused(invoke("frames", "--video", PANCAKE, *args), *culprits)


def test_subprocess_refuses_in_one_line() -> None:
    command = [sys.executable, "-m", "spatiotoken.cli", "show", "balancd", "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "'balancd'" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("args", "culprits"),
    [
        (["--config", "balancd"], ["'balancd'", "'balanced'"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--set", "tokens.retenton=0.5"], ["tokens.retenton", "retention"]),
        (["--set", "token.retention=0.5"], ["'token.retention'", "tokens"]),
        (["--set", "descripton=x"], ["descripton", "description"]),
        (["--set", "tokens.retention=0"], ["tokens.retention", "0 is not allowed"]),
        (["--set", "tokens.retention=1.5"], ["tokens.retention", "1.5 is not allowed"]),
        (["--set", "tokens.method=nonsense"], ["'nonsense'", "divprune"]),
        (["--set", "tokens.retention"], ["'tokens.retention'", "STAGE.KEY=VALUE"]),
        (["--set", "=1"], ["'=1'", "STAGE.KEY=VALUE"]),
        (["--set", "tokens.retention=[1"], ["'[1'", "YAML"]),
        (["--dtype", "float8"], ["'float8'", "bfloat16"]),
        (["--device", "tpu"], ["'tpu'", "cuda:N"]),
        (["--device", "cuda:99"], ["'cuda:99'"]),
        (["--num-frames", "4"], [SHORT, "4", "3"]),
        (["--num-frames", "0"], ["--num-frames"]),
        (["--num-frames", "many"], ["--num-frames"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens"]),
        (["--nonsense"], ["--nonsense"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_bad_option(args: Sequence[str], culprits: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "load_model", None)  # all of these are refused before a model is loaded
    assert_refused(invoke("run", "--video", SHORT, "--question", "What?", "--json", *args), *culprits)


@pytest.fixture
def bad_video(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    if request.param == "corrupted":
        return DATA / "corrupted.mp4"
    if request.param == "directory":
        return DATA
    path = tmp_path / f"{request.param}.wav"
    if request.param == "audio":
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(bytes(16000))
    return path


@pytest.mark.parametrize("bad_video", ["corrupted", "directory", "audio", "missing"], indirect=True)
def test_bad_video(bad_video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "load_model", None)
    assert_refused(invoke("run", "--video", str(bad_video), "--question", "What?", "--json"), str(bad_video))


@pytest.mark.parametrize(
    "case", ["missing", "no config", "no json", "truncated weights", "unsupported", "no processor"]
)
def test_bad_model(case: str, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad"
    if case != "missing":
        shutil.copytree(model, path)
    weights = path / "model.safetensors"
    if case == "no config":
        (path / "config.json").unlink()
    elif case == "no json":
        (path / "config.json").write_text("{")
    elif case == "truncated weights":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif case == "unsupported":
        (path / "config.json").write_text('{"model_type": "idefics3"}')
    elif case == "no processor":
        (path / "processor_config.json").unlink()
    result = invoke("run", "--model", str(path), "--video", SHORT, "--question", "What?", "--json")
    assert_refused(result, str(path), *(["'idefics3'", "qwen2_5_vl"] if case == "unsupported" else []))


def test_config_that_does_not_fit_the_model(model: Path) -> None:
    args = ("--config", "fastv", "--set", "layers.layer=40")
    assert_refused(invoke("run", "--model", str(model), "--video", SHORT, "--question", "What?", *args), "40")


def test_bad_usage() -> None:
    assert_refused(invoke(), "command")
    assert_refused(invoke("nonsense"), "nonsense")
    assert_refused(invoke("run", "--question", "What?"), "--video")
    assert_refused(invoke("run", "--model", "some/model"), "--video")
    assert_refused(invoke("run", "--video", SHORT), "--question")
    assert_refused(invoke("run", "--example", "-1"), "--example")


def test_bugs_are_not_taken_for_bad_input(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(answer_module, "answer_video", broken)
    result = invoke("run", "--model", str(model), "--video", SHORT, "--question", "What?")
    assert isinstance(result.exception, ValueError) and str(result.exception) == "a bug"


def test_what_libraries_print_is_not_on_stdout(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chatty(*args: Any, **kwargs: Any) -> Any:
        print("chatter")
        return answer_video(*args, **kwargs)

    monkeypatch.setattr(answer_module, "answer_video", chatty)
    args = ("--model", str(model), "--video", SHORT, "--question", "What?", "--max-new-tokens", "1", "--json")
    result = invoke("run", *args)
    assert json.loads(result.stdout).keys() == RUN_KEYS and "chatter" in result.stderr
