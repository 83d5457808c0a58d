"""The benchmark of choosing frames: its file, and that it measures what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from spatiotoken.frame_benchmark import FPS, KEPT, compare_selectors, write_long_video
from spatiotoken.video import load_video


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "short.mp4"
    write_long_video(path, 0.5, height=48, width=64)
    return path


def test_file(short: Path) -> None:
    """Half a minute that drifts, with a cut after 20 seconds."""
    video = load_video(short)
    assert video.metadata.num_frames == 30 * FPS and video.metadata.codec == "h264"
    steps = (video.frames[1:].float() - video.frames[:-1].float()).abs().mean(dim=(1, 2, 3))
    cut = 20 * FPS - 1
    assert steps.argmax() == cut and steps[cut] > 3 * steps.median() > 0


def test_configs_that_cannot_choose(short: Path) -> None:
    for config in ("evs", "aks"):
        with pytest.raises(ValueError, match=f"config '{config}' has no frames method that chooses without a question"):
            compare_selectors([config], short, repeats=1, threads=1)


@pytest.mark.slow
def test_comparison(short: Path) -> None:
    comparison = compare_selectors(["kmeans", "uniform"], short, repeats=1, threads=1)
    assert comparison.candidates == 30 and comparison.candidates_seconds > 0
    for timing, name in zip(comparison.timings, ("kmeans", "uniform"), strict=True):
        assert timing.config == name and timing.frames == KEPT
        assert timing.ratio == pytest.approx(timing.seconds / comparison.candidates_seconds)
        assert timing.peak_memory_bytes > 1e8
    assert comparison.to_dict()["video"]["minutes"] == pytest.approx(0.5)
