"""What the benchmark of vision towers runs and reports; never how long anything took."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from spatiotoken import tower_benchmark
from spatiotoken.benchmark import UNPATCHED
from spatiotoken.patches import llava
from spatiotoken.tower_benchmark import (
    TOWER_CONFIGS,
    TOWERS,
    Tower,
    TowerComparison,
    compare_towers,
    tower_config,
    tower_table,
)
from spatiotoken.vision import exact
from tests.benchmarking import cells, options, run_script

RUN: dict[str, Any] = {"frames": 4, "side": 3, "num_layers": 3, "repeats": 2}
FAST = "dense, fast_tower"


def shrunk(tower: Tower) -> Tower:
    """The same tower with a hidden size of 64 and small pictures."""
    small = {"num_heads": 2, "num_attention_heads": 2, "image_size": 84, "window_size": 56}
    small |= dict.fromkeys(("embed_dim", "intermediate_size"), 64)
    vision = {key: small.get(key, value) for key, value in tower.vision.items()}
    if "embed_dim" not in vision:  # where there is one, the hidden size is the language model's
        vision["hidden_size"] = 64
    return replace(tower, vision=vision)


def script(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    run_script(monkeypatch, "--suite", "tower", *options(RUN), *args)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower_benchmark, "TOWERS", {name: shrunk(tower) for name, tower in TOWERS.items()})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the two ways of a fast tower were taken."""
    found = {"packed": 0, "parts": 0}

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return original(*args, **kwargs)

        return run

    monkeypatch.setattr(exact, "chunked_attention", counted("packed", exact.chunked_attention))
    monkeypatch.setattr(llava, "in_parts", counted("parts", llava.in_parts))
    return found


def test_shapes_are_those_of_released_towers() -> None:
    configs = {name: tower_config(name, tower.layers).vision_config for name, tower in TOWERS.items()}
    assert configs["qwen2_vl"].embed_dim == configs["qwen2_5_vl"].hidden_size == 1280
    assert configs["qwen2_vl"].depth == configs["qwen2_5_vl"].depth == 32
    assert configs["qwen2_5_vl"].fullatt_block_indexes == [7, 15, 23, 31]
    assert configs["qwen3_vl"].depth == 27 and configs["qwen3_vl"].deepstack_visual_indexes == [8, 16, 24]
    assert configs["llava_onevision"].num_hidden_layers == 26 and configs["llava_onevision"].image_size == 384
    assert configs["llava_next_video"].num_hidden_layers == 24 and configs["llava_next_video"].hidden_size == 1024
    assert tower_config("llava_next_video", 24).vision_feature_layer == -2


def test_fewer_layers_have_the_same_parts() -> None:
    """One block in eight attends to whole frames, three layers are read for deepstack."""
    configs = {name: tower_config(name, tower.cpu_layers).vision_config for name, tower in TOWERS.items()}
    assert configs["qwen2_5_vl"].depth == 8 and configs["qwen2_5_vl"].fullatt_block_indexes == [7]
    assert configs["qwen3_vl"].depth == 4 and configs["qwen3_vl"].deepstack_visual_indexes == [1, 2, 3]
    assert tower_config("qwen2_5_vl", 3).vision_config.fullatt_block_indexes == [2]


@pytest.mark.parametrize("model_type", TOWERS)
def test_each_tower_runs(small: None, calls: dict[str, int], model_type: str) -> None:
    (found,) = compare_towers([model_type], **RUN, warmup=1)
    assert (found.model_type, found.layers, found.released_layers) == (model_type, 3, TOWERS[model_type].layers)
    assert [timing.config for timing in found.timings] == list(TOWER_CONFIGS)
    # Two frames go together; a CLS token comes to the patches, from transformers 5.23 on a newline to the tokens.
    patches = {"llava_onevision": 4 * 36, "llava_next_video": 4 * 37}.get(model_type, 2 * 36)
    tokens = {"llava_onevision": {4 * 9, 4 * 9 + 1}, "llava_next_video": {4 * 9}}.get(model_type, {2 * 9})
    assert found.frames == 4 and found.patches == patches and found.tokens in tokens
    for timing in found.timings:
        assert len(timing.milliseconds) == 2 and min(timing.milliseconds) > 0
        assert timing.difference <= 1e-5 and timing.peak_memory_bytes is None
        assert timing.ratio == pytest.approx(timing.median_ms / found.timings[0].median_ms)
        assert timing.ratio_interval[0] <= timing.ratio_interval[1]
    assert found.timings[0].ratio == 1 and found.timings[0].difference == found.timings[1].difference == 0
    # Only one config is fast: the features are compared once, then there are a round of warm-up and two more.
    assert calls == ({"packed": 4 * 3, "parts": 0} if "qwen" in model_type else {"packed": 0, "parts": 4})


