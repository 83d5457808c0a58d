"""Position ids of a shortened sequence: kept, numbered anew, or several for each merged token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

MEMBERS = 4
"""How many members of a merged token lend it their positions."""


def compacted(positions: Tensor, valid: Tensor, kept: Tensor) -> Tensor:
    """``positions [B, L]`` numbered as if the rows that are ``valid`` but not ``kept`` had never been there."""
    return positions - (valid & ~kept).long().cumsum(dim=1)


def member_rows(length: int, places: Tensor, bearers: Tensor) -> Tensor:
    """``[length, MEMBERS]``: rows of a sequence whose positions each row takes, its own where nothing was merged.

    Of more members than fit, those at equal distances in order of place are taken; of fewer, some several times.

    Args:
        places: ``[n]`` rows at which visual tokens stand.
        bearers: ``[n]`` which of those ``n`` stands for each, -1 where none does.
    """
    rows = torch.arange(length, device=places.device)[:, None].repeat(1, MEMBERS)
    count = places.shape[0]
    owner = torch.where(bearers < 0, count, bearers)
    order = owner.argsort(stable=True)
    sizes = torch.zeros(count + 1, dtype=torch.int64, device=places.device)
    sizes.index_add_(0, owner, torch.ones_like(owner))
    first = sizes.cumsum(0) - sizes
    share = (2 * torch.arange(MEMBERS, device=places.device) + 1) * sizes[:count, None] // (2 * MEMBERS)
    # A row that bears nothing is dropped, and keeps its own position for no one to see.
    members = places[order[(first[:count, None] + share).clamp(max=count - 1)]]
    rows[places] = torch.where(sizes[:count, None] > 0, members, places[:, None])
    return rows


def rotary_of_members(
    original: Callable[[Tensor, Tensor], Sequence[Tensor]], hidden: Tensor, positions: Tensor
) -> tuple[Tensor, ...]:
    """Cosines and sines (or whatever ``original`` makes, with channels last) of several positions for each row.

    Frequencies take turns, so each member has its share of the high and of the low ones of each axis.

    Args:
        positions: ``[MEMBERS, axes, B, K]``.
    """
    parts: list[Any] = [original(hidden, part) for part in positions]
    channels = parts[0][0].shape[-1]
    frequency = torch.arange(channels, device=hidden.device) % (channels // 2)
    mixed = []
    for kind in zip(*parts, strict=True):
        result = kind[0]
        for member in range(1, MEMBERS):
            result = torch.where(frequency % MEMBERS == member, kind[member], result)
        mixed.append(result)
    return tuple(mixed)
