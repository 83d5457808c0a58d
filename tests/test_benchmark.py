"""What the benchmark reports; never how long anything took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spatiotoken.benchmark import PRESETS, compare, in_process, peak_growth, ratio_of_medians
from spatiotoken.config import ConfigError, presets

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"
TINY: dict[str, Any] = {"repeats": 2, "warmup": 0, "visual_tokens": 200, "hidden_size": 64, "num_layers": 3}


def script(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *args], capture_output=True, text=True)


def test_overhead_suite_prints_json() -> None:
    options = [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items()]
    result = script("--suite", "overhead", "--json", "--threads", "1", *options)
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert data.keys() == {"suite", "machine", "model", "prompt_tokens", "visual_tokens", "timings"}
    assert data["suite"] == "overhead"
    assert data["machine"].keys() == {
        "cpu",
        "cores",
        "torch_threads",
        "load_average",
        "device",
        "dtype",
        "python",
        "torch",
        "transformers",
        "commit",
    }
    assert data["machine"]["torch_threads"] == 1
    assert data["machine"]["device"] == "cpu" and data["machine"]["dtype"] == "float32"
    assert data["model"] == {"model_type": "qwen2_5_vl", "hidden_size": 64, "num_layers": 3}
    assert data["visual_tokens"] == 200 < data["prompt_tokens"]
    assert [timing["config"] for timing in data["timings"]] == ["unpatched", "dense"]
    for timing in data["timings"]:
        assert timing.keys() == {
            "config",
            "milliseconds",
            "median_ms",
            "ratio",
            "ratio_interval",
            "visual_kept",
            "stages",
        }
        assert len(timing["milliseconds"]) == 2 and min(timing["milliseconds"]) > 0
        assert timing["visual_kept"] == 200 and timing["stages"] == {}


def test_reduction_counts_what_is_kept() -> None:
    comparison = compare(["random", "fastv"], **TINY)
    unpatched, random, fastv = comparison.timings
    assert (unpatched.visual_kept, random.visual_kept, fastv.visual_kept) == (200, 50, 200)
    assert unpatched.ratio == 1.0 and unpatched.ratio_interval == (1.0, 1.0)
    assert random.stages == {"tokens": 50} and fastv.stages == {"layers": 100}


def test_default_presets_exist() -> None:
    assert set(PRESETS) <= presets().keys()


def test_ratio_interval_holds_the_ratio() -> None:
    ratio, (low, high) = ratio_of_medians([2.0, 2.2, 1.8, 2.1, 1.9], [1.0, 1.1, 1.0, 0.9, 1.0])
    assert ratio == 2.0 and low <= ratio <= high
    assert ratio_of_medians([3.0], [2.0]) == (1.5, (1.5, 1.5))


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="repeats"):
        compare(["dense"], **TINY | {"repeats": 0})
    with pytest.raises(ValueError, match="visual_tokens"):
        compare(["dense"], **TINY | {"visual_tokens": 10})
    with pytest.raises(ConfigError, match="nonsense"):
        compare(["nonsense"], **TINY)


def test_script_refuses_a_bad_device() -> None:
    result = script("--suite", "overhead", "--device", "tpu")
    assert result.returncode == 2 and result.stdout == "" and "'tpu'" in result.stderr


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux forgets a peak")
def test_peak_growth_is_that_of_the_second_call() -> None:
    """In a process of its own: what other tests left to the allocator would be used again here."""
    assert 60 * 2**20 < in_process(_growth) < 100 * 2**20


def _growth() -> int:
    sizes = iter((256, 64))
    return peak_growth(lambda: torch.ones(next(sizes) * 2**18).sum(), torch.device("cpu"))


def test_processes_leave_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    assert in_process(abs, -3) == 3 and "MALLOC_MMAP_THRESHOLD_" not in os.environ
