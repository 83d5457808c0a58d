"""TS-LLaVA's frames: equal distances from the first to the last, and a picture made of a few."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.frames.base import FrameSelector
from spatiotoken.structures import FrameChoice, Frames


def linspace_indices(total: int, count: int) -> Tensor:
    """``[count]`` indices, rising, at equal distances from the first of ``total`` to the last; one alone is the first.

    Positions are rounded in float32 and halves to the even number, as the authors do. Their rounding can name an index
    twice if there are thousands and nearly all are taken; here the second one is the next index.

    Raises:
        ValueError: ``count`` is not in 1..``total``.
    """
    if not 1 <= count <= total:
        raise ValueError(f"cannot take {count} of {total}: it must be at least one, and no more than there are")
    order = torch.arange(count)
    rounded = torch.linspace(0, total - 1, steps=count).round().long()
    return (rounded - order).cummax(0).values.clamp(max=total - count) + order


def thumbnail_grid(count: int) -> tuple[int, int]:
    """Rows and columns of a full grid of ``count`` pictures: as square as can be, no more columns than rows."""
    columns = max(c for c in range(1, math.isqrt(count) + 1) if count % c == 0)
    return count // columns, columns


def thumbnail(frames: Tensor, side: tuple[int, int]) -> Tensor:
    """``[3, h, w]`` one picture of all ``frames [K, 3, H, W]``, row by row, in their dtype.

    Frames are shrunk by averaging areas, and enlarged bilinearly if they become larger both ways. Where ``side`` cannot
    be divided evenly some are a pixel larger than others; the authors' picture comes out smaller there.

    Args:
        frames: uint8, or floating point in any range.
        side: ``(h, w)``.

    Raises:
        ValueError: no frames, or fewer pixels than rows or columns.
    """
    if frames.ndim != 4 or not frames.shape[0]:
        raise ValueError(f"a thumbnail is made of frames [K, 3, H, W] with K >= 1, got {tuple(frames.shape)}")
    rows, columns = thumbnail_grid(frames.shape[0])
    if side[0] < rows or side[1] < columns:
        raise ValueError(f"a thumbnail of {side[0]}x{side[1]} pixels has no room for {rows}x{columns} frames")
    heights, widths = _parts(side[0], rows), _parts(side[1], columns)
    cells = [_resized(frame, heights[i // columns], widths[i % columns]) for i, frame in enumerate(frames)]
    lines = [torch.cat(cells[start : start + columns], dim=-1) for start in range(0, len(cells), columns)]
    picture = torch.cat(lines, dim=-2)
    return picture.to(frames.dtype) if frames.is_floating_point() else picture.round().clamp(0, 255).to(frames.dtype)


def _parts(size: int, count: int) -> list[int]:
    return [size * (part + 1) // count - size * part // count for part in range(count)]


def _resized(frame: Tensor, height: int, width: int) -> Tensor:
    mode = "area" if height < frame.shape[-2] or width < frame.shape[-1] else "bilinear"
    return torch.nn.functional.interpolate(frame[None].float(), size=(height, width), mode=mode)[0]


class TSLlava(FrameSelector, method="ts_llava", paper="2411.11066"):
    """Frames of TS-LLaVA: at equal distances, the first and the last among them (arXiv 2411.11066).

    The places are ``linspace`` rounded, as the authors choose tokens and the frames of their thumbnail; this and the
    thumbnail are what their vectors hold. Their video loader reads its 50 frames at the middles of equal parts, much as
    ``uniform`` does. A video with no more frames than ``num_frames`` is left whole.

    The method's other parts are ``ts_llava_tokens``, which samples the tokens of these frames, and
    ``prompts.thumbnail_inputs``, which shows the model a ``thumbnail`` of a few besides.
    """

    kind: ClassVar[str] = "equal distances"
    complexity: ClassVar[str] = "O(K)"
    fidelity: ClassVar[str] = "authors' vectors, in part"

    num_frames: int = Field(50, ge=1, description="how many frames are kept at most")

    def select(self, frames: Frames) -> FrameChoice:
        if frames.num_frames <= self.num_frames:
            return FrameChoice.everything(frames)
        return FrameChoice(tuple(linspace_indices(frames.num_frames, self.num_frames).tolist()))
