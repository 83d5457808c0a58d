"""Where the features of chosen frames stand among those of all frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from spatiotoken.patches.adapter import Item, Part, Segment
from spatiotoken.structures import FrameChoice

Choice = Sequence[tuple[Part, ...]]
"""The parts of each video that are seen."""


@dataclass(frozen=True)
class Placement:
    """How the rows of features of chosen frames, part by part, belong to the rows that all frames would have.

    Attributes:
        place: ``[rows]`` row among all at which each stands.
        bearers: ``[all rows]`` which of the ``rows`` stands for each, -1 where none does.
    """

    place: Tensor
    bearers: Tensor


def parts_of(choice: FrameChoice) -> tuple[Part, ...]:
    """The chosen frames by size, the largest first."""
    scales = choice.scales or (1.0,) * len(choice.indices)
    parts = []
    for scale in sorted(set(scales), reverse=True):
        rows = [row for row, own in enumerate(scales) if own == scale]
        mixing = None if choice.mixing is None else choice.mixing[rows]
        parts.append(Part(tuple(choice.indices[row] for row in rows), scale, mixing))
    return tuple(parts)


def reduced_item(item: Item, parts: Sequence[Part]) -> Item:
    """The rows that the ``parts`` of a video have, one after the other."""
    (segment,) = item.segments
    segments, start = [], 0
    for part in parts:
        grid = part.grid(*segment.grid[1:])
        segments.append(Segment(start, grid, grid[2]))
        start += grid[0] * grid[1] * grid[2]
    return Item(start, tuple(segments))


def placement(items: Sequence[Item], chosen: Choice, trailing: int, device: torch.device) -> Placement:
    """
    Args:
        items: of all frames.
        trailing: rows that follow each item's grid and stay.
    """
    total = sum(item.size + trailing for item in items)
    bearers = torch.full((total,), -1, device=device)
    places, start, count = [], 0, 0
    for item, parts in zip(items, chosen, strict=True):
        (segment,) = item.segments
        grid = start + segment.rows(device).view(segment.grid)
        seen = {unit for part in parts for unit in part.units}
        for part in parts:
            own = part.grid(*segment.grid[1:])
            (rows_from, row_of), (columns_from, column_of) = (
                _centres(full, small, device) for full, small in zip(segment.grid[1:], own[1:], strict=True)
            )
            units = grid[list(part.units)]
            places.append(units[:, rows_from][:, :, columns_from].flatten())
            rows = count + torch.arange(len(places[-1]), device=device).view(own)
            bearers[units] = rows[:, row_of][:, :, column_of]
            if part.mixing is not None:
                # A unit that is seen only as a share of others is borne by that which it is the largest share of.
                share, most = part.mixing.max(dim=0)
                for unit in set(share.nonzero()[:, 0].tolist()) - seen:
                    bearers[grid[unit]] = bearers[units[most[unit]]]
            count += len(places[-1])
        rest = torch.arange(start + item.size, start + item.size + trailing, device=device)
        places.append(rest)
        bearers[rest] = count + torch.arange(trailing, device=device)
        count += trailing
        start += item.size + trailing
    return Placement(torch.cat(places), bearers)


def _centres(full: int, small: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``[small]`` the cell in the middle of each of ``small`` equal parts of ``full`` cells, and ``[full]`` the part
    whose middle is nearest to each cell."""
    sources = (2 * torch.arange(small, device=device) + 1) * full // (2 * small)
    return sources, (torch.arange(full, device=device)[:, None] - sources).abs().argmin(dim=1)


def pooled(values: Tensor, item: Item, parts: Sequence[Part]) -> Tensor:
    """``values [rows, C]`` of a video whose parts were all encoded at full size, averaged to the size of each part."""
    (segment,) = item.segments
    side = segment.grid[1] * segment.grid[2]
    found, start = [], 0
    for part in parts:
        own = part.grid(*segment.grid[1:])
        rows = values[start : start + own[0] * side]
        if own[1:] != segment.grid[1:]:
            maps = rows.float().unflatten(0, (own[0], *segment.grid[1:])).movedim(-1, 1)
            rows = adaptive_avg_pool2d(maps, own[1:]).movedim(1, -1).flatten(0, 2).to(values.dtype)
        found.append(rows)
        start += own[0] * side
    return torch.cat([*found, values[start:]])
