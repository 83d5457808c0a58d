"""Bipartite soft matching within a tower, by patches of a frame or by whole frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from spatiotoken.tokens.matching import bipartite_matching, merge_matched
from spatiotoken.vision.base import TowerAttention, TowerMerge, TowerTokens

_COSINES = 1 << 25
"""Cosines of pairs that are held at a time."""


def mean_keys(tokens: TowerTokens) -> Tensor:
    """``[frames, n, d]`` float32 keys of this layer, averaged over heads, of frames that all have as many tokens."""
    attention = cast(TowerAttention, tokens.needed("attention"))
    return attention.key.mean(dim=1, dtype=torch.float32).unflatten(0, (len(tokens.counts), -1))


def steps_left(total: int, kept: int, step: int, steps: int) -> int:
    """How many of ``total`` are left after ``step + 1`` of ``steps`` that each take about as many, down to ``kept``."""
    return total + (step + 1) * (kept - total) // steps


def match_down(
    values: Tensor,
    sizes: Tensor,
    count: int,
    match: Callable[[Tensor, int], tuple[Tensor, Tensor]] = bipartite_matching,
) -> tuple[Tensor, Tensor]:
    """Merge tokens in pairs until ``count`` are left, in several steps where more than half must go.

    Args:
        values: ``[B, n, d]`` float32 what similarity is taken from; between steps those of a merged token are the mean.
        sizes: ``[B, n]`` weights in that mean.
        match: as ``bipartite_matching``.

    Returns:
        ``[B, count]`` the tokens that are left, rising, and ``[B, n]`` which of these stands for each.
    """
    index = owner = torch.arange(values.shape[1], device=values.device).expand(values.shape[:2])
    while True:
        left, places = match(values, values.shape[1] - count)
        index, owner = index.gather(1, left), places.gather(1, owner)
        if left.shape[1] <= count:
            break
        values, sizes = merge_matched(values, sizes, places, left.shape[1])
    survivors, order = index.sort(dim=1)
    return survivors, order.argsort(dim=1).gather(1, owner)


def merge_patches(tokens: TowerTokens, keys: Tensor, count: int) -> TowerMerge:
    """Merge the patches of each frame in pairs, by their ``keys [frames, n, d]``, until ``count`` are left."""
    frames, places, _ = keys.shape
    step = max(1, 4 * _COSINES // places**2)
    sizes = tokens.sizes.view(frames, places)
    parts = [match_down(*part, count) for part in zip(keys.split(step), sizes.split(step), strict=True)]
    survivors, owner = (torch.cat(part) for part in zip(*parts, strict=True))
    frame = torch.arange(frames, device=keys.device)[:, None]
    return TowerMerge(
        (survivors + frame * places).flatten(), (owner + frame * count).flatten(), tokens.sizes, (count,) * frames
    )


def match_frames(frames: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    """Match even frames with the odd ones that most of their patches vote for, and merge the best matched.

    Each patch votes for the frame whose patch at the same place is the most similar, by cosine. Of equal votes, and of
    equal mean cosines over all places, by which matches are ranked, the lowest index goes first.

    Args:
        frames: ``[T, N, d]`` float32.
        reduction: how many frames to merge away; never more than half of them.

    Returns:
        ``[m]`` frames that are left, and ``[T]`` the place in these of the one that each frame goes to.
    """
    total, places, _ = frames.shape
    index = torch.arange(total, device=frames.device)
    reduction = min(reduction, total // 2)
    if reduction <= 0:
        return index, index
    unit = torch.nn.functional.normalize(frames, dim=-1).transpose(0, 1)
    votes = frames.new_zeros((total + 1) // 2, total // 2)
    sums = torch.zeros_like(votes)
    for part in unit.split(max(1, _COSINES // votes.numel())):
        cosines = part[:, ::2] @ part[:, 1::2].mT
        sums += cosines.sum(dim=0)
        chosen = cosines.argmax(dim=-1).T
        votes.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=votes.dtype))
    partner = votes.argmax(dim=1)
    ranked = sums.gather(1, partner[:, None])[:, 0].argsort(descending=True, stable=True)
    merged = ranked[:reduction]
    left = torch.cat([2 * ranked[reduction:], index[1::2]])
    goes = torch.zeros_like(index).scatter_(0, left, index[: left.shape[0]])
    return left, goes.scatter_(0, 2 * merged, total - reduction - total // 2 + partner[merged])


def merge_frames(tokens: TowerTokens, keys: Tensor, count: int) -> TowerMerge:
    """Merge whole frames in pairs, place by place, by their ``keys [frames, n, d]``, until ``count`` are left."""
    frames, places, _ = keys.shape

    def match(values: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
        left, goes = match_frames(values.view(-1, places, keys.shape[2]), reduction)
        return left[None], goes[None]

    sizes = tokens.sizes.view(frames, places)[:, 0]
    survivors, owner = match_down(keys.flatten(1)[None], sizes[None], count, match)
    place = torch.arange(places, device=keys.device)
    rows, owners = ((part.T * places + place).flatten() for part in (survivors, owner))
    return TowerMerge(rows, owners, tokens.sizes, (places,) * count)
