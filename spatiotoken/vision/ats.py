"""ATS: patches are sampled at even distances of their cumulated significance, so that as many stay as are needed."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.tokens.budgets import whole_share
from spatiotoken.vision.base import TowerAttention, TowerMerge, TowerReducer, TowerShape, TowerTokens
from spatiotoken.vision.pruning import DepthShare, graphs, nearest_layers, pruned, vote

_UNITS = 1 << 50
"""Of a frame's significance: whole numbers, whose sums are the same in any order."""


def significance(attention: TowerAttention, rows: Tensor, real: Tensor) -> Tensor:
    """``[frames, n]`` float32 attention that patches get, summed over heads, times the norm of their values.

    From the CLS token; in towers without one, from all patches of the frame.

    Args:
        rows, real: as ``TowerTokens.rows_by_frame`` gives them.
    """
    heads, key = attention.key.shape[1], graphs(attention.key[rows])
    if attention.cls_query is None:
        query, signal = graphs(attention.query[rows]), real / real.sum(dim=1, keepdim=True)
    else:
        query, signal = attention.cls_query.flatten(0, 1)[:, None], real.new_ones(len(real), 1, dtype=torch.float32)
    signal, seen = (values.repeat_interleave(heads, dim=0) for values in (signal, real))
    got = vote(query, key, attention.scale, signal, real=seen).unflatten(0, (-1, heads)).sum(dim=1)
    return got * attention.value.float().flatten(1).norm(dim=1)[rows]


def sampled(scores: Tensor, real: Tensor, count: int) -> Tensor:
    """``[frames, n]`` bool, True at the patches nearest to ``count`` points of the cumulated ``scores [frames, n]``.

    Scores are cumulated from the lowest. The points are at even distances, from where the second lowest ends to the
    end; several may fall on one patch. Some patch of each frame is always sampled.

    Args:
        real: ``[frames, n]`` bool, what there is of each frame, at its start.
    """
    scores = scores.nan_to_num(0.0).masked_fill(~real, 0.0)
    share = scores.double() / scores.double().sum(dim=1, keepdim=True).clamp(min=1e-300)
    order = scores.masked_fill(~real, -1.0).argsort(dim=1, stable=True)
    total = (share * _UNITS).round().long().gather(1, order).cumsum(dim=1)
    lowest = (~real).sum(dim=1, keepdim=True)
    total = (total - total.gather(1, lowest)).clamp(min=0)
    end = total[:, -1:]
    start = torch.where(total > 0, total, end).amin(dim=1, keepdim=True)
    total, start, end = (values.double() for values in (total, start, end))
    points = end - (end - start) * torch.arange(count - 1, -1, -1, device=scores.device) / max(1, count - 1)
    above = torch.searchsorted(total, points).clamp(max=scores.shape[1] - 1)
    below = (above - 1).clamp(min=0)
    nearer = points - total.gather(1, below) <= total.gather(1, above) - points
    place = torch.where(nearer, below, above).maximum(lowest)
    return torch.zeros_like(real).scatter_(1, order.gather(1, place), True)


class ATS(TowerReducer, method="ats", paper="2111.15667"):
    """Samples patches by the attention that they get and the norm of their values (ATS, arXiv 2111.15667).

    Significance of a frame's patches, attention of the CLS token (in towers without one, of all patches) summed over
    heads times the norm of the value, is sorted and cumulated; ``int(retention * N)`` points, at least one, at even
    distances of that curve each take the patch nearest to them. Where a few patches matter most, many points fall on
    these, so that fewer patches are left, as many as the frame asks for; more than the number of points never. This is
    done between attention and MLP of the layers nearest to ``at`` that attend to whole frames, with the same number of
    points each time. The most similar patch of its frame that is left, by key (mean over heads), stands for each that
    goes. The host waits for the device once in each of these layers, to learn how many are left.

    Points are those of the released code, on the sorted curve from its first step to its end. It samples in every layer
    from the fourth of twelve on, with as many points as there are patches at first. Each layer costs a wait, and
    without CLS tokens its weights, so three layers are the default here, as is half of the points; ``retention`` 1,
    with which theirs still leaves out some patches, keeps everything. Weights are those over patches only, as there are
    no keys of CLS tokens. They drop rows of the attention matrix, we the patches behind it, which is the same.
    """

    kind: ClassVar[str] = "pruning"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    complexity: ClassVar[str] = "O(TN^2 D) per layer, a head's part of it with CLS tokens"
    fidelity: ClassVar[str] = "authors' code, by an independent rewrite"

    retention: Retention = 0.5
    at: tuple[DepthShare, ...] = Field(
        (0.25, 0.5, 0.75), min_length=1, description="shares of the depth at which patches are sampled"
    )

    def layers(self, tower: TowerShape) -> tuple[int, ...]:
        return () if self.retention == 1 else nearest_layers(self.at, tower.whole_frames, tower.depth)

    def reduce(self, tokens: TowerTokens) -> TowerMerge | None:
        rows, real = tokens.rows_by_frame()
        attention = cast(TowerAttention, tokens.needed("attention"))
        points = whole_share(tokens.grid[1] * tokens.grid[2], self.retention)
        kept = sampled(significance(attention, rows, real), real, points)
        counts = tuple(kept.sum(dim=1).tolist())
        if counts == tokens.counts:
            return None
        keys = attention.key.mean(dim=1, dtype=torch.float32)
        return pruned(tokens, keys[rows], kept, counts, real)
