"""ToDRE's second stage: late in the model all visual tokens go, if the text hardly attends to them any more."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from spatiotoken.layers.base import LayerReducer
from spatiotoken.layers.depth import LayerPlace, layer_indices
from spatiotoken.layers.words import all_or_nothing, text_to_visual
from spatiotoken.structures import LayerReduction, LayerTokens


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
