"""What the words of a prompt think of its visual tokens, and leaving altogether."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spatiotoken.structures import LayerReduction, LayerTokens

ROWS = 32
"""Query rows whose attention is held at a time."""


def weights_of_words(tokens: LayerTokens, entering: bool = False) -> Iterator[Tensor]:
    """``[heads, <= 32, n]`` attention to the visual tokens of all words in their order.

    Args:
        entering: in the layer that is about to be entered, instead of the one before.
    """
    assert tokens.weights is not None
    places = tokens.needed("places")
    for rows in tokens.needed("text").split(ROWS):
        yield tokens.weights(rows, entering).index_select(2, places)


def text_to_visual(tokens: LayerTokens) -> Tensor:
    """``[]`` float32 share of its attention that the question gave the visual tokens in the layer before.

    The mean over heads and over the words after the last visual token; not a number where there are none, since those
    before it cannot see it.
    """
    places, text, asking = tokens.needed("places"), tokens.needed("text"), tokens.needed("asking").float()
    mass = asking.new_zeros(())
    if not text.shape[0]:
        return mass / 0
    for weights, asks in zip(weights_of_words(tokens), asking.split(ROWS), strict=True):
        mass = mass + weights.mean(dim=0).sum(dim=1) @ asks
    return torch.where(text[-1] > places[-1], mass / asking.sum(), torch.nan)


def all_or_nothing(tokens: LayerTokens, leave: bool) -> LayerReduction:
    """No visual token is left, or all are."""
    places = tokens.needed("places")
    return LayerReduction(torch.arange(0 if leave else places.shape[0], device=places.device))
