"""Contact sheet of chosen frames: their pictures, and where on the timeline they are."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from spatiotoken.video import Selection

_COLUMNS = 8
_GAP = 4
_CAPTION = 14
_TIMELINE = 80
_PAPER, _INK, _FAINT, _MARK = "white", "black", "#b8c4d0", "#d03020"


def contact_sheet(selection: Selection, thumbnails: Tensor) -> Image.Image:
    """Pictures of the chosen frames in order, over a timeline of all candidates.

    The timeline has a bar for each candidate, as high as its score among all (all alike where the method ranks
    nothing), red where the frame was chosen.

    Args:
        thumbnails: uint8 ``[K, 3, h, w]`` of the chosen frames.
    """
    count, _, height, width = thumbnails.shape
    columns = min(_COLUMNS, count)
    rows = math.ceil(count / columns)
    cell = (width + _GAP, height + _CAPTION + _GAP)
    size = (max(columns * cell[0] + _GAP, 480), rows * cell[1] + _TIMELINE + 3 * _GAP + _CAPTION)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    scales = selection.choice.scales or (1.0,) * count
    for number, (position, scale) in enumerate(zip(selection.choice.indices, scales, strict=True)):
        left, top = _GAP + number % columns * cell[0], _GAP + number // columns * cell[1]
        picture = Image.fromarray(thumbnails[number].permute(1, 2, 0).numpy())
        sheet.paste(picture.resize((max(1, int(width * scale)), max(1, int(height * scale)))), (left, top))
        caption = f"{selection.seconds[position]:.1f} s  #{selection.candidates[position]}"
        draw.text((left, top + height), caption, fill=_INK)
    _draw_timeline(draw, selection, (_GAP, rows * cell[1] + _GAP, size[0] - _GAP, size[1] - _CAPTION - _GAP))
    return sheet


def save_sheet(selection: Selection, thumbnails: Tensor, path: Path) -> None:
    """Write ``contact_sheet`` to a picture file, of the format that its name ends with.

    Raises:
        ValueError: no format of that name.
        OSError: it cannot be written.
    """
    contact_sheet(selection, thumbnails).save(path)


def _draw_timeline(draw: ImageDraw.ImageDraw, selection: Selection, box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    heights = _heights(selection)
    length = max(selection.metadata.duration, selection.seconds[-1], 1e-9)
    bar = min(8, max(1, int((right - left) / (2 * len(heights)))))

    def x(second: float) -> int:
        return left + round(second / length * (right - left - bar))

    chosen = set(selection.choice.indices)
    # Chosen ones last, so that no neighbour hides them.
    for position in sorted(range(len(heights)), key=lambda position: position in chosen):
        start = x(selection.seconds[position])
        high = bottom - round(heights[position] * (bottom - top))
        draw.rectangle((start, high, start + bar, bottom), fill=_MARK if position in chosen else _FAINT)
    draw.line((left, bottom, right, bottom), fill=_INK)
    draw.text((left, bottom + 2), "0 s", fill=_INK)
    draw.text((right, bottom + 2), f"{length:.0f} s", fill=_INK, anchor="ra")


def _heights(selection: Selection) -> list[float]:
    """In 0..1 for each candidate."""
    scores = selection.choice.scores
    if scores is None:
        return [1.0] * len(selection.candidates)
    scores = scores.detach().float().cpu()
    low, high = scores.min(), scores.max()
    if low == high:
        return [1.0] * len(scores)
    return torch.lerp(torch.tensor(0.08), torch.tensor(1.0), (scores - low) / (high - low)).tolist()
