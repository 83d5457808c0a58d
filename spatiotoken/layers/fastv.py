"""FastV: drop the visual tokens that the last prompt token hardly looks at."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.layers.base import LayerPruner
from spatiotoken.layers.depth import LayerPlace, layer_indices
from spatiotoken.registry import Retention
from spatiotoken.structures import LayerTokens


def fastv_count(num_tokens: int, retention: float) -> int:
    """How many tokens are kept: the truncated share, at least one."""
    return max(1, int(num_tokens * retention))


def fastv_selection(attention: Tensor, count: int) -> Tensor:
    """``[count]`` indices, rising, of the tokens with the largest head-mean weight; ties go to the lowest index.

    Args:
        attention: ``[heads, n]`` softmax weights of one query row.
    """
    return attention.mean(dim=0).argsort(descending=True, stable=True)[:count].sort().values


class FastV(LayerPruner, method="fastv", paper="2403.06764"):
    """An image is worth half its tokens after layer 2: rank by the last prompt token's attention (arXiv 2403.06764).

    Before decoder layer ``layer`` the ``int(retention * n)`` of ``n`` visual tokens with the largest head-mean
    attention of the last prompt token in layer ``layer - 1`` are kept, with their position ids. The score needs that
    one query row only. The authors' in-place variant disables the KV cache; here each cache layer is as short as its
    layer's sequence.
    """

    complexity: ClassVar[str] = "O(LD)"
    fidelity: ClassVar[str] = "authors' vectors"

    layer: LayerPlace = Field(2, description="decoder layer before which tokens are dropped (a fraction: of the depth)")
    retention: Retention = 0.5

    def prune_layers(self, depth: int) -> tuple[int, ...]:
        return layer_indices((self.layer,), depth, "layer")

    def select(self, tokens: LayerTokens) -> Tensor:
        attention = tokens.needed("attention")
        num_tokens = attention.shape[1]
        if (count := fastv_count(num_tokens, self.retention)) == num_tokens:
            return torch.arange(num_tokens, device=attention.device)
        return fastv_selection(attention, count)
