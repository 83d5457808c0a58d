"""Frames at a constant rate."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.frames.base import FrameSelector
from spatiotoken.structures import FrameChoice, Frames

_LATE = 0.01
"""Share of an interval by which a frame may come late: time stamps are rounded."""


def frames_at_rate(timestamps: Tensor, rate: float) -> Tensor:
    """Indices of the frames that are on screen at the times 0, 1 / rate, 2 / rate and so on.

    Args:
        timestamps: ``[T]`` seconds, rising; a frame is on screen until the next one comes, the first one before its
            time too, and the last one for as long as the median frame.
    """
    times = timestamps.double()
    end = times[-1:] + (times.diff().median() if len(times) > 1 else 0)
    # Number of the first of those times at which each frame is there.
    first = (torch.cat([times, end]) * rate - _LATE).ceil().clamp(min=0)
    first[0] = 0
    first[-1].clamp_(min=1)
    first, following = first[:-1], first[1:]
    return (first < following).nonzero()[:, 0]


def evenly_spaced(size: int, count: int) -> list[int]:
    """``count`` of the numbers below ``size`` at equal distances, with the first and the last; all if not more."""
    if size <= count:
        return list(range(size))
    gaps = max(count - 1, 1)
    return [(2 * i * (size - 1) + gaps) // (2 * gaps) for i in range(count)]


class FPS(FrameSelector, method="fps"):
    """Frames at a constant rate, as the processors of most video models sample them.

    If these are more than ``num_frames``, equal distances among them, with the first and the last. A frame that comes
    less than a hundredth of an interval late counts as on time. Where the model is not told the time, and timestamps
    are frame numbers, ``rate`` is in frames per frame.
    """

    kind: ClassVar[str] = "equal distances"
    complexity: ClassVar[str] = "O(T)"
    fidelity: ClassVar[str] = "baseline"

    num_frames: int = Field(64, ge=1, description="how many frames are kept at most")
    rate: float = Field(1.0, gt=0.0, le=1000.0, description="frames per second")

    def select(self, frames: Frames) -> FrameChoice:
        sampled = frames_at_rate(frames.timestamps, self.rate).tolist()
        return FrameChoice(tuple(sampled[i] for i in evenly_spaced(len(sampled), self.num_frames)))
