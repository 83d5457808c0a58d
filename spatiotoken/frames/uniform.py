"""Frames at equal distances."""

from __future__ import annotations

from typing import ClassVar

from spatiotoken.frames.base import FrameSelector
from spatiotoken.structures import FrameChoice, Frames


def uniform_indices(num_frames: int, count: int) -> tuple[int, ...]:
    """The middles of ``count`` equal parts of ``num_frames``; all frames if there are no more than that."""
    count = min(count, num_frames)
    return tuple((2 * i + 1) * num_frames // (2 * count) for i in range(count))


class Uniform(FrameSelector, method="uniform"):
    """Frames at equal distances: the middle of each of ``num_frames`` equal parts.

    A video with no more frames than that is left whole.
    """

    kind: ClassVar[str] = "equal distances"
    complexity: ClassVar[str] = "O(K)"
    fidelity: ClassVar[str] = "baseline"

    def select(self, frames: Frames) -> FrameChoice:
        return FrameChoice(uniform_indices(frames.num_frames, self.num_frames))
