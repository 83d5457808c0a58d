"""Decoder layers named by their number or as a share of the model's depth, so that one preset fits several models."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

LayerPlace = Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0.0, lt=1.0)]
"""A decoder layer: its index, or (as a fraction) the share of the layers that come before it."""


def layer_index(place: LayerPlace, depth: int, field: str = "layer") -> int:
    """Index of a layer of ``depth``; a share is rounded to the nearest that has some layer before it.

    Raises:
        ValueError: the model is not that deep.
    """
    index = max(1, min(round(place * depth), depth - 1)) if isinstance(place, float) else place
    if index >= depth:
        raise ValueError(f"layers.{field}: {place} is layer {index}, but the model has only {depth} (from 0 on)")
    return index


def layer_indices(places: tuple[LayerPlace, ...], depth: int, field: str = "layers") -> tuple[int, ...]:
    """Strictly rising indices of several layers, none of them before layer 1.

    Shares that fall on one layer of a shallow model take the next ones.

    Raises:
        ValueError: indices do not rise, or the model is too shallow.
    """
    indices: list[int] = []
    for place in places:
        index, least = layer_index(place, depth, field), indices[-1] + 1 if indices else 1
        if isinstance(place, float):
            index = max(index, least)
        if index < least or index >= depth:
            raise ValueError(
                f"layers.{field}: {list(places)} are no rising layers of a model that has {depth} (from 1 on)"
            )
        indices.append(index)
    return tuple(indices)
