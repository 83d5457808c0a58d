"""AIM inside the language model: fewer tokens from layer to layer, ranked by PageRank over the attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.layers.base import LayerReducer
from spatiotoken.layers.depth import LayerPlace, layer_index
from spatiotoken.layers.words import ROWS
from spatiotoken.structures import LayerReduction, LayerTokens
from spatiotoken.tokens.merging import top_indices


def aim_count(num_initial: int, layer: int, start: int, end: int, least: float) -> int:
    """How many of ``num_initial`` tokens enter ``layer``: all up to ``start``, evenly fewer down to none at ``end``.

    Args:
        least: share of the tokens that is left in any case.
    """
    share = min(1.0, max(least, 1 - (layer - start) / (end - start)))
    return int(num_initial * share + 1e-9)


def aim_importance(rows: Callable[[Tensor], Tensor], everyone: Tensor, temperature: float, steps: int) -> Tensor:
    """``[L]`` float32 root mean square, over heads, of where ``steps`` random steps along the attention lead.

    All start with the same weight, and a step from a query goes to a key with the probability of a softmax at
    ``temperature``. No step leads to a later row, so that one pass from the last rows to the first, ``O(L²D)``, makes
    all the steps of these rows at once.

    Args:
        rows: gives ``[heads, R, L]`` softmax weights of query rows ``[R]``; 0 for later rows.
        everyone: ``[L]`` the numbers of all rows.
    """
    length = everyone.shape[0]
    reached: list[Tensor] | None = None
    stop = length
    for queries in reversed(everyone.split(ROWS)):
        # Weights to the power 1 / temperature are what the softmax at that temperature gives, up to a factor.
        chances = (rows(queries).float().log() / temperature).softmax(dim=-1)
        if reached is None:
            reached = [chances.new_zeros(chances.shape[0], 1, length) for _ in range(steps)]
        start = stop - queries.shape[0]
        leaving = chances.new_full((chances.shape[0], 1, queries.shape[0]), 1 / length)
        for arrived in reached:
            arrived += leaving @ chances
            leaving = arrived[..., start:stop]  # nothing comes to these rows any more
        stop = start
    assert reached is not None
    return reached[-1][:, 0].square().mean(dim=0).sqrt()


class AIMPrune(LayerReducer, method="aim_prune", paper="2412.03248"):
    """Drops ever more visual tokens from layer to layer until none is left, by PageRank (arXiv 2412.03248).

    Before each decoder layer from ``start + 1`` to ``end``, the visual tokens of largest importance in the layer
    before are kept, ``int((1 - (layer - start) / (end - start)) * num_initial)`` of them, none from ``end`` on.
    Importance is ``steps`` steps of PageRank over the attention of all rows at ``temperature``. That costs about as
    much as the attention of a layer, once per layer that prunes.

    The authors (layers 14 to 22 of 28) only mask tokens, and those masked still take part in the first step of later
    layers; here they are gone. AIM's merging before the language model is ``tokens: aim``. The attention must be
    causal.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"places", "weights"})

    complexity: ClassVar[str] = "O(L²D) per pruning layer"
    fidelity: ClassVar[str] = "authors' vectors"

    start: LayerPlace = Field(0.5, description="last decoder layer with all tokens: index or share of depth")
    end: LayerPlace = Field(0.786, description="first decoder layer without any: index or share of depth")
    least: float = Field(0.0, ge=0, le=1, description="share of the tokens that is never dropped")
    temperature: float = Field(0.1, gt=0, description="of the softmax of attention, 1 leaves it as it is")
    steps: int = Field(5, ge=1, le=100, description="steps of PageRank")

    def _bounds(self, depth: int) -> tuple[int, int]:
        start, end = layer_index(self.start, depth, "start"), layer_index(self.end, depth, "end")
        if start >= end:
            raise ValueError(f"layers.end: {self.end} is layer {end} of {depth}, not after layers.start, {start}")
        return start, end

    def prune_layers(self, depth: int) -> tuple[int, ...]:
        start, end = self._bounds(depth)
        return tuple(range(start + 1, end + 1))

    def reduce(self, tokens: LayerTokens, memory: Any) -> LayerReduction:
        places, weights = tokens.needed("places"), tokens.weights
        assert weights is not None
        count = aim_count(tokens.num_initial, tokens.layer, *self._bounds(tokens.depth), self.least)
        everything = torch.arange(places.shape[0], device=places.device)
        if count == 0 or count >= places.shape[0]:
            return LayerReduction(everything[:count])
        everyone = torch.arange(tokens.length, device=places.device)
        importance = aim_importance(lambda rows: weights(rows, False), everyone, self.temperature, self.steps)
        return LayerReduction(top_indices(importance.index_select(0, places), count))
