"""FoPru: the most attended tokens, one by one or row by row."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import Attention, SaliencyReducer
from spatiotoken.tokens.budgets import frame_budgets, leading, places
from spatiotoken.tokens.vtc_cls import vtc_cls_count

Granularity = Literal["rank", "row"]


def fopru_count(grid: tuple[int, int, int], retention: float) -> int:
    """How many tokens are kept of a ``(T, H, W)`` grid: the truncated share, at least one."""
    return vtc_cls_count(grid, retention)


def fopru_order(saliency: Tensor, granularity: Granularity) -> Tensor:
    """``[T, H * W]`` places of each frame of ``saliency [T, H, W]``, the most significant first.

    By "row", all tokens of the row with the largest sum come first, the most salient of them leading, then those of
    the next row. Ties go to the lowest index.
    """
    order = saliency.flatten(1).argsort(dim=1, descending=True, stable=True)
    if granularity == "rank":
        return order
    rows = saliency.sum(dim=2).argsort(dim=1, descending=True, stable=True)
    rank = rows.argsort(dim=1).repeat_interleave(saliency.shape[2], dim=1)  # [T, H * W] of the row of each token
    return order.gather(1, rank.gather(1, order).argsort(dim=1, stable=True))


def fopru_selection(saliency: Tensor, granularity: Granularity, count: int) -> Tensor:
    """``[count]`` flat indices, ascending, of the most significant tokens of each frame of ``saliency [T, H, W]``."""
    budgets = torch.tensor(frame_budgets(count, saliency.shape[0]), device=saliency.device)
    return places(leading(fopru_order(saliency, granularity), budgets), count)


class FoPru(SaliencyReducer, method="fopru", paper="2411.14164"):
    """Focal pruning: keep the most attended tokens, or the most attended rows, of each frame (arXiv 2411.14164).

    An image method, applied to every frame: ``int(retention * N)`` of the ``[N, D]`` tokens of the clip are kept,
    unchanged and in order, the same number in every frame but for a remainder of less than one a frame. Where that is
    not a whole number of rows, "row" takes the most salient tokens of the next best row, so that both granularities
    keep equally many.

    Built from the paper: the attention is what a token receives in the layer before the last of those that the
    projector reads, averaged over heads and queries.
    """

    kind: ClassVar[str] = "importance and diversity"
    complexity: ClassVar[str] = "O(TN log N)"
    fidelity: ClassVar[str] = "paper only"

    attention: Attention = Field("received", description="whose attention in the vision tower makes a token salient")
    retention: Retention = 0.25
    granularity: Granularity = Field(
        "rank", description="keep the best tokens of a frame (rank) or its best rows (row)"
    )

    def saliency_layers(self, depth: int) -> tuple[int, ...]:
        return (max(depth - 2, 0),)

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        count = fopru_count(video.grid, self.retention)
        if count == video.num_tokens:
            return ReducedTokens.everything(video)
        saliency = video.needed("saliency")[0].view(video.grid)
        return ReducedTokens.pruned(video, fopru_selection(saliency, self.granularity, count))
