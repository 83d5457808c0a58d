"""Dividing a budget between frames or tiles, and which of them a token belongs to."""

from __future__ import annotations

import torch
from torch import Tensor


def whole_share(num_tokens: int, retention: float) -> int:
    """The truncated share of ``num_tokens``, at least one token."""
    return max(1, int(num_tokens * retention + 1e-9))  # 0.29 * 100 must not become 28


def apportion(budget: int, weights: Tensor, capacity: int) -> Tensor:
    """``[G]`` int64 quotas in proportion to ``weights [G]``: their sum is ``budget``, none is above ``capacity``.

    By highest averages (Sainte-Laguë): unit after unit goes to whom the fewest were given for its weight, of equals
    the first. What a full one cannot take, the others get.
    """
    claims = weights.double()[:, None] / (torch.arange(capacity, device=weights.device) + 0.5)
    served = claims.flatten().argsort(descending=True, stable=True)[:budget] // capacity
    return torch.zeros_like(weights, dtype=torch.int64).index_add_(0, served, torch.ones_like(served))


def even_quotas(budget: int, scores: Tensor, capacity: int) -> Tensor:
    """``[G]`` quotas that differ by one at most; those of the highest ``scores [G]`` are the larger ones."""
    return apportion(budget, torch.ones_like(scores), capacity)[ranks(scores)]


def ranks(scores: Tensor) -> Tensor:
    """Place of each score in falling order, 0 for the highest; of equals, the first is ahead."""
    return scores.argsort(descending=True, stable=True).argsort()


def first_picks(order: Tensor, quotas: Tensor, places: int, count: int) -> Tensor:
    """``[count]`` rising token indices: of each frame's picks ``order [T, K]``, the first ``quotas [T]`` ones.

    Args:
        places: tokens per frame, among which ``order`` counts.
        count: sum of the quotas, none of which is above ``K``.
    """
    frames, picks = order.shape
    index = order + places * torch.arange(frames, device=order.device)[:, None]
    wanted = torch.arange(picks, device=order.device) < quotas[:, None]
    return index.where(wanted, frames * places).flatten().sort().values[:count]


def top_of_groups(scores: Tensor, group: Tensor, quotas: Tensor) -> Tensor:
    """``[N]`` bool, True at the ``quotas [G]`` highest ``scores [N]`` of each group; ties go to the lowest index.

    Args:
        group: ``[N]`` number of the group that each token belongs to.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    sizes = torch.zeros_like(quotas).index_add_(0, group, torch.ones_like(group))
    ahead = (sizes.cumsum(0) - sizes)[group[order]]
    rank = torch.arange(group.shape[0], device=group.device) - ahead
    return torch.zeros_like(group, dtype=torch.bool).index_put_((order,), rank < quotas[group[order]])


def group_sums(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """``[groups, ...]`` sums of the rows ``values [N, ...]`` of each group.

    A product, since adding by index takes its summands in any order on a GPU. For a handful of groups.
    """
    member = group == torch.arange(groups, device=group.device)[:, None]
    return member.to(values.dtype) @ values


def question_direction(question: Tensor) -> Tensor:
    """``[D]`` float32 unit vector along the mean of ``question [L, D]``; zero for an empty question."""
    return torch.nn.functional.normalize(question.float().sum(dim=0), dim=0)


def tile_of_joined(
    grid: tuple[int, int], tiles: tuple[int, int], side: tuple[int, int], device: torch.device | None = None
) -> Tensor:
    """``[H * W]`` tile, row by row, that each token of a picture joined from tiles comes from.

    Args:
        grid: ``(H, W)`` of the joined picture: the tiles side by side, cut to the picture where they were padded
            (evenly at both ends of one direction), and then perhaps resized as a whole.
        tiles: ``(rows, columns)``.
        side: ``(h, w)`` of one tile.
    """
    canvas = [count * length for count, length in zip(tiles, side, strict=True)]
    scale = min(full / length for full, length in zip(canvas, grid, strict=True))
    row, column = (
        (((torch.arange(length, device=device) + 0.5) * scale + (full - length * scale) / 2) // (full / count)).long()
        for length, full, count in zip(grid, canvas, tiles, strict=True)
    )
    return (row.clamp(max=tiles[0] - 1)[:, None] * tiles[1] + column.clamp(max=tiles[1] - 1)).flatten()


def tile_of_whole(side: tuple[int, int], grid: tuple[int, int], tile: Tensor) -> Tensor:
    """``[h * w]`` tile at the middle of each token of the picture seen as a whole, ``side (h, w)``.

    Both views show the same picture, so a place in one is the same fraction of the way in the other.

    Args:
        grid: ``(H, W)`` of the joined picture.
        tile: ``[H * W]`` as of ``tile_of_joined``.
    """
    row, column = (
        ((torch.arange(small, device=tile.device) + 0.5) * large / small).long()
        for small, large in zip(side, grid, strict=True)
    )
    return tile.view(grid)[row[:, None], column].flatten()
