"""VTC-CLS: the tokens with the most attention, summed over the last part of the vision tower."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import SaliencyReducer
from spatiotoken.tokens.budgets import frame_budgets, leading, places


def vtc_cls_count(grid: tuple[int, int, int], retention: float) -> int:
    """How many tokens are kept of a ``(T, H, W)`` grid: the truncated share, at least one."""
    frames, height, width = grid
    return max(1, int(frames * height * width * retention + 1e-9))


def vtc_cls_selection(saliency: Tensor, count: int) -> Tensor:
    """``[count]`` flat indices, ascending, of the most salient tokens of each frame of ``saliency [T, N]``.

    Ties go to the lowest index.
    """
    budgets = torch.tensor(frame_budgets(count, saliency.shape[0]), device=saliency.device)
    return places(leading(saliency.argsort(dim=1, descending=True, stable=True), budgets), count)


class VtcCls(SaliencyReducer, method="vtc_cls", paper="2412.05819"):
    """Keep the tokens with the most attention, summed over the tower's later layers (arXiv 2412.05819).

    An image method, applied to every frame: ``int(retention * N)`` of the ``[N, D]`` tokens of the clip are kept,
    unchanged, the same number in every frame but for a remainder of less than one a frame (the authors give a number
    of tokens per image). Importance is the plain sum over layers of the head mean of the attention that a token
    receives.

    The authors sum from a layer given on their command line, without a default, to the one that the projector reads,
    and renumber positions; here the first layer is ``start`` of that depth and positions are kept.
    """

    kind: ClassVar[str] = "importance and diversity"
    complexity: ClassVar[str] = "O(TN log N)"
    fidelity: ClassVar[str] = "paper only"

    retention: Retention = 0.25
    start: float = Field(0.5, ge=0, lt=1, description="share of the tower's depth at which the sum of layers begins")

    def saliency_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(min(int(depth * self.start), depth - 1), depth))

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        count = vtc_cls_count(video.grid, self.retention)
        if count == video.num_tokens:
            return ReducedTokens.everything(video)
        saliency = video.needed("saliency").sum(dim=0).view(video.grid[0], -1)
        return ReducedTokens.pruned(video, vtc_cls_selection(saliency, count))
