"""Maps of a sparse attention method: recall and density by layer and head, and what some heads see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from spatiotoken.attention.recall import HeadRecall

_CELL = 14
_GAP = 12
_CAPTION = 14
_MARGIN = 34  # layer numbers
_MAP = 128
_MAPS = 8
_PAPER, _INK = "white", "black"
_LOW, _HIGH = torch.tensor([246.0, 241.0, 226.0]), torch.tensor([12.0, 52.0, 110.0])


def attention_maps(layers: Sequence[HeadRecall]) -> Image.Image:
    """Two heatmaps of layers (down) by heads (across), over maps of the seen pairs of the worst head of some layers.

    The darker, the more: recall from the lowest there is, in tenths, to 1; density and seen pairs from 0 to 1.
    """
    recall, density = (torch.stack([getattr(one, name) for one in layers]) for name in ("recall", "density"))
    low = math.floor(10 * min(0.9, float(recall.min()))) / 10
    picked = torch.linspace(0, len(layers) - 1, min(_MAPS, len(layers))).round().long().tolist()
    worst = [int(layers[at].recall.argmin()) for at in picked]

    wide, high = _MARGIN + recall.shape[1] * _CELL, len(layers) * _CELL
    columns = min(len(picked), 4)
    rows = -(-len(picked) // columns)
    size = (
        max(2 * (wide + _GAP) + _GAP, columns * (_MAP + _GAP) + _GAP, 480),
        high + 3 * _CAPTION + 3 * _GAP + rows * (_MAP + _CAPTION + _GAP),
    )
    picture = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(picture)
    for left, title, values, floor in (
        (_GAP, f"recall, {low:.1f} to 1", recall, low),
        (_GAP + max(wide + _GAP, size[0] // 2), "density, 0 to 1", density, 0.0),
    ):
        draw.text((left, _GAP), title, fill=_INK)
        shades = (values - floor) / (1 - floor)
        picture.paste(_shaded(shades, (wide - _MARGIN, high)), (left + _MARGIN, _GAP + _CAPTION))
        for number in range(0, len(layers), max(1, len(layers) // 8)):
            draw.text((left, _GAP + _CAPTION + number * _CELL), str(layers[number].layer), fill=_INK)
    top = high + 2 * _GAP + _CAPTION
    draw.text((_GAP, top), "pairs seen (queries down, keys across) by the head of least recall", fill=_INK)
    for number, (at, head) in enumerate(zip(picked, worst, strict=True)):
        x = _GAP + number % columns * (_MAP + _GAP)
        y = top + _CAPTION + number // columns * (_MAP + _CAPTION + _GAP)
        picture.paste(_shaded(layers[at].shares[head], (_MAP, _MAP)), (x, y))
        caption = f"layer {layers[at].layer} head {head}: {layers[at].recall[head]:.2f}"
        draw.text((x, y + _MAP), caption, fill=_INK)
    return picture


def save_attention_maps(layers: Sequence[HeadRecall], path: Path) -> None:
    """Write ``attention_maps`` to a picture file, of the format that its name ends with.

    Raises:
        ValueError: no format of that name.
        OSError: it cannot be written.
    """
    attention_maps(layers).save(path)


def _shaded(values: Tensor, size: tuple[int, int]) -> Image.Image:
    colours = torch.lerp(_LOW, _HIGH, values.clamp(0, 1)[..., None]).round().to(torch.uint8)
    return Image.fromarray(colours.numpy()).resize(size, Image.Resampling.NEAREST)
