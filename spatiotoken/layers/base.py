"""The contract of the ``layers`` stage: prune or merge visual tokens between decoder layers."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from spatiotoken.registry import Method
from spatiotoken.structures import LayerReduction, LayerTokens


class LayerReducer(Method):
    """Reduces the visual tokens of one sample at a time; the sequence is really shorter from that layer on."""

    stage: ClassVar[str] = "layers"
    needs: ClassVar[frozenset[str]]
    """Optional fields of ``LayerTokens`` that ``reduce`` reads."""
    kind: ClassVar[str] = "between decoder layers"
    merges: ClassVar[bool] = False
    complexity: ClassVar[str]
    fidelity: ClassVar[str]
    """As of ``TokenReducer``; in ``complexity``, ``L`` is the length of the prompt."""

    @abstractmethod
    def prune_layers(self, depth: int) -> tuple[int, ...]:
        """Decoder layers (of ``depth``) before which tokens may go, in rising order; from 1 on where the method needs
        attention of the layer before.

        Raises:
            ValueError: if the model is not deep enough.
        """

    def trims_cache(self) -> bool:
        """Whether, after the prefill, the cache of earlier layers keeps no more rows than that of the last one: what is
        generated then differs from a recomputation, in which these layers see them."""
        return False

    def revives(self) -> bool:
        """Whether tokens that were dropped at the prefill come back once ``reduce`` keeps them, by what a later step of
        decoding attends to. For methods that need nothing but "attention", and no memory."""
        return False

    def observed_layers(self, depth: int) -> tuple[int, ...]:
        """Decoder layers whose parts ``observe`` is told of; a method that has any needs "observed"."""
        return ()

    def observe(self, part: str, module: nn.Module, before: Tensor, after: Tensor) -> Tensor:
        """``[L]`` float32 what a method wants to remember of each row of a sample.

        Args:
            part: "attention" or "mlp", which is ``module``.
            before, after: ``[L, D]`` its normed input, and its output before this is added to the hidden states.
        """
        raise NotImplementedError(f"{type(self).__name__} observes layers but does not say what")

    @abstractmethod
    def reduce(self, tokens: LayerTokens, memory: Any) -> LayerReduction:
        """What is left.

        Args:
            memory: what the method left itself at the layer before of the same pass; None at its first. A tensor, or
                one that is a dataclass's field, is on the device of ``tokens``, also where layers are on several.
        """


class LayerPruner(LayerReducer):
    """Drops tokens by the attention that the last prompt token gave them in the layer before."""

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    @abstractmethod
    def select(self, tokens: LayerTokens) -> Tensor:
        """``[k]`` int64 indices of the kept tokens, strictly increasing."""

    def reduce(self, tokens: LayerTokens, memory: Any) -> LayerReduction:
        return LayerReduction(self.select(tokens))
