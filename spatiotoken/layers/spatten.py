"""SpAtten: layer after layer the tokens go that have got the least attention so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from spatiotoken.layers.base import LayerReducer
from spatiotoken.layers.depth import LayerPlace, layer_indices
from spatiotoken.registry import Retention
from spatiotoken.structures import LayerReduction, LayerTokens
from spatiotoken.tokens.budgets import whole_share
from spatiotoken.tokens.merging import top_indices


@dataclass(frozen=True, eq=False)
class Importance:
    """Attention that each of the ``n`` tokens left has got so far, ``[n]`` float32, summed over layers and queries."""

    received: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Importance) and torch.equal(self.received, other.received)


def spatten_count(num_initial: int, shares: tuple[float, float], step: int, steps: int) -> int:
    """How many tokens are left at pruning layer ``step`` of ``steps``: a truncated share, at least one.

    The share goes in equal steps from the first of ``shares`` to the second, which a single pruning layer never gets.
    """
    first, last = shares
    return whole_share(num_initial, first + (last - first) * step / max(steps - 1, 1))


class SpAtten(LayerReducer, method="spatten", paper="2012.09852"):
    """Cascade pruning by the attention that tokens got over all heads, queries and layers (arXiv 2012.09852).

    Before each decoder layer from ``layer`` on (every ``stride``-th), the tokens with the most attention are kept,
    received in all layers before and summed over heads and queries. Their number is a share of the ``num_initial``
    visual tokens that entered, which goes in equal steps from the first of ``shares`` to the second. Dropped
    tokens are gone from all later layers. Ties go to the lowest index. ``shares: [1, 1]`` keeps everything.

    Attention that all queries give is not at hand with fast kernels, so each layer that is added up costs its
    attention once more, ``O(L²D)``: more than pruning saves unless very few tokens are left. ``accumulate: false`` adds
    up only the layers before those that prune, which a ``stride`` makes few; with a stride of 1 it merely leaves out
    the layers before ``layer - 1``.

    Written from the paper, which is about hardware. Of its parts this is token pruning: pruning of heads and
    of values and progressive quantization are left out. It leaves the first 15 % of the layers alone and lets the ratio
    go linearly from a first to a last value; which values depends on the task, so the defaults are ours. Only visual
    tokens may go.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"received"})

    complexity: ClassVar[str] = "O(L²D) per layer"
    fidelity: ClassVar[str] = "paper only"

    layer: LayerPlace = Field(
        0.15, description="first decoder layer before which tokens are dropped: its index, or a share of the depth"
    )
    shares: tuple[Retention, Retention] = Field(
        (0.8, 0.2), description="shares of all visual tokens kept at the first and at the last pruning layer"
    )
    stride: int = Field(1, ge=1, description="tokens are dropped before every so many layers")
    accumulate: bool = Field(
        True,
        description="add up the attention of all layers, as the paper does, not only of those before a drop",
    )

    @model_validator(mode="after")
    def _fewer_and_fewer(self) -> SpAtten:
        if self.shares[1] > self.shares[0]:
            raise ValueError(f"shares must not rise, got {list(self.shares)}")
        return self

    def _steps(self, depth: int) -> range:
        """The layers that prune."""
        return range(layer_indices((self.layer,), depth, "layer")[0], depth, self.stride)

    def prune_layers(self, depth: int) -> tuple[int, ...]:
        steps = self._steps(depth)
        if self.shares[1] == 1:
            return ()
        return tuple(range(1, steps[-1] + 1) if self.accumulate else steps)

    def reduce(self, tokens: LayerTokens, memory: Any) -> LayerReduction:
        # The mean over queries becomes their sum, which in longer sequences is of more of them.
        received = tokens.needed("received").float() * tokens.length
        if memory is not None:
            received = received + memory.received
        steps = self._steps(tokens.depth)
        kept = torch.arange(received.shape[0], device=received.device)
        if tokens.layer in steps:
            count = spatten_count(tokens.num_initial, self.shares, steps.index(tokens.layer), len(steps))
            kept = top_indices(received, min(count, received.shape[0]))
        return LayerReduction(kept, memory=Importance(received[kept]))
