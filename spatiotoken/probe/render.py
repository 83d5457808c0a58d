"""Pictures of scenes. Integer arithmetic throughout, so that the pixels are the same everywhere."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from spatiotoken.probe.draws import Draws
from spatiotoken.probe.scenes import DOT_SIDE, LETTER_HEIGHT, LETTER_WIDTH, MAX_OBJECTS, SHAPES, SIDE, Scenes

_PALETTE = (  # of the colours, then of grey
    (222, 45, 38),
    (45, 180, 60),
    (50, 80, 225),
    (240, 215, 50),
    (165, 60, 195),
    (45, 210, 220),
    (175, 175, 175),
)
_PATTERNS = {  # 5 x 7 pixels, each drawn as 2 x 2
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "O": "01110 10001 10001 10001 10001 10001 01110",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "X": "10001 10001 01010 00100 01010 10001 10001",
    "Z": "11111 00001 00010 00100 01000 10000 11111",
}
_REACH = 10  # pixels from an object's centre to the edge of its stencil
_FINE = 4  # subpixels across a pixel of a stencil
_WORLD = 96  # side of a background, of which a panning camera sees SIDE at a time
_KNOTS = 7  # random values across a background, with linear ones between
_NOISE = 1 << 16


def render(scenes: Scenes) -> Tensor:
    """uint8 ``[B, T, 3, SIDE, SIDE]``."""
    draws = Draws(scenes.seed, scenes.samples)
    canvas = _backgrounds(scenes, draws)
    stencils = _stencils(scenes.samples.device)
    palette = torch.tensor(_PALETTE, dtype=torch.int16, device=scenes.samples.device)
    visible = scenes.visible()
    for slot in (MAX_OBJECTS, *range(MAX_OBJECTS)):  # the distractor behind all others
        alpha = stencils[scenes.shape[:, slot], scenes.radius[:, slot]]
        alpha = alpha[:, None] * visible[:, slot, :, None, None]
        _paste(canvas, scenes.centre[:, slot] - _REACH, alpha, palette[scenes.colour[:, slot]])
    _paste_dot(canvas, scenes, palette)
    _paste_letter(canvas, scenes)
    return (canvas + _noise(scenes, draws)).clamp(0, 255).to(torch.uint8)


def _paste(canvas: Tensor, at: Tensor, alpha: Tensor, colour: Tensor) -> None:
    """Blend a colour into the canvas ``[B, T, 3, SIDE, SIDE]``, in place.

    Args:
        at: ``[B, T, 2]`` upper left corners; what lies outside the canvas must be transparent.
        alpha: ``[B, T, h, w]`` int16 from 0 to 16.
        colour: ``[B, 3]`` int16, or ``[B, 3, h, w]``.
    """
    batch, frames, height, width = alpha.shape
    rows = (at[..., 0, None] + torch.arange(height, device=at.device)).clamp(0, SIDE - 1)
    columns = (at[..., 1, None] + torch.arange(width, device=at.device)).clamp(0, SIDE - 1)
    pixels = (rows[..., :, None] * SIDE + columns[..., None, :]).view(batch, frames, 1, height * width)
    flat = canvas.view(batch, frames, 3, SIDE * SIDE)
    # Several stencil pixels may be clamped to one canvas pixel, so only changes are added: those outside are zero.
    seen = flat.gather(3, pixels.expand(-1, -1, 3, -1))
    paint = colour.view(batch, 1, 3, -1)
    change = (paint - seen) * alpha.view(batch, frames, 1, height * width)
    flat.scatter_add_(3, pixels.expand(-1, -1, 3, -1), change >> 4)


@lru_cache(maxsize=4)
def _stencils(device: torch.device) -> Tensor:
    """int16 ``[shapes, radii, 2 * _REACH + 1, 2 * _REACH + 1]``: how many of a pixel's 16 subpixels a shape fills."""
    across = (2 * _REACH + 1) * _FINE
    axis = torch.arange(across, device=device) * 2 + 1 - across  # in half subpixels from the centre
    y, x = axis[:, None], axis[None, :]
    banks = []
    for radius in range(_REACH):
        r = (2 * radius + 1) * _FINE  # likewise
        inside = (x.abs() <= r) & (y.abs() <= r)
        square_distance = x * x + y * y
        disc = square_distance <= r * r
        drawn = {
            "circle": disc,
            "square": inside & (x.abs() * 8 <= r * 7) & (y.abs() * 8 <= r * 7),
            "triangle": inside & (2 * x.abs() <= y + r),
            "cross": inside & ((3 * x.abs() <= r) | (3 * y.abs() <= r)),
            "ring": disc & (square_distance * 4 >= r * r),
            # An astroid-like star: its sides curve in to the centre.
            "star": inside & ((x.abs() + r // 5) * (y.abs() + r // 5) * 5 <= r * r + r * r // 4),
        }
        masks = torch.stack([drawn[name].expand(across, across) for name in SHAPES]).to(torch.int16)
        side = 2 * _REACH + 1
        banks.append(masks.view(len(SHAPES), side, _FINE, side, _FINE).sum(dim=(2, 4)).to(torch.int16))
    return torch.stack(banks, dim=1)


def _paste_dot(canvas: Tensor, scenes: Scenes, palette: Tensor) -> None:
    """A small square in a white rim of one pixel."""
    batch, frames = canvas.shape[:2]
    time = torch.arange(frames, device=canvas.device)
    shown = (scenes.dot_start[:, None] <= time) & (time < scenes.dot_end[:, None])
    picture = palette.new_full((batch, 3, DOT_SIDE, DOT_SIDE), 250)
    picture[:, :, 1:-1, 1:-1] = palette[scenes.dot_colour][:, :, None, None]
    alpha = (16 * shown.to(torch.int16))[:, :, None, None].expand(-1, -1, DOT_SIDE, DOT_SIDE)
    _paste(canvas, scenes.dot_at[:, None].expand(-1, frames, -1), alpha.contiguous(), picture)


def _paste_letter(canvas: Tensor, scenes: Scenes) -> None:
    """A black letter on a white plate."""
    batch, frames = canvas.shape[:2]
    rows = [[[int(pixel) for pixel in row] for row in pattern.split()] for pattern in _PATTERNS.values()]
    ink = torch.tensor(rows, dtype=torch.int16, device=canvas.device)
    ink = ink.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    plates = ink.new_full((len(rows), LETTER_HEIGHT, LETTER_WIDTH), 250)
    plates[:, 2:-2, 2:-2] -= 240 * ink
    shown = scenes.letter_frame[:, None] == torch.arange(frames, device=canvas.device)
    alpha = (16 * shown.to(torch.int16))[:, :, None, None].expand(-1, -1, LETTER_HEIGHT, LETTER_WIDTH)
    picture = plates[scenes.letter][:, None].expand(-1, 3, -1, -1).contiguous()
    _paste(canvas, scenes.letter_at[:, None].expand(-1, frames, -1), alpha.contiguous(), picture)


def _backgrounds(scenes: Scenes, draws: Draws) -> Tensor:
    """int16 ``[B, T, 3, SIDE, SIDE]``: dull clouds with stripes, others after a cut, seen by a camera that may pan."""
    batch, frames, device = len(scenes), scenes.num_frames, scenes.samples.device
    base = draws.integers("base", 60, 150, 2, 1) + draws.integers("tint", -14, 15, 2, 3)
    knots = draws.integers("clouds", -32, 33, 2, 1, _KNOTS, _KNOTS) + draws.integers(
        "colour clouds", -8, 9, 2, 3, _KNOTS, _KNOTS
    )
    knots = knots.to(torch.int16)  # enough for all sums below, and quicker
    step = _WORLD // (_KNOTS - 1)
    place = torch.arange(_WORLD, device=device)
    cell, part = place // step, place % step

    def between(values: Tensor, dim: int) -> Tensor:
        shape = [1] * values.ndim
        shape[dim] = _WORLD
        low, high = values.index_select(dim, cell), values.index_select(dim, cell + 1)
        weight = part.to(torch.int16).view(shape)
        return low * (step - weight) + high * weight

    clouds = between(between(knots, 3), 4) // (step * step)
    slope = draws.integers("stripe slope", -3, 4, 2, 2)
    phase = slope[..., 0, None, None] * place[:, None] + slope[..., 1, None, None] * place
    stripes = ((phase // 8) % 2) * draws.integers("stripe depth", 0, 19, 2)[..., None, None]
    worlds = clouds + base.to(torch.int16)[..., None, None] + stripes.to(torch.int16)[:, :, None]

    time = torch.arange(frames, device=device)
    second = (time >= scenes.cut[:, None]).long()
    offset = (_WORLD - SIDE) // 2 + scenes.pan[:, None] * (2 * time[:, None] - frames + 1) // (4 * (frames - 1))
    rows = offset[..., 0, None] + torch.arange(SIDE, device=device)  # [B, T, SIDE]
    columns = offset[..., 1, None] + torch.arange(SIDE, device=device)
    sample = torch.arange(batch, device=device)[:, None, None, None, None]
    channel = torch.arange(3, device=device)[:, None, None]
    return worlds[
        sample, second[:, :, None, None, None], channel, rows[:, :, None, :, None], columns[:, :, None, None, :]
    ]


def _noise(scenes: Scenes, draws: Draws) -> Tensor:
    """int16 like the canvas. Each frame takes a random stretch of one long random strip, doubled in some videos."""
    device = scenes.samples.device
    pixels = 3 * SIDE * SIDE
    values = _noise_strip(scenes.seed, device)
    begin = draws.integers("noise from", 0, _NOISE, scenes.num_frames)
    taken = values.unfold(0, pixels, 1)[begin]
    strength = draws.integers("noise strength", 1, 3).to(torch.int16)
    return taken.view(*begin.shape, 3, SIDE, SIDE) * strength[:, None, None, None, None]


@lru_cache(maxsize=4)
def _noise_strip(seed: int, device: torch.device) -> Tensor:
    draws = Draws(seed, torch.zeros(1, dtype=torch.int64, device=device))
    return draws.integers("noise", -5, 6, _NOISE + 3 * SIDE * SIDE)[0].to(torch.int16)
