"""YOPO: the last layers do without visual tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from spatiotoken.layers.base import LayerReducer
from spatiotoken.layers.words import all_or_nothing
from spatiotoken.registry import Retention
from spatiotoken.structures import LayerReduction, LayerTokens


class YOPO(LayerReducer, method="yopo", paper="2410.06169"):
    """Skip all visual computation in the last decoder layers, whatever the video (arXiv 2410.06169).

    Before decoder layer ``round(retention * depth)``, at least layer 1, all visual tokens are dropped. Nothing is
    computed for it. ``retention: 1`` keeps everything.

    One of the paper's four parts. Attention among neighbouring visual tokens only, and idle heads, are the method
    ``yopo_neighbours`` of the stage ``attention``; leaving out feed-forward neurons for visual tokens needs weights
    that are tuned for each model, and is not in here. The public code is a simulation: from a fixed layer on it sets
    the attention weights of visual tokens to 0 after the softmax, so that those of the words no longer add up to 1, as
    they do here. Where the authors stop is in the settings of each of their models; the default is ours.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    complexity: ClassVar[str] = "O(1)"
    fidelity: ClassVar[str] = "paper only"

    retention: Retention = Field(0.625, description="share of the decoder layers, the first ones, with visual tokens")

    def prune_layers(self, depth: int) -> tuple[int, ...]:
        layer = max(1, round(self.retention * depth))
        return (layer,) if layer < depth else ()

    def reduce(self, tokens: LayerTokens, memory: Any) -> LayerReduction:
        return all_or_nothing(tokens, True)
