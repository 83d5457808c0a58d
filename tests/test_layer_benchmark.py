"""What the benchmark of the `layers` stage runs and reports; never how long anything took."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spatiotoken.benchmark import prefill_ms
from spatiotoken.config import load_config
from spatiotoken.layer_benchmark import (
    BASELINES,
    REFERENCES,
    LayerComparison,
    _model_and_prompt,
    _Setting,
    compare_layers,
    layer_configs,
    layer_table,
)
from spatiotoken.layers.fastv import FastV
from spatiotoken.layers.pyramiddrop import PyramidDrop
from spatiotoken.patching import patched
from spatiotoken.probe import build_tiny
from spatiotoken.registry import METHODS
from tests.benchmarking import cells, options, run_script

TINY: dict[str, Any] = {"repeats": 2, "visual_tokens": 220, "hidden_size": 64, "num_layers": 6}
ROWS = [
    "unpatched",
    *sorted(METHODS["layers"].items()),
    "fastv, layer 2",
    *(f"{baseline} as {reference}" for reference in REFERENCES for baseline in BASELINES),
]


@pytest.fixture(scope="module")
def everything() -> LayerComparison:
    return compare_layers(layer_configs(), **TINY)


def script(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    run_script(monkeypatch, "--suite", "layers", *options(TINY), *args)


def test_configs() -> None:
    """Each method at its preset, but without the preset's other stages; the references as they were published."""
    configs = layer_configs()
    assert configs.keys() == {*METHODS["layers"].items(), "fastv, layer 2"} and set(REFERENCES) <= configs.keys()
    for name, config in configs.items():
        assert list(config.methods()) == ["layers"], name
    assert configs["fastv, layer 2"].layers == FastV(layer=2, retention=0.5)
    assert configs["pyramiddrop"].layers == PyramidDrop(layers=(0.25, 0.5, 0.75), keep=(0.5, 0.25, 0.125))
    assert configs["fastv"].layers != FastV(), "not its preset"


def test_every_method_runs(everything: LayerComparison) -> None:
    assert [timing.config for timing in everything.timings] == ROWS
    assert everything.visual_tokens == 200 < everything.prompt_tokens
    unpatched = everything.timings[0]
    assert unpatched.share == unpatched.retention == unpatched.predicted == unpatched.predicted_flops == 1
    assert unpatched.speedup == unpatched.ratio == 1 and unpatched.method_ms == 0
    for timing in everything.timings:
        assert len(timing.milliseconds) == 2 and min(timing.milliseconds) > 0, timing.config
        assert 0 <= timing.retention <= 1 and timing.retention - 1e-9 <= timing.share <= 1, timing.config
        assert timing.predicted == pytest.approx(1 / timing.share)
        assert timing.predicted_flops >= timing.predicted - 1e-9, "attention grows faster than the number of tokens"
        assert timing.speedup == pytest.approx(unpatched.median_ms / timing.median_ms)
        assert timing.ratio == pytest.approx(timing.speedup / timing.predicted)
        assert timing.speedup_interval[0] <= timing.speedup_interval[1]
        assert (timing.method_ms > 0) == (timing.config != "unpatched"), timing.config
        assert timing.peak_memory_bytes is None


def test_counts(everything: LayerComparison) -> None:
    by_name = {timing.config: timing for timing in everything.timings}
    text = everything.prompt_tokens - 200
    fastv = by_name["fastv, layer 2"]
    assert fastv.prune_layers == (2,) and fastv.retention == pytest.approx(2 / 3)
    assert fastv.share == pytest.approx((2 * 200 + 4 * 100 + 6 * text) / (6 * everything.prompt_tokens))
    pyramid = by_name["pyramiddrop"]
    assert pyramid.prune_layers == (2, 3, 4)
    assert pyramid.retention == pytest.approx((2 + 0.5 + 0.25 + 2 * 0.125) / 6)
    for reference in REFERENCES:
        for baseline, within in zip(BASELINES, (0.003, 0.05), strict=True):
            timing = by_name[f"{baseline} as {reference}"]
            assert timing.prune_layers == ()
            assert timing.retention == pytest.approx(by_name[reference].retention, abs=within), "another budget"


