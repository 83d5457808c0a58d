"""The quadtree of STTM: each frame's tokens as few regions, a region left whole if it is like each of its parts."""

from __future__ import annotations

import torch
from torch import Tensor

_FRAMES = 2
"""Frames whose products of regions and parts are held at once."""


def sttm_levels(height: int, width: int, root_level: int) -> list[tuple[int, int]]:
    """``(h, w)`` of each level of the tree, the roots first, the tokens last.

    Sides are halved, rounding up, until one of them is 2: that level is number 0, and ``root_level`` counts from
    there. A grid with fewer levels has its tokens as roots.
    """
    levels = [(height, width)]
    while min(levels[0]) > 2:
        levels.insert(0, ((levels[0][0] + 1) // 2, (levels[0][1] + 1) // 2))
    return levels[min(root_level, len(levels) - 1) :]


def _blocks(values: Tensor) -> Tensor:
    """``[T, h, w, ...]`` split in 2x2 blocks ``[T, ceil(h/2), 2, ceil(w/2), 2, ...]``; the first row and column of an
    odd side stand alone, twice in their blocks."""
    if values.shape[1] % 2:
        values = torch.cat([values[:, :1], values], dim=1)
    if values.shape[2] % 2:
        values = torch.cat([values[:, :, :1], values], dim=2)
    return values.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))


def _means(values: Tensor) -> Tensor:
    """``[T, ceil(h/2), ceil(w/2), D]`` means of the blocks of ``[T, h, w, D]``."""
    odd = (values.shape[1] % 2, values.shape[2] % 2)
    pooled = torch.nn.functional.avg_pool2d(values.permute(0, 3, 1, 2), 2, padding=odd, count_include_pad=False)
    return pooled.permute(0, 2, 3, 1)


def _cosines(dots: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Of inner products and lengths; 0 beside a zero vector."""
    return dots / (first * second).clamp(min=1e-16)


def _to_children(values: Tensor, height: int, width: int) -> Tensor:
    """``[T, height, width, ...]``: at each child what ``values [T, h, w, ...]`` has at its parent."""
    row, column = ((torch.arange(side, device=values.device) + side % 2) // 2 for side in (height, width))
    return values[:, row[:, None], column]


def sttm_spatial(
    hidden: Tensor, threshold: float, *, root_level: int = 1, reference: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge each frame's tokens by its quadtree: a region is left whole if it is like each of its parts.

    Args:
        hidden: ``[T, H, W, D]``.
        threshold: cosine from which a part is like its region.
        root_level: level of the largest regions, see ``sttm_levels``.
        reference: as in the authors' code, a region at the border of an odd grid, which has fewer than four parts, is
            also compared with the upper left cell of the level of its parts. False: with its parts only.

    Returns:
        float32 ``nodes [M, D]``; ``source [M]``, rising, the upper left token of each; ``assignment [T * H * W]``, the
        node that each token is part of.
    """
    frames, height, width = hidden.shape[:3]
    sizes = sttm_levels(height, width, root_level)
    levels: list[Tensor] = [hidden.float()]
    for _ in sizes[1:]:
        levels.insert(0, _means(levels[0]))
    lengths = [torch.linalg.vector_norm(level, dim=3) for level in levels]

    device = hidden.device
    time = torch.arange(frames, device=device)[:, None, None]
    inside = torch.zeros(frames, *sizes[0], dtype=torch.bool, device=device)  # belongs to a larger node
    # Of each cell: the node that it is part of, as a row of all levels one after the other.
    owner = torch.zeros(frames, *sizes[0], dtype=torch.int64, device=device)
    first = 0
    for level, (h, w) in enumerate(sizes):
        cells = torch.arange(h * w, device=device).view(h, w) + time * h * w + first
        owner = torch.where(inside, owner, cells)
        first += frames * h * w
        if level + 1 == len(sizes):
            break
        below = sizes[level + 1]
        length = lengths[level]
        pairs = zip(levels[level].split(_FRAMES), levels[level + 1].split(_FRAMES), strict=True)
        dots = torch.cat([(whole[:, :, None, :, None] * _blocks(parts)).sum(dim=5) for whole, parts in pairs])
        alike = _cosines(dots, length[:, :, None, :, None], _blocks(lengths[level + 1])).amin(dim=(2, 4))
        if reference and (below[0] % 2 or below[1] % 2):
            dots = (levels[level + 1][:, 0, :1] @ levels[level].flatten(1, 2).mT).view_as(length)
            corner = _cosines(dots, length, lengths[level + 1][:, :1, :1])
            if below[0] % 2:
                alike[:, 0] = torch.minimum(alike[:, 0], corner[:, 0])
            if below[1] % 2:
                alike[:, :, 0] = torch.minimum(alike[:, :, 0], corner[:, :, 0])
        inside = _to_children(inside | (alike >= threshold), *below)
        owner = _to_children(owner, *below)

    flat = owner.flatten()
    index = torch.arange(flat.shape[0], device=device)
    # The lowest token of a node in reading order is its upper left one.
    corner_of = index.new_full((first,), flat.shape[0]).scatter_reduce(0, flat, index, "amin")[flat]
    source = (corner_of == index).nonzero()[:, 0]
    number = torch.zeros_like(index).index_copy_(0, source, torch.arange(source.shape[0], device=device))
    nodes = levels[-1].new_empty(source.shape[0], hidden.shape[3])
    row = flat[source]
    for values in (level.flatten(0, 2) for level in levels):
        place = ((row >= 0) & (row < values.shape[0])).nonzero()[:, 0]
        nodes.index_copy_(0, place, values.index_select(0, row[place]))
        row = row - values.shape[0]
    return nodes, source, number[corner_of]
