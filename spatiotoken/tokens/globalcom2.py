"""GlobalCom2: the picture as a whole says how much of each tile stays, and what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import SaliencyReducer
from spatiotoken.tokens.budgets import apportion, group_sums, leading, top_of_groups, whole_share
from spatiotoken.tokens.merging import top_indices, true_indices
from spatiotoken.tokens.views import tile_of_joined, tile_of_whole


def globalcom2_count(num_tokens: int, retention: float) -> int:
    """How many tokens of a video or of the whole view are kept: the truncated share, at least one."""
    return whole_share(num_tokens, retention)


def globalcom2_scales(sums: Tensor, sizes: Tensor, retention: float, temperature: float) -> Tensor:
    """``[G]`` float64 share of each group that is kept: ``retention`` on average, more where more saliency lies.

    Args:
        sums: ``[G]`` float64 saliency of each group.
        sizes: ``[G]`` how many tokens each group has to keep from.
        temperature: of the softmax over ``sums``; the higher, the more alike the shares.
    """
    weights = (sums / temperature).softmax(dim=0)
    # The mean over tokens: groups of unequal sizes must not exceed the budget together.
    return (retention * (1 + weights - (weights * sizes).sum() / sizes.sum())).clamp(max=1)


def globalcom2_quotas(scales: Tensor, sizes: Tensor) -> Tensor:
    """``[G]`` int64: the truncated share of each group; if all are zero, the first of the largest has one token."""
    wanted = sizes * scales
    most = wanted.argmax(0, keepdim=True)
    quotas = (wanted + 1e-9).long()  # a quarter of 144 must not become 35
    return quotas.index_copy(0, most, quotas[most].clamp(min=1))


def globalcom2_guide(saliency: Tensor, side: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """``[H * W]`` saliency of the whole view ``[h * w]``, interpolated to the grid of the joined picture."""
    picture = saliency.float().view(1, 1, *side)
    return torch.nn.functional.interpolate(picture, size=grid, mode="bilinear", align_corners=False).flatten()


def globalcom2_scores(local: Tensor, guide: Tensor, tile: Tensor, tiles: int) -> Tensor:
    """``[N]`` sum of a token's saliency in its tile and in the whole view, each of length 1 over the tile."""
    both = torch.stack([local, guide], dim=1).float()
    lengths = group_sums(both.square(), tile, tiles).sqrt().clamp(min=1e-12)
    return (both / lengths[tile]).sum(dim=1)


class GlobalCom2(SaliencyReducer, method="globalcom2", paper="2501.05179"):
    """The view of the whole picture commands how its tiles are compressed, by attention (arXiv 2501.05179).

    Of a picture seen as a whole and in tiles, ``[N, D]`` tokens each, the whole view keeps its ``int(retention * N)``
    most salient tokens. A tile keeps more or less than ``retention`` of its tokens, by the softmax over tiles of the
    saliency that the whole view gives to each: those with the highest sum of their saliency in the tile and in the
    whole view, interpolated. Tokens stay unchanged, with their positions. Of a video (or a single view), frames take
    the part of the tiles, weighed by their own saliency and ranked by it alone.

    The authors' vectors are reproduced. Differences: where padding leaves tiles of unequal sizes the average share is
    one over tokens, not over tiles, so that the budget holds; and a token of the whole view belongs to the tile whose
    part of the picture it shows, where the authors cut it into equal parts whatever was padded.
    """

    kind: ClassVar[str] = "importance and diversity"
    complexity: ClassVar[str] = "O(TN log TN)"
    fidelity: ClassVar[str] = "authors' vectors"

    retention: Retention = 0.25
    temperature: float = Field(10.0, gt=0, description="of the softmax over tiles; the higher, the more alike")

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        count, frames = globalcom2_count(video.num_tokens, self.retention), video.grid[0]
        if count == video.num_tokens:
            return ReducedTokens.everything(video)
        places = video.tokens_per_frame
        saliency = video.needed("saliency")[-1].unflatten(0, (frames, places))
        sums, sizes = saliency.double().sum(dim=1), torch.full((frames,), places, device=saliency.device)
        weights = globalcom2_scales(sums, sizes, self.retention, self.temperature)
        order = saliency.argsort(dim=1, descending=True, stable=True)
        kept = leading(order, apportion(count, weights, places))
        return ReducedTokens.pruned(video, true_indices(kept.flatten(), count))

    def reduce_views(self, views: Sequence[VideoFeatures]) -> list[ReducedTokens]:
        if len(views) != 2 or self.retention == 1:
            return super().reduce_views(views)
        whole, joined = views
        side, grid, tiles = whole.grid[1:], joined.grid[1:], joined.tiles[0] * joined.tiles[1]
        saliency, local = whole.needed("saliency")[-1], joined.needed("saliency")[-1]
        tile = tile_of_joined(grid, joined.tiles, side, saliency.device)
        sizes = tile.new_zeros(tiles).index_add_(0, tile, torch.ones_like(tile))
        sums = group_sums(saliency.double(), tile_of_whole(side, grid, tile), tiles)
        scales = globalcom2_scales(sums, sizes, self.retention, self.temperature)
        scores = globalcom2_scores(local, globalcom2_guide(saliency, side, grid), tile, tiles)
        kept = top_of_groups(scores, tile, globalcom2_quotas(scales, sizes)).nonzero()[:, 0]
        first = top_indices(saliency, globalcom2_count(whole.num_tokens, self.retention))
        return [ReducedTokens.pruned(whole, first), ReducedTokens.pruned(joined, kept)]