def test_table(everything: LayerComparison) -> None:
    header, *rows = cells(layer_table(everything))
    assert header[:3] == ["config", "before layers", "retention"] and header[-1] == "method, ms"
    assert [row[0] for row in rows] == ROWS
    for row in rows:
        assert all(row), row
        for column in ("retention", "token-layers", "predicted", "by arithmetic", "measured", "measured / predicted"):
            float(row[header.index(column)])
    framefusion = next(row for row in rows if row[0] == "framefusion")
    assert framefusion[1] == "0 to 5", "layers in a row are a range"
    assert "at least 0.9: " in layer_table(everything).splitlines()[-1]


def test_table_with_memory(everything: LayerComparison) -> None:
    peaks = [600 * 2**20 + 2**19 * index for index in range(len(everything.timings))]
    timings = tuple(
        replace(timing, peak_memory_bytes=peak) for timing, peak in zip(everything.timings, peaks, strict=True)
    )
    header, *rows = cells(layer_table(replace(everything, timings=timings)))
    assert header[-2:] == ["peak, MiB", "beside unpatched, MiB"]
    assert rows[0][-2:] == ["600", "+0.0"] and rows[3][-2:] == ["602", "+1.5"]


@pytest.mark.slow
def test_memory() -> None:
    """Of the prefill alone: the process itself takes hundreds of megabytes."""
    configs = {"fastv": layer_configs()["fastv"]}
    settings = TINY | {"repeats": 1, "visual_tokens": 4000}
    dense, fastv = (one.peak_memory_bytes for one in compare_layers(configs, **settings, memory=True).timings)
    assert dense is not None and fastv is not None
    # The states of a layer alone take 4000 x 64 x 4 bytes.
    assert 1e6 < fastv < dense < 1e8


def test_a_method_that_drops_nothing_takes_no_more_memory(tmp_path: Path) -> None:
    """Tensors that live at once, counted by torch: a few bytes of bookkeeping for each token, and no states."""

    def peak(method: str | None, **settings: Any) -> int:
        config = {"layers": {"method": method, **settings}} if method else "dense"
        with patched(model, load_config(config)):
            prefill_ms(model, inputs)
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profile:
                prefill_ms(model, inputs)
        assert profile.profiler is not None
        now = most = 0
        for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return most

    build_tiny("qwen2_5_vl", tmp_path, hidden_size=64, num_layers=6)
    model, inputs = _model_and_prompt(_Setting(str(tmp_path), 1000, torch.float32, "cpu", 1))
    tokens = inputs["input_ids"].numel()
    dense, states = peak(None), tokens * 64 * 4
    assert dense > 5 * states
    for method in ("dyvte", "todre_drop"):
        assert peak(method, layer=3, threshold=1e-9) - dense < 32 * tokens < states / 4
    assert peak("fastv", layer=1, retention=0.3) < 0.75 * dense


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="repeats"):
        compare_layers({}, **TINY | {"repeats": 0})
    with pytest.raises(ValueError, match="visual_tokens"):
        compare_layers({}, **TINY | {"visual_tokens": 10})
    with pytest.raises(ValueError, match="layers.layer: 2"):
        compare_layers({"fastv": layer_configs()["fastv, layer 2"]}, **TINY | {"num_layers": 2})


def test_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script(monkeypatch, "--methods", "yopo", "pyramiddrop", "--repeats", "1")
    out = capsys.readouterr().out
    assert out.startswith("cpu: ") and ", torch_threads: 1, " in out
    names = ["unpatched", "pyramiddrop", "yopo", "random as pyramiddrop", "downsample as pyramiddrop"]
    assert [row[0] for row in cells(out)[1:]] == names
    assert len(out.splitlines()[-1].split("; ")) == 1, "the other reference did not run"

    script(monkeypatch, "--methods", "yopo", "--repeats", "1", "--json")
    data = json.loads(capsys.readouterr().out)
    assert data.keys() == {"suite", "machine", "model", "prompt_tokens", "visual_tokens", "timings"}
    assert data["suite"] == "layers" and data["machine"]["torch_threads"] == 1
    assert data["model"] == {"model_type": "qwen2_5_vl", "hidden_size": 64, "num_layers": 6}
    assert [timing["config"] for timing in data["timings"]] == ["unpatched", "yopo"]
    assert data["timings"][1]["prune_layers"] == [4] and data["timings"][1]["retention"] == pytest.approx(4 / 6)


@pytest.mark.parametrize("args", [("--methods", "nonsense"), ("--device", "tpu"), ("--repeats", "0")])
def test_script_refuses_bad_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        script(monkeypatch, *args)
    assert args[-1] in capsys.readouterr().err
