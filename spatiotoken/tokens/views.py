"""Which tile of a picture a token belongs to."""

from __future__ import annotations

import torch
from torch import Tensor


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
