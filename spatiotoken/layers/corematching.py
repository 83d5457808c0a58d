"""CoreMatching: keep the visual tokens that make the same neurons fire as the end of the question does."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from spatiotoken.layers.base import LayerReducer
from spatiotoken.layers.depth import LayerPlace, layer_indices
from spatiotoken.structures import LayerReduction, LayerTokens
from spatiotoken.tokens.budgets import whole_share
from spatiotoken.tokens.merging import top_indices

_ROWS = 2048
"""Rows whose neurons are held at a time."""


def active_neurons(mlp: Any, hidden: Tensor) -> Tensor:
    """``[L, F]`` bool: the neurons of a gated MLP, gate and all, that are above 0 for ``hidden [L, D]``.

    Raises:
        ValueError: the MLP is not a gated one.
    """
    missing = [name for name in ("gate_proj", "up_proj", "act_fn") if not hasattr(mlp, name)]
    if missing:
        raise ValueError(f"corematching counts neurons of gated MLPs; {type(mlp).__name__} has no {', '.join(missing)}")
    return mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden) > 0


def shared_neurons(active: Tensor, reference: Tensor) -> Tensor:
    """``[L]`` float32 how many neurons of each row ``active [L, F]`` are active in ``reference [F]`` too."""
    return active.float() @ reference.float()


def elbow_index(curve: Tensor) -> Tensor:
    """``[1]`` index of the first point of the falling ``curve [n]`` (int64) farthest from the chord between its ends;
    0 where all are on it."""
    fall, steps = curve[:1] - curve, torch.arange(curve.shape[0], device=curve.device)
    # The distance but for a factor, in whole numbers: ties are exact.
    return (fall * (curve.shape[0] - 1) - steps * fall[-1:]).abs().argmax(dim=0, keepdim=True)


def core_mask(counts: Tensor) -> Tensor:
    """``[n]`` bool, True at the counts (whole numbers) above that of the elbow, and at the highest in any case."""
    curve = counts.long().sort(descending=True).values
    return (counts > curve.gather(0, elbow_index(curve))) | (counts == curve[0])


class CoreMatching(LayerReducer, method="corematching", paper="2505.19235"):
    """Keep the visual tokens that share most active neurons with the end of the question (arXiv 2505.19235).

    A neuron of the gated MLP in the layer before ``layer`` is active in a row if its gated value is positive. For each
    visual token those are counted that are active in the reference row too, the ``reference``-th from the end of the
    prompt. Sorted, the counts fall along a curve whose elbow is the point farthest from the chord between its ends;
    tokens with more than the elbow's count stay. How many these are depends on the sample.

    This is what the authors' code does, not the set of core neurons of their paper. It compares with row -5 in each of
    the sixth to nineteenth of 32 layers, and sets keys and values of the other tokens to zero in that layer's cache,
    which only decoding sees. Here they are dropped once, before the seventh, by the counts of the sixth, so that the
    prefill is shorter too. Where no count is above the elbow's, as on a straight line, the authors keep none; here the
    tokens with the highest count stay. ``min_retention`` is added: 1 keeps everything.

    Raises:
        ValueError: when the model runs and the layer's MLP has no gate, as with mixtures of experts.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"observed"})

    complexity: ClassVar[str] = "O(LDF) in one layer with F neurons"
    fidelity: ClassVar[str] = "authors' vectors, in part"

    layer: LayerPlace = Field(
        0.1875, description="decoder layer before which tokens are dropped (a fraction: of the depth)"
    )
    reference: int = Field(
        5, ge=1, description="row of the prompt to compare with, counted from its end, the last is 1"
    )
    min_retention: float = Field(0.0, ge=0, le=1, description="share of the visual tokens that is kept in any case")

    def prune_layers(self, depth: int) -> tuple[int, ...]:
        return layer_indices((self.layer,), depth, "layer")

    def observed_layers(self, depth: int) -> tuple[int, ...]:
        return (self.prune_layers(depth)[0] - 1,)

    def observe(self, part: str, module: nn.Module, before: Tensor, after: Tensor) -> Tensor:
        if part != "mlp":
            return torch.zeros(before.shape[0], device=before.device)
        row = max(0, before.shape[0] - self.reference)
        reference = active_neurons(module, before[row : row + 1])[0]
        return torch.cat([shared_neurons(active_neurons(module, rows), reference) for rows in before.split(_ROWS)])

    def reduce(self, tokens: LayerTokens, memory: Any) -> LayerReduction:
        assert tokens.observed is not None
        counts = tokens.observed[tokens.layer - 1].sum(dim=0)
        num_tokens = counts.shape[0]
        if self.min_retention == 1:
            return LayerReduction(torch.arange(num_tokens, device=counts.device))
        count = max(int(core_mask(counts).sum()), whole_share(num_tokens, self.min_retention))
        return LayerReduction(top_indices(counts, count))
