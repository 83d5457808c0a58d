"""Dividing a budget between frames, tiles or other groups, and taking the best of each."""

from __future__ import annotations

import torch
from torch import Tensor

from spatiotoken.tokens.merging import top_mask


def whole_share(num_tokens: int, retention: float) -> int:
    """The truncated share of ``num_tokens``, at least one token."""
    return max(1, int(num_tokens * retention + 1e-9))  # 0.29 * 100 must not become 28


def apportion(budget: int, weights: Tensor, capacity: int) -> Tensor:
    """``[G]`` int64 quotas in proportion to ``weights [G]``: their sum is ``budget``, none is above ``capacity``.

    By highest averages (Sainte-Laguë): unit after unit goes to whom the fewest were given for its weight, of equals
    the first. What a full one cannot take, the others get.
    """
    claims = weights.double()[:, None] / (torch.arange(capacity, device=weights.device) + 0.5)
    return top_mask(claims.flatten(), budget).unflatten(0, claims.shape).sum(dim=1)


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


def frame_budgets(count: int, frames: int) -> list[int]:
    """``count`` tokens shared between the frames in turn; budgets differ by one at most."""
    return [count * (frame + 1) // frames - count * frame // frames for frame in range(frames)]


def leading(order: Tensor, counts: Tensor) -> Tensor:
    """``[T, N]`` bool, True at the first ``counts[t]`` of the places in ``order[t]`` (``[T, N]``, a permutation)."""
    taken = torch.arange(order.shape[1], device=order.device) < counts[:, None]
    return torch.zeros_like(taken).scatter_(1, order, taken)


def places(mask: Tensor, count: int) -> Tensor:
    """``[count]`` flat indices where ``mask`` is True, ascending; ``count`` is known, so the host need not wait."""
    return mask.flatten().to(torch.uint8).argsort(descending=True, stable=True)[:count]
