"""Decoder layers named by their number or as a share of the model's depth, so that one preset fits several models."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

LayerPlace = Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0.0, lt=1.0)]
"""A decoder layer: its index, or (as a fraction) the share of the layers that come before it."""


def layer_index(place: LayerPlace, depth: int, field: str = "layer") -> int:
    """Index of a layer of ``depth``; a share is rounded to the nearest, half down to the even one.

    Raises:
        ValueError: the model is not that deep.
    """
    index = round(place * depth) if isinstance(place, float) else place
    if index >= depth:
        raise ValueError(f"layers.{field}: {place} is layer {index}, but the model has only {depth} (from 0 on)")
    return index


def layer_indices(places: tuple[LayerPlace, ...], depth: int, field: str = "at") -> tuple[int, ...]:
    """Strictly rising indices of several layers, none of them before layer 1.

    Raises:
        ValueError: they do not rise, or the model is too shallow to tell them apart.
    """
    indices = tuple(layer_index(place, depth, field) for place in places)
    if any(a >= b for a, b in zip((0, *indices), indices, strict=False)):
        raise ValueError(f"layers.{field}: {list(places)} are layers {list(indices)} of {depth}: they must rise from 1")
    return indices
