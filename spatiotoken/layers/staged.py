"""Pruning in stages: before each of several layers a smaller share of the original tokens is left."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from spatiotoken.layers.base import LayerReducer
from spatiotoken.layers.depth import LayerPlace, layer_indices
from spatiotoken.registry import Retention
from spatiotoken.structures import LayerReduction, LayerTokens
from spatiotoken.tokens.budgets import whole_share
from spatiotoken.tokens.merging import top_indices


def staged_count(num_tokens: int, num_initial: int, share: float) -> int:
    """How many of ``num_tokens`` a stage keeps: the truncated share of the original number, at least one."""
    return min(num_tokens, whole_share(num_initial, share))


class StagedPruner(LayerReducer):
    """Keeps the highest-scored share of the original tokens before each of several layers, a smaller one each time.

    Raises:
        ValueError: there is not one share for each layer, or shares rise.
    """

    layers: tuple[LayerPlace, ...] = Field(
        (0.25, 0.5, 0.75),
        min_length=1,
        description="decoder layers before which tokens are dropped (fractions: of the depth)",
    )
    keep: tuple[Retention, ...] = Field(
        (0.5, 0.25, 0.125),
        min_length=1,
        description="share of the original visual tokens that is left from each of these layers on",
    )

    @model_validator(mode="after")
    def _stages_fit(self) -> StagedPruner:
        if len(self.layers) != len(self.keep):
            raise ValueError(f"keep must have a share for each of the {len(self.layers)} layers, got {list(self.keep)}")
        if any(a < b for a, b in zip(self.keep, self.keep[1:], strict=False)):
            raise ValueError(f"keep must not rise, since what is dropped is gone, got {list(self.keep)}")
        return self

    def prune_layers(self, depth: int) -> tuple[int, ...]:
        return layer_indices(self.layers, depth)

    @abstractmethod
    def scores(self, tokens: LayerTokens) -> Tensor:
        """``[n]`` float32: the tokens with the highest are kept."""

    def reduce(self, tokens: LayerTokens, memory: Any) -> LayerReduction:
        places = tokens.needed("places")
        share = self.keep[self.prune_layers(tokens.depth).index(tokens.layer)]
        count = staged_count(places.shape[0], tokens.num_initial, share)
        if count == places.shape[0]:
            return LayerReduction(torch.arange(count, device=places.device))
        return LayerReduction(top_indices(self.scores(tokens), count))
