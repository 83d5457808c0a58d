"""Frames at a constant rate."""

from __future__ import annotations

import bisect
import math

import pytest
import torch

from spatiotoken.frames.fps import FPS, evenly_spaced, frames_at_rate
from spatiotoken.structures import Frames


def chosen(timestamps: torch.Tensor, **settings: float) -> tuple[int, ...]:
    return FPS(**settings).select(Frames(timestamps)).indices


def test_every_fourth_frame_of_four_a_second() -> None:
    timestamps = torch.arange(64) / 4
    assert chosen(timestamps, rate=1.0) == tuple(range(0, 64, 4))
    assert chosen(timestamps, rate=2.0) == tuple(range(0, 64, 2))
    assert chosen(timestamps, rate=0.1) == (0, 40)
    assert chosen(timestamps, rate=100.0) == tuple(range(64))


def test_frame_that_is_on_screen_at_irregular_gaps() -> None:
    timestamps = torch.tensor([0.0, 0.4, 0.9, 3.5, 3.6, 5.0])
    # At 0 s the first, at 1, 2 and 3 s the third, at 4 s the fifth, at 5 s the last.
    assert chosen(timestamps, rate=1.0) == (0, 2, 4, 5)
    # Frames at 2.5, 2.9, 3.4, 6.0, 6.1 and 7.5 s: the first stands for the seconds before it, the last is not reached.
    assert chosen(timestamps + 2.5, rate=1.0) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("rate", [0.3, 1.0, 7.0, 30.0])
@pytest.mark.parametrize("source", [3.0, 24000 / 1001, 25.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_asking_at_each_time(rate: float, source: float, dtype: torch.dtype) -> None:
    timestamps = (torch.arange(300, dtype=torch.float64) / source).to(dtype)
    late = [time - 0.01 / rate for time in timestamps.tolist()]
    end = timestamps[-1].item() + 1 / source  # the last frame is there for as long as the others
    asked = range(max(1, math.ceil(end * rate - 0.01)))
    expected = {bisect.bisect_right(late, number / rate + 1e-9) - 1 for number in asked}
    assert frames_at_rate(timestamps, rate).tolist() == sorted(expected)


@pytest.mark.parametrize("source", [3, 25, 30])
def test_rounded_timestamps_do_not_lose_or_double_frames(source: int) -> None:
    timestamps = (torch.arange(4000, dtype=torch.float64) / source).float()
    assert frames_at_rate(timestamps, 1.0).tolist() == list(range(0, 4000, source))
    assert frames_at_rate(timestamps, float(source)).tolist() == list(range(4000))


def test_more_frames_than_allowed() -> None:
    assert chosen(torch.arange(100), rate=1.0, num_frames=4) == (0, 33, 66, 99)
    assert chosen(torch.arange(100) / 2, rate=1.0, num_frames=4) == (0, 32, 66, 98)
    assert chosen(torch.arange(100), rate=1.0, num_frames=1) == (0,)


def test_few_frames() -> None:
    assert chosen(torch.tensor([7.25])) == (0,)
    assert chosen(torch.tensor([0.0, 0.2])) == (0,)
    assert chosen(torch.tensor([0.0, 0.2]), rate=5.0) == (0, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 1000])
def test_evenly_spaced(size: int) -> None:
    assert evenly_spaced(size, size + 5) == evenly_spaced(size, size) == list(range(size))
    for count in range(2, min(size, 70)):
        indices = evenly_spaced(size, count)
        steps = [after - before for before, after in zip(indices, indices[1:], strict=False)]
        assert (indices[0], indices[-1], len(indices)) == (0, size - 1, count)
        assert min(steps) >= 1 and max(steps) - min(steps) <= 1
