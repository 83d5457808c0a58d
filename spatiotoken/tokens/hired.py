"""HiRED: a budget for each tile by early attention to the whole picture, spent by late attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import SaliencyReducer
from spatiotoken.tokens.budgets import apportion, leading, top_of_groups, whole_share
from spatiotoken.tokens.merging import top_indices, top_mask, true_indices
from spatiotoken.tokens.views import tile_of_joined, tile_of_whole


def hired_count(num_tokens: int, retention: float) -> int:
    """How many tokens of a video or single view are kept: the truncated share, at least one."""
    return whole_share(num_tokens, retention)


def hired_budgets(whole: int, joined: int, retention: float, alpha: float) -> tuple[int, int]:
    """How many of the tokens of the whole picture, and at most how many of those of its tiles, are kept."""
    total = int((whole + joined) * retention)
    first = max(1, min(int(total * alpha), whole))
    return first, max(1, min(total - first, joined))


def hired_seen(saliency: Tensor, alpha: float) -> Tensor:
    """``[N]`` bool, True at the ``int((1 - alpha) * N)`` most salient tokens."""
    return top_mask(saliency, max(1, int(saliency.shape[0] * (1 - alpha))))


def hired_hits(saliency: Tensor, group: Tensor, groups: int, alpha: float) -> Tensor:
    """``[groups]`` float32: how many of the ``int((1 - alpha) * N)`` most salient tokens ``[N]`` are in each group."""
    return saliency.new_zeros(groups).index_add_(0, group, hired_seen(saliency, alpha).to(saliency.dtype))


def hired_quotas(hits: Tensor, sizes: Tensor, budget: int) -> Tensor:
    """``[G]`` int64: truncated parts of the budget in proportion to ``hits [G]``, none above ``sizes [G]``.

    If all were zero, the group with the most hits has one token.
    """
    quotas = torch.minimum((hits / hits.sum() * budget).long(), sizes)
    most = hits.argmax(0, keepdim=True)
    return quotas.index_copy(0, most, quotas[most].clamp(min=1))


class HiRED(SaliencyReducer, method="hired", paper="2408.10945"):
    """Budget per tile of a picture by early attention, kept tokens by late attention (arXiv 2408.10945).

    Of a picture seen as a whole and in tiles, ``int(retention * N)`` of all ``[N, D]`` tokens may stay, unchanged, with
    their positions: ``alpha`` of them in the whole view; the rest is divided between the tiles in proportion to how
    many of the ``1 - alpha`` most salient tokens of the whole view in the tower's first layer lie in each. Tokens are
    those most salient in the layer that the projector reads. A tile that is full, or a truncated part, leaves some of
    the budget unspent; either view keeps at least one token. A video (or a single view) gets the whole budget, divided
    between frames in proportion to how many of the ``1 - alpha`` of its tokens that are most salient in the late layer
    lie in each.

    The authors cut the whole view's tokens, in order, into as many runs as there are tiles, which crosses the tiles
    wherever there are several columns; here they are cut in two directions. For tiles in one column both agree, and
    their results are reproduced; else only the parts of the budget differ. They also count padding, which is cut off
    here before the budget is made.
    """

    kind: ClassVar[str] = "importance and diversity"
    complexity: ClassVar[str] = "O(TN log TN)"
    fidelity: ClassVar[str] = "authors' vectors, in part"

    retention: Retention = 0.2
    alpha: float = Field(0.5, ge=0, lt=1, description="share of the budget that goes to the picture as a whole")

    def saliency_layers(self, depth: int) -> tuple[int, ...]:
        return (0, depth - 1)

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        count, frames = hired_count(video.num_tokens, self.retention), video.grid[0]
        if count == video.num_tokens:
            return ReducedTokens.everything(video)
        late = video.needed("saliency")[-1]
        hits = hired_seen(late, self.alpha).unflatten(0, (frames, -1)).sum(dim=1)
        quotas = apportion(count, hits, video.tokens_per_frame)
        order = late.unflatten(0, (frames, -1)).argsort(dim=1, descending=True, stable=True)
        return ReducedTokens.pruned(video, true_indices(leading(order, quotas).flatten(), count))

    def reduce_views(self, views: Sequence[VideoFeatures]) -> list[ReducedTokens]:
        if len(views) != 2 or self.retention == 1:
            return super().reduce_views(views)
        whole, joined = views
        side, grid = whole.grid[1:], joined.grid[1:]
        first, rest = hired_budgets(whole.num_tokens, joined.num_tokens, self.retention, self.alpha)
        early, late = whole.needed("saliency")[0], whole.needed("saliency")[-1]
        tile = tile_of_joined(grid, joined.tiles, side, late.device)
        tiles = joined.tiles[0] * joined.tiles[1]
        sizes = tile.new_zeros(tiles).index_add_(0, tile, torch.ones_like(tile))
        quotas = hired_quotas(hired_hits(early, tile_of_whole(side, grid, tile), tiles, self.alpha), sizes, rest)
        kept = top_of_groups(joined.needed("saliency")[-1], tile, quotas).nonzero()[:, 0]
        return [ReducedTokens.pruned(whole, top_indices(late, first)), ReducedTokens.pruned(joined, kept)]
