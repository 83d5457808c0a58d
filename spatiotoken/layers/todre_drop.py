"""ToDRE's second stage: late in the model all visual tokens go, if the text hardly attends to them any more."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.layers.base import LayerReducer
from spatiotoken.layers.depth import LayerPlace, layer_indices
from spatiotoken.structures import LayerReduction, LayerTokens

_ROWS = 32
"""Query rows whose weights are held at a time."""


def text_to_visual(tokens: LayerTokens) -> Tensor:
    """``[]`` float32 share of its attention that the question gave the visual tokens in the layer before.

    The mean over heads and over the words after the last visual token; not a number where there are none, since those
    before it cannot see it.
    """
    assert tokens.weights is not None
    places, text, asking = tokens.needed("places"), tokens.needed("text"), tokens.needed("asking").float()
    mass = asking.new_zeros(())
    if not text.shape[0]:
        return mass / 0
    for rows, weight in zip(text.split(_ROWS), asking.split(_ROWS), strict=True):
        given = tokens.weights(rows, False).float().mean(dim=0).index_select(1, places).sum(dim=1)
        mass = mass + given @ weight
    return torch.where(text[-1] > places[-1], mass / asking.sum(), torch.nan)


def all_or_nothing(tokens: LayerTokens, leave: bool) -> LayerReduction:
    """No visual token is left, or all are."""
    places = tokens.needed("places")
    return LayerReduction(torch.arange(0 if leave else places.shape[0], device=places.device))


class ToDREDrop(LayerReducer, method="todre_drop", paper="2505.18757"):
    """Drop all visual tokens late in the model once the text hardly looks at them (arXiv 2505.18757).

    Before decoder layer ``layer`` the share of attention that the question gave the ``n`` visual tokens in the layer
    before, averaged over heads and words, is compared with ``threshold``: below it none of them is left, else all stay.
    It costs the attention rows of the words and one wait for the device. Which tokens enter the language model at all
    is the work of ``tokens: todre``.

    Written from the paper, since no code is public. The paper asks for the attention of the layer at 7/8 of the depth
    and drops after it; here tokens are dropped before the layer at 7/8, by the attention of the one before. The paper
    also wants the visual tokens' attention to the text below the threshold: of a causal model, that to the words after
    them is 0, so it is not computed. Prompts that end with the pictures keep them. ``threshold: 0`` keeps everything.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"text", "weights"})

    complexity: ClassVar[str] = "O(QLD) for Q words"
    fidelity: ClassVar[str] = "paper only"

    layer: LayerPlace = Field(
        0.875, description="decoder layer before which tokens may be dropped: its index, or a share of the depth"
    )
    threshold: float = Field(
        0.1, ge=0, le=1, description="share of the question's attention below which all visual tokens are dropped"
    )

    def prune_layers(self, depth: int) -> tuple[int, ...]:
        return layer_indices((self.layer,), depth, "layer")

    def reduce(self, tokens: LayerTokens, memory: Any) -> LayerReduction:
        return all_or_nothing(tokens, self.threshold > 0 and bool(text_to_visual(tokens) < self.threshold))
