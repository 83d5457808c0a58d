"""Question-agnostic keyframes by a determinantal point process over frame features."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.frames.base import ScoredSelector
from spatiotoken.frames.determinantal import greedy_determinant
from spatiotoken.structures import FrameChoice, Frames


def dpp_keyframes(features: Tensor, count: int, bandwidth: float) -> tuple[Tensor, Tensor]:
    """``[count]`` indices in the order in which they are chosen, and of each how new it was then, from 0 to 1.

    Args:
        features: ``[T, F]`` with ``T >= count``.
        bandwidth: of the Gaussian kernel, in units of the root mean square distance of two frames.
    """
    # Distances stay the same, but the squares of which they are differences become smaller.
    points = features.double() - features.double().mean(dim=0)
    squares = points.square().sum(dim=1)
    # Two frames are at the squared distance 2 * mean(squares) on average.
    scale = (4 * bandwidth**2 * squares.mean()).clamp(min=torch.finfo(squares.dtype).tiny)

    def similarity(index: Tensor) -> Tensor:
        distance = squares + squares[index, None] - 2 * points[index] @ points.T
        return (-distance.clamp(min=0) / scale).exp()

    order, gains = greedy_determinant(similarity, torch.ones_like(squares)[None], count)
    return order[0], gains[0].exp()


class DPP(ScoredSelector, method="dpp"):
    """Question-agnostic keyframes: the most diverse set, by greedy determinants of a Gaussian kernel.

    The first frame is chosen first, for alone all are equally good; then, one by one, the frame that those already
    chosen explain least. So what shows for a moment only is found although few frames show it. Distances of features
    are all that matters: what never changes in the picture does not count, and neither does the features' scale. Copies
    of chosen frames come last, the earliest first.
    """

    kind: ClassVar[str] = "question-agnostic"
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    complexity: ClassVar[str] = "O(T K F + T K^2)"
    fidelity: ClassVar[str] = "our own method"

    num_frames: int = Field(16, ge=1, description="how many frames are kept at most")
    bandwidth: float = Field(
        1.0, ge=0.01, le=10.0, description="width of the kernel, in root mean square distances of two frames"
    )

    def select(self, frames: Frames) -> FrameChoice:
        if frames.num_frames <= self.num_frames:
            return FrameChoice.everything(frames)
        order, _ = dpp_keyframes(frames.needed("features"), self.num_frames, self.bandwidth)
        return FrameChoice(tuple(sorted(order.tolist())))
