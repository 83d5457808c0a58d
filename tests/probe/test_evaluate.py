"""What the probe command measures: evidence, answers, intervals, baselines; on the trained models and on tiny ones."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from spatiotoken import last_report, load_config, patched
from spatiotoken.answer import load_model, prepare_batch
from spatiotoken.cli import app
from spatiotoken.probe import build_tiny
from spatiotoken.probe.curves import Curves, write_page
from spatiotoken.probe.dataset import clip_metadata, examples
from spatiotoken.probe.evaluate import (
    BASELINES,
    ask,
    at_retention,
    bootstrap_interval,
    instruction,
    load_probe_model,
    parse_answer,
    probe,
)
from spatiotoken.probe.keyframes import find_needles, selectors
from spatiotoken.probe.models import PROBE_MODEL_TYPES
from spatiotoken.probe.scenes import FAMILIES

PROBE_KEYS = {
    "density",
    "config",
    "accuracy",
    "interval",
    "families",
    "evidence_recall",
    "visual",
    "visual_kept",
    "retention",
    "tower",
    "prefill_ms",
    "model",
    "num_frames",
    "baselines",
}


@pytest.mark.parametrize("model_type", PROBE_MODEL_TYPES)
def test_a_config_beside_its_baselines(model_type: str) -> None:
    model, processor = load_probe_model(model_type)
    result = probe(model, processor, "divprune", name="divprune", limit=28)
    assert result.model == model_type and result.num_frames == 16
    assert result.families.keys() == set(FAMILIES)
    assert all(score.n == 4 for score in result.families.values())
    chances = {family: score.chance for family, score in result.families.items()}
    assert chances["needle"] == 1 / 8 and chances["spatial"] == 1 / 2 and chances["order"] == pytest.approx(11 / 60)
    assert result.accuracy == pytest.approx(sum(score.accuracy for score in result.families.values()) / 7)
    assert result.baselines.keys() == {"dense", *BASELINES}
    dense = result.baselines["dense"]
    assert dense.retention == 1 and dense.evidence_recall == 1 and dense.visual_kept == dense.visual == result.visual
    assert dense.difference == pytest.approx(result.accuracy - dense.accuracy)
    for name in BASELINES:
        baseline = result.baselines[name]
        # The same budget: never more, and less by no more than rounding to whole tokens (of each frame) takes.
        assert 0.5 * result.retention < baseline.retention <= result.retention + 1 / result.visual
        assert 0 < baseline.evidence_recall <= 1
    assert not hasattr(model, "_spatiotoken")


def test_dense_is_the_unpatched_model() -> None:
    model, processor = load_probe_model("qwen2_5_vl")
    result = probe(model, processor, "dense", name="dense", limit=14)
    assert result.baselines == {} and result.retention == 1 and result.evidence_recall == 1


def test_budget_counts_every_layer() -> None:
    model, processor = load_probe_model("qwen2_5_vl")
    questions = list(examples("test", 7))
    tallies = ask(model, processor, {"fastv": load_config("fastv"), "light": load_config("light")}, questions)
    assert tallies["fastv"].visual_kept == tallies["fastv"].visual  # all enter the language model
    assert tallies["fastv"].retention == pytest.approx((1 + 5 * 0.5) / 6)
    assert tallies["light"].retention == pytest.approx(0.5 * (3 + 3 * 0.75) / 6)


@pytest.mark.parametrize("model_type", PROBE_MODEL_TYPES)
def test_evidence_recall_is_that_of_the_tokens_left(model_type: str) -> None:
    """A method that keeps known tokens, against a count by hand."""
    model, processor = load_probe_model(model_type)
    needle = next(example for example in examples("test", 7) if example.family == "needle")
    frame = int(needle.evidence[0].any(dim=1).nonzero())
    unit = frame // 2 if model_type == "qwen2_5_vl" else frame
    units = 8 if model_type == "qwen2_5_vl" else 16
    keep_one = {"frames": {"method": "uniform", "num_frames": 1}}  # the middle unit
    (recall,) = ask(model, processor, {"": load_config(keep_one)}, [needle])[""].recalls
    assert recall == float(unit == units // 2)
    merged = ask(model, processor, {"": at_retention("downsample", 0.25)}, [needle])[""]
    assert merged.recalls == [1.0]  # averaged tokens are absorbed, not lost


def test_recall_after_frames_tokens_and_layers() -> None:
    """All stages together: what `seen` says is what the last layer had."""
    model, processor = load_probe_model("qwen2_5_vl")
    config = {
        "frames": {"method": "uniform", "num_frames": 4},
        "tokens": {"method": "random", "retention": 0.5},
        "layers": {"method": "fastv", "layer": 2, "retention": 0.5},
    }
    batch = list(examples("test", 3))
    inputs = prepare_batch(
        processor, [e.frames for e in batch], [e.question for e in batch], [clip_metadata(16)] * len(batch)
    )
    with patched(model, config), torch.no_grad():
        model(**inputs)
        report = last_report(model)
    assert report.seen is not None and [len(row) for row in report.seen] == [128] * 3
    assert [sum(row) for row in report.seen] == [16] * 3  # 8 x 16 tokens, half of the frames, half, half
    assert report.layer_tokens[-1] == report.text_tokens + 48
    assert report.layer_tokens[0] == report.text_tokens + 96 == report.text_tokens + report.visual_kept
    kept = {unit for unit in range(8) for row in report.seen if any(row[unit * 16 : unit * 16 + 16])}
    assert report.frames is not None and kept <= set(report.frames[0])


def test_blanked_videos_give_nothing_away() -> None:
    model, processor = load_probe_model("qwen2_5_vl")
    tally = ask(model, processor, {"": load_config("dense")}, examples("test", 168), blank=True)[""]
    for family, score in tally.run("").families.items():
        assert score.accuracy <= score.chance + 0.25, family  # the exact check, on all questions, is `make test-slow`


def test_models_that_were_not_trained_on_it_are_told_the_options(tmp_path: Path) -> None:
    model, processor = load_model(build_tiny("qwen2_vl", tmp_path))
    question = next(iter(examples("test", 1)))
    assert instruction(question).endswith("Answer with one word: red, green, blue, yellow, purple or cyan.")
    (answer,) = ask(model, processor, {"": load_config("dense")}, [question])[""].answers
    assert len(processor.tokenizer(answer)["input_ids"]) > 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("red", "red"),
        ("Red.", "red"),
        ("The circle is blue, not red", "blue"),
        ("reddish", None),
        ("", None),
        ("I cannot see", None),
    ],
)
def test_parse_answer(text: str, expected: str | None) -> None:
    assert parse_answer(text, ("red", "blue")) == expected


def test_parse_answer_gives_the_option_as_written() -> None:
    assert parse_answer("a", ("A", "E")) == "A" and parse_answer("It says 3!", ("1", "3")) == "3"


def test_bootstrap_interval() -> None:
    assert bootstrap_interval(torch.ones(10)) == (1.0, 1.0)
    values = (torch.arange(400) % 4 == 0).double()
    low, high = bootstrap_interval(values)
    # The normal approximation: 0.25 -+ 1.96 * sqrt(0.25 * 0.75 / 400).
    assert low == pytest.approx(0.2076, abs=0.006) and high == pytest.approx(0.2924, abs=0.006)
    assert bootstrap_interval(values) == (low, high)


# ------------------------------------------------------------------------------------------------------ command line


def invoke(*args: str) -> dict:
    result = CliRunner().invoke(app, ["probe", "--json", *args])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_probe_json() -> None:
    data = invoke("--config", "evs", "--limit", "14", "--model", "llava_onevision", "--set", "tokens.retention=0.5")
    assert data.keys() == PROBE_KEYS and data["config"] == "evs" and data["retention"] == pytest.approx(0.5, abs=0.01)
    assert all({"accuracy", "interval", "n", "chance"} == score.keys() for score in data["families"].values())
    assert data["baselines"]["random"].keys() == PROBE_KEYS - {"model", "num_frames", "baselines"} | {
        "difference",
        "difference_interval",
    }


def test_probe_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    result = CliRunner().invoke(app, ["probe", "--config", "divprune", "--limit", "7"])
    assert result.exit_code == 0, result.stderr
    for text in ("needle, chance 12", "evidence recall", "divprune", "dense", "downsample"):
        assert text in result.stdout


@pytest.mark.parametrize(
    ("args", "culprits"),
    [
        (["--config", "nowhere"], ["'nowhere'"]),
        (["--limit", "0"], ["--limit"]),
        (["--num-frames", "4"], ["--num-frames"]),
        (["--model", "/nowhere"], ["/nowhere"]),
        (["--all", "--output", "/nowhere"], ["/nowhere"]),
    ],
)
def test_bad_usage(args: list[str], culprits: list[str]) -> None:
    result = CliRunner().invoke(app, ["probe", *args])
    assert result.exit_code == 2 and result.stdout == ""
    assert all(culprit in result.stderr for culprit in culprits)


def test_page(tmp_path: Path) -> None:
    model, processor = load_probe_model("qwen2_5_vl")
    configs = {"dense": load_config("dense"), "evs": load_config("evs"), "random-50": at_retention("random", 0.5)}
    configs |= {"downsample-50": at_retention("downsample", 0.5), "fastv-50": load_config("fastv-50")}
    tallies = ask(model, processor, configs, islice(examples("test", 7), 7))
    runs = [tally.run(name) for name, tally in tallies.items()]
    needles = find_needles({name: selectors()[name] for name in ("uniform", "dpp")}, 8, model, processor)
    curves = {"qwen2_5_vl": Curves(runs, needles)}
    page = write_page(curves, tmp_path, limit=7, num_frames=16, command="spatiotoken probe --all", machine="here")
    text = page.read_text()
    assert "| `dpp` | pixels | 8.0 | 100.0 |" in text and "| `uniform` | – | 8.0 |" in text
    assert re.search(r"\| fastv-50 \| 58\.3 \|.*\| (yes|no)", text)
    assert "| `evs` | 32 | 25.0 |" in text and "## qwen2_5_vl" in text and "![" in text
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")
