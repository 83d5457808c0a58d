"""The contract of the ``layers`` stage: prune visual tokens between decoder layers."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from spatiotoken.registry import Method
from spatiotoken.structures import LayerTokens


class LayerPruner(Method):
    """Drops visual tokens of one sample at a time; the sequence is really shorter from that layer on."""

    stage: ClassVar[str] = "layers"

    @abstractmethod
    def prune_layers(self, depth: int) -> tuple[int, ...]:
        """Decoder layers (of ``depth``, each >= 1) before which tokens are dropped, in rising order.

        Raises:
            ValueError: if the model is not deep enough.
        """

    @abstractmethod
    def select(self, tokens: LayerTokens) -> Tensor:
        """``[k]`` int64 indices of the kept tokens, of ``tokens.attention.shape[1]``, strictly increasing."""
