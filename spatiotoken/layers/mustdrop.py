"""MustDrop: drop what neither all words together nor any one of them looks at."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.layers.base import LayerReducer
from spatiotoken.layers.depth import LayerPlace, layer_indices
from spatiotoken.layers.words import ROWS, weights_of_words
from spatiotoken.structures import LayerReduction, LayerTokens
from spatiotoken.tokens.merging import top_mask


def mustdrop_scores(weights: Iterable[Tensor], asking: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """``[n]`` sum and ``[n]`` maximum, over the words that ask, of the head-mean attention that each token gets.

    Args:
        weights: ``[heads, R, n]`` each.
        asking: ``[R]`` bool each.
    """
    given = [rows.mean(dim=0) * asks[:, None] for rows, asks in zip(weights, asking, strict=True)]
    peaks = torch.stack([rows.amax(dim=0) for rows in given])
    return torch.stack([rows.sum(dim=0) for rows in given]).sum(dim=0), peaks.amax(dim=0)


def mustdrop_mask(total: Tensor, peak: Tensor, key: Tensor, overall: float, individual: float) -> Tensor:
    """``[n]`` bool: which tokens stay.

    Args:
        total: ``[n]``; those below the share ``overall`` of its sum may go.
        peak: ``[n]``; but only where this is below ``individual``.
        key: ``[n]`` bool: those that stay whatever they get.
    """
    return key | (total >= overall * total.sum()) | (peak >= individual)


class MustDrop(LayerReducer, method="mustdrop", paper="2411.10803"):
    """Drops what the words together hardly look at, unless a single one does (arXiv 2411.10803).

    Before each of ``layers``, a token goes if the head-mean attention of the layer before that the words after the
    pictures gave it is below ``overall`` as a sum, as a share of that of all tokens, and below ``individual`` for each
    single word. Both are in units of ``1 / num_initial``, so that they suit other numbers of tokens: 0.576 is the
    authors' 0.001 on their 576 tokens (192 kept); 6.336 and 5.76 are their setting for 64. Words do not count where
    they come before the pictures, unless all do.

    The tower's part of the method, merging windows in its first layer, is left out. The authors' key tokens, which
    are never dropped, are those the tower's CLS token attends to most. That is not known here: ours are the
    ``key_share`` that the words attend to most at the first of the layers. After the prefill, the cache of all earlier
    layers is cut to the tokens that are left (``trim``; theirs: from layer 2 on), so answers differ from those of a
    recomputation without a cache. They prune after layers 2, 6, 10, 14 of 32, thus before 3, 7, 11, 15, and renumber
    positions.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"text", "places", "weights"})

    complexity: ClassVar[str] = "O(tLD) with t words"
    fidelity: ClassVar[str] = "paper only"

    layers: tuple[LayerPlace, ...] = Field(
        (0.09375, 0.21875, 0.34375, 0.46875),
        min_length=1,
        description="decoder layers before which tokens are dropped: indices or shares of the depth",
    )
    overall: float = Field(0.576, ge=0, description="attention of all words from which a token stays, 1 the average")
    individual: float = Field(
        0.576, ge=0, description="attention of one word from which a token stays, times the number of tokens"
    )
    key_share: float = Field(0.08, ge=0, le=1, description="share of the tokens that is never dropped; one at least")

    trim: bool = Field(True, description="cut the cache of earlier layers too, after the prefill, as the authors do")

    def trims_cache(self) -> bool:
        return self.trim

    def prune_layers(self, depth: int) -> tuple[int, ...]:
        return layer_indices(self.layers, depth)

    def reduce(self, tokens: LayerTokens, memory: Any) -> LayerReduction:
        places = tokens.needed("places")
        if not tokens.needed("text").shape[0]:
            return LayerReduction(torch.arange(places.shape[0], device=places.device))
        total, peak = mustdrop_scores(weights_of_words(tokens), tokens.needed("asking").split(ROWS))
        key: Tensor | None = memory
        if key is None:
            key = top_mask(total, max(1, math.ceil(total.shape[0] * self.key_share - 1e-9)))
        units = tokens.num_initial
        mask = mustdrop_mask(total, peak, key, self.overall / units, self.individual / units)
        kept = mask.nonzero()[:, 0]
        return LayerReduction(kept, memory=key.index_select(0, kept))
