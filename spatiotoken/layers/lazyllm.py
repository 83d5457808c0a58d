"""LazyLLM: at several layers only the tokens that the last one looks at most go on."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from spatiotoken.layers.base import LayerPruner
from spatiotoken.layers.depth import LayerPlace, layer_indices
from spatiotoken.layers.fastv import fastv_selection
from spatiotoken.registry import Retention
from spatiotoken.structures import LayerTokens
from spatiotoken.tokens.budgets import whole_share


class LazyLLM(LayerPruner, method="lazyllm", paper="2407.14057"):
    """Fewer tokens at each of several layers, by the last prompt token's attention (arXiv 2407.14057).

    Before the decoder layers ``layers``, ``int(share * n)`` of the ``n`` visual tokens that are left (at least one) are
    kept: those with the largest head-mean attention of the last prompt token in the layer before. Ties go to the lowest
    index. ``shares`` of 1 keep everything.

    Written from the paper, since no official code is public. With ``revive: true``, as in the paper, each decoding step
    ranks the tokens anew and computes those that it would now keep from hidden states that wait beside the KV cache;
    what is generated then differs from a recomputation without a cache, and each step waits for the device. By default
    tokens are dropped for good at the prefill, the paper's static variant. The paper ranks all tokens of the prompt,
    here only visual ones may go, and names no layers and shares beyond that later layers keep less: the defaults are
    ours.
    """

    complexity: ClassVar[str] = "O(LD) per pruning layer"
    fidelity: ClassVar[str] = "paper only"

    layers: tuple[LayerPlace, ...] = Field(
        (0.3, 0.6, 0.9),
        min_length=1,
        description="decoder layers before which tokens are dropped: their indices, or shares of the depth, rising",
    )
    shares: tuple[Retention, ...] = Field(
        (0.8, 0.6, 0.4), description="share of the tokens left so far that is kept at each of these layers"
    )

    revive: bool = Field(
        False,
        description="bring dropped tokens back that a later step of decoding would keep; needs sdpa or eager",
    )

    @model_validator(mode="after")
    def _one_share_each(self) -> LazyLLM:
        if len(self.layers) != len(self.shares):
            raise ValueError(f"{len(self.layers)} layers need as many shares, got {len(self.shares)}")
        return self

    def revives(self) -> bool:
        return self.revive

    def prune_layers(self, depth: int) -> tuple[int, ...]:
        return layer_indices(self.layers, depth, "layers")

    def select(self, tokens: LayerTokens) -> Tensor:
        attention = tokens.needed("attention")
        share = self.shares[self.prune_layers(tokens.depth).index(tokens.layer)]
        return fastv_selection(attention, whole_share(attention.shape[1], share))
