"""FrameFusion: in the first layers merge what stays alike from frame to frame, then prune once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.layers.base import LayerReducer
from spatiotoken.layers.runs import framefusion_merge, framefusion_similarity
from spatiotoken.structures import LayerReduction, LayerTokens
from spatiotoken.tokens.merging import top_indices, top_mask


@dataclass(frozen=True)
class FrameFusionState:
    """What a layer has to know of those before it.

    Attributes:
        sparsities: for each layer that merged freely, the share of the tokens it met that it merged away.
        phase: what is to be done before the next layer.
    """

    sparsities: tuple[float, ...] = ()
    phase: Literal["merge", "prune", "done"] = "merge"


def framefusion_sparsity(sparsities: tuple[float, ...], cost: float, num_layers: int) -> float:
    """Share of the tokens left now that must go for the whole model to compute on ``cost`` of all tokens, in [0, 1].

    A layer computes on what the layers so far have left; the layers to come share what remains of the budget evenly.
    1 where the budget is spent already (the authors raise an error then), 0 where no layer is to come.
    """
    left, spent = 1.0, 0.0
    for sparsity in sparsities:
        left *= 1 - sparsity
        spent += left
    full = (num_layers - len(sparsities)) * left
    if full <= 0:
        return 0.0
    return min(max(1 - (num_layers * cost - spent) / full, 0.0), 1.0)


def framefusion_plan(
    similarity: Tensor,
    state: FrameFusionState,
    *,
    cost: float,
    similarity_bound: float,
    ratio_bound: float,
    num_layers: int,
) -> tuple[Tensor, FrameFusionState]:
    """Which tokens merge into the one before them at their place, and what comes next.

    All whose similarity is at least ``similarity_bound`` merge. Are these less than the sparsity that ``cost`` asks
    for, the next layer goes on merging, or prunes if they were also less than ``ratio_bound``. Else just the truncated
    share that is asked for merges, the most similar first, ties to the lowest index, and nothing more is done.

    Args:
        similarity: ``[n]`` of ``framefusion_similarity``.
        state: in phase "merge".
        cost: share of the dense model's computation, summed over its layers, that may be spent.

    Returns:
        ``[n]`` bool, and the state for the next layer.
    """
    num_tokens = similarity.shape[0]
    wanted = framefusion_sparsity(state.sparsities, cost, num_layers)
    alike = similarity >= similarity_bound
    share = int(alike.sum()) / num_tokens
    if share < wanted:
        phase: Literal["merge", "prune"] = "prune" if share < ratio_bound else "merge"
        return alike, FrameFusionState((*state.sparsities, share), phase)
    count = int(wanted * num_tokens)
    return top_mask(similarity, count), replace(state, phase="done")


def framefusion_prune_count(num_tokens: int, state: FrameFusionState, cost: float, num_layers: int) -> int:
    """How many tokens the prune leaves: the rounded share that the budget allows, at least one."""
    return max(1, round(num_tokens * (1 - framefusion_sparsity(state.sparsities, cost, num_layers))))


class FrameFusion(LayerReducer, method="framefusion", paper="2501.01986"):
    """Merge what stays alike from frame to frame in the first layers, then prune once by attention (arXiv 2501.01986).

    Before each decoder layer, tokens whose cosine with the last one left at their place in the frame is at least
    ``similarity`` merge into it, as plain means, until few do; the next layer then prunes by the attention that tokens
    got in the layer before, averaged over heads and queries, so that the whole model computes on ``cost`` of what all
    tokens would cost. If more tokens are alike than the budget asks for, just as many merge as it asks for, and that is
    all. Survivors keep their position ids. The authors count on 28 layers whatever the model; here it is the model's
    depth. Their vectors reach that last case only. ``cost: 1`` keeps everything.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hidden", "coordinates", "received"})

    merges: ClassVar[bool] = True
    complexity: ClassVar[str] = "O(TND) per merging layer, O(L²D) once"
    fidelity: ClassVar[str] = "authors' vectors, in part"

    cost: float = Field(0.3, gt=0, le=1, description="share of the dense model's computation that may be spent")
    similarity: float = Field(0.6, ge=-1, le=1, description="cosine from which tokens merge")
    ratio: float = Field(0.1, ge=0, le=1, description="share of merged tokens below which merging ends")

    def prune_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth))

    def reduce(self, tokens: LayerTokens, memory: Any) -> LayerReduction:
        state: FrameFusionState = memory or FrameFusionState()
        hidden = tokens.needed("hidden")
        everything = torch.arange(hidden.shape[0], device=hidden.device)
        if state.phase == "done" or self.cost == 1:
            return LayerReduction(everything, memory=replace(state, phase="done"))
        if state.phase == "prune":
            count = framefusion_prune_count(hidden.shape[0], state, self.cost, tokens.depth)
            kept = top_indices(tokens.needed("received"), count)
            return LayerReduction(kept, memory=replace(state, phase="done"))
        grid, _, row, column = tokens.needed("coordinates").unbind(dim=1)
        # A place of its own for what lies in no grid, such as a newline.
        place = torch.where(grid < 0, -1 - everything, (grid << 40) + (row << 20) + column)
        merges, state = framefusion_plan(
            framefusion_similarity(hidden, place),
            state,
            cost=self.cost,
            similarity_bound=self.similarity,
            ratio_bound=self.ratio,
            num_layers=tokens.depth,
        )
        merged, kept, assignment = framefusion_merge(hidden, place, merges)
        return LayerReduction(kept, merged, assignment, state)
