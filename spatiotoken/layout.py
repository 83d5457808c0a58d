"""How features of pictures lie in a prompt, and what became of them: it travels with the features themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ATTRIBUTE = "spatiotoken_layout"
"""Where a feature extractor's output holds its layout: `generate` may encode ahead, and use the output often."""
_NEWLINE = -2


@dataclass(frozen=True)
class Layout:
    """Rows of the features of one kind ("video" or "image"), item by item.

    Attributes:
        bearers: for each row the row of its item that stands for it, -1 where none does; None while all stand for
            themselves.
        coordinates: ``[rows, 4]`` grid, frame, row and column of each row, negative at newlines; None unless asked for.
    """

    bearers: tuple[Tensor, ...] | None = None
    coordinates: tuple[Tensor, ...] | None = None


def at_places(items: tuple[Tensor, ...], places: Tensor) -> list[Tensor]:
    """``items`` in the order in which the tokens that stand for them come.

    Some versions of transformers put a newline after each item only later on (here a row of -2), and beam search
    repeats samples whose pictures were encoded once.

    Args:
        items: ``[rows, ...]`` each.
        places: ``[B, L]`` True at those tokens.

    Raises:
        ValueError: they do not fit.
    """
    counts: list[int] = places.sum(dim=1).tolist()
    rows = sum(map(len, items))
    for newlines in (0, 1):
        times, rest = divmod(sum(counts), rows + newlines * len(items))
        if times and not rest:
            break
    else:
        raise ValueError("the features of the pictures do not fit the prompt: it must come whole, not in chunks")
    if newlines:
        items = tuple(torch.cat([item, torch.full_like(item[:1], _NEWLINE)]) for item in items)
    found: list[Tensor] = []
    first = 0
    for count in counts[::times]:
        own: list[Tensor] = []
        while sum(map(len, own)) < count and first < len(items):
            own.append(items[first])
            first += 1
        if sum(map(len, own)) != count:
            raise ValueError("the features of the pictures do not fit the samples that they are said to belong to")
        found += own * times
    return found


def bearers_at(items: tuple[Tensor, ...], places: Tensor) -> Tensor:
    """``[n]`` which of the ``n`` tokens at ``places`` bears each, -1 where none does; a newline bears itself.

    Raises:
        ValueError: as ``at_places``.
    """
    found, start = [], 0
    for item in at_places(items, places):
        own = torch.arange(len(item), device=item.device)
        bearers = torch.where(item == _NEWLINE, own, item)
        found.append(torch.where(bearers < 0, -1, bearers + start))
        start += len(item)
    return torch.cat(found).to(places.device)


def coordinates_at(layouts: dict[str, Layout], places: dict[str, Tensor]) -> Tensor:
    """``[B, L, 4]`` of each token its grid, and its frame, row and column there; negative at everything else.

    Raises:
        ValueError: as ``at_places``.
    """
    first = next(iter(places.values()))
    found = torch.full((*first.shape, 4), -1, device=first.device)
    for kind, layout in layouts.items():
        if layout.coordinates is not None:
            rows = torch.cat(at_places(layout.coordinates, places[kind])).to(first.device)
            rows[:, 0] += torch.where(rows[:, 0] < 0, 0, found[..., 0].max() + 1)  # each kind counts its grids from 0
            found[places[kind]] = rows
    return found
