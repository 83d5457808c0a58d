"""PyramidDrop: keep fewer and fewer of the visual tokens, stage by stage, by what the last prompt token looks at."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from spatiotoken.layers.staged import StagedPruner
from spatiotoken.structures import LayerTokens


class PyramidDrop(StagedPruner, method="pyramiddrop", paper="2410.17247"):
    """Drop half of the visual tokens at each quarter of the model, by the last prompt token (arXiv 2410.17247).

    Before each of ``layers``, the ``int(keep * n)`` visual tokens to which the last prompt token gives most attention
    stay, with ``n`` the number that entered the language model. Attention is the mean over the heads of the layer that
    is about to be entered, computed from its normed input for that one query row.

    Survivors keep their position ids, while the authors number the shorter sequence anew at each stage. Their layers
    8, 16 and 24 of 32 are fractions here. ``keep`` of 1 everywhere keeps everything.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"weights"})

    complexity: ClassVar[str] = "O(LDK) per stage for keys of K channels"
    fidelity: ClassVar[str] = "authors' vectors"

    def scores(self, tokens: LayerTokens) -> Tensor:
        assert tokens.weights is not None
        places = tokens.needed("places")
        last = places.new_full((1,), tokens.length - 1)
        return tokens.weights(last, True)[:, 0, places].mean(dim=0)