def test_differences_are_those_of_the_features(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    own = exact.chunked_attention
    monkeypatch.setattr(exact, "chunked_attention", lambda *args: 2 * own(*args))
    (found,) = compare_towers(["qwen3_vl"], **RUN)
    assert [timing.difference > 1e-3 for timing in found.timings] == [False, False, True]


def test_sizes(small: None) -> None:
    (full,) = compare_towers(["qwen3_vl"], size="7b", side=1, repeats=1)
    assert (full.layers, full.frames, full.patches) == (27, 32, 16 * 4)
    (few,) = compare_towers(["qwen3_vl"], side=1, repeats=1)
    assert (few.layers, few.frames, few.patches) == (4, 8, 4 * 4)


def test_inputs_and_weights_are_the_same_each_time(small: None) -> None:
    setting = tower_benchmark._Setting("llava_onevision", 2, 2, 1, torch.float32, "cpu", 1)
    first, video = tower_benchmark._model_and_video(setting)
    torch.rand(1)
    second, again = tower_benchmark._model_and_video(setting)
    features = tower_benchmark._features(first, video, UNPATCHED)
    assert torch.equal(features, tower_benchmark._features(second, again, UNPATCHED))
    assert features.isfinite().all() and features[0].std() > 0.01 and not torch.equal(features[0], features[1])


def test_table(small: None) -> None:
    comparisons = list(compare_towers(["qwen2_vl", "llava_next_video"], **RUN))
    header, *rows = cells(tower_table(comparisons))
    assert header[-1] == "greatest difference" and len(rows) == 2 * len(TOWER_CONFIGS)
    assert rows[0][:4] == ["qwen2_vl", "3 of 32", "72", UNPATCHED] and rows[-1][:2] == ["llava_next_video", "3 of 24"]
    assert all(all(row) for row in rows)

    def with_memory(one: TowerComparison) -> TowerComparison:
        timings = (replace(timing, peak_memory_bytes=3 * 2**20) for timing in one.timings)
        return replace(one, timings=tuple(timings))

    header, *rows = cells(tower_table([with_memory(comparisons[0]), comparisons[1]]))
    assert header[-1] == "peak, MiB" and [row[-1] for row in rows] == ["3", "3", "3", "", "", ""]


@pytest.mark.slow
def test_memory() -> None:
    (found,) = compare_towers(["llava_next_video"], frames=2, num_layers=8, repeats=1, memory=True)
    peaks = {timing.config: timing.peak_memory_bytes for timing in found.timings}
    assert all(peak is not None and peak > 2**20 for peak in peaks.values())


@pytest.mark.parametrize(
    "wrong", [{"repeats": 0}, {"warmup": -1}, {"frames": 3}, {"frames": 0}, {"side": 0}, {"num_layers": 1}]
)
def test_bad_settings(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        list(compare_towers(["qwen2_vl"], **RUN | wrong))


def test_unknown_models() -> None:
    with pytest.raises(ValueError, match="unknown model types llava; there are qwen2_vl, "):
        list(compare_towers(["llava"], **RUN))


def test_script(small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script(monkeypatch, "--models", "qwen2_5_vl")
    out = capsys.readouterr().out
    assert out.startswith("cpu: ") and ", torch_threads: 1, " in out and ", dtype: float32, " in out
    assert [row[3] for row in cells(out)[1:]] == [UNPATCHED, "dense", FAST]

    script(monkeypatch, "--models", "qwen2_vl", "llava_onevision", "--size", "7b", "--json")
    data = json.loads(capsys.readouterr().out)
    assert data.keys() == {"suite", "size", "machine", "towers"} and data["suite"] == "tower" and data["size"] == "7b"
    assert data["machine"]["dtype"] == "bfloat16"
    assert [tower["model_type"] for tower in data["towers"]] == ["qwen2_vl", "llava_onevision"]
    assert {timing["config"] for tower in data["towers"] for timing in tower["timings"]} == set(TOWER_CONFIGS)


@pytest.mark.parametrize(
    "args", [("--models", "nonsense"), ("--device", "tpu"), ("--repeats", "0"), ("--dtype", "auto"), ("--size", "9b")]
)
def test_script_refuses_bad_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        script(monkeypatch, *args)
    assert args[-1] in capsys.readouterr().err
