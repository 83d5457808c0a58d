"""ZipVL's important tokens, as many as a layer's attention asks for; the others leave the sequence."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.attention.weights import spread_rows
from spatiotoken.attention.zipvl import important_tokens
from spatiotoken.layers.base import LayerReducer
from spatiotoken.layers.depth import LayerPlace, layer_index
from spatiotoken.layers.words import ROWS
from spatiotoken.structures import LayerReduction, LayerTokens
from spatiotoken.tokens.merging import true_indices


def probe_rows(length: int, recent: int, spread: int, device: torch.device) -> Tensor:
    """``[P]`` int64, rising: ``spread`` rows at equal distances, then the last ``recent``; all if there are no more."""
    before = max(length - recent, 0)
    return torch.cat(
        [spread_rows(min(spread, before), before, device), torch.arange(before, length, device=device)],
    )


def zipvl_selection(mass: Tensor, probes: Tensor, places: Tensor, tau: float) -> Tensor:
    """``[k]`` int64, rising: which visual tokens are important, at least the one with the largest mean weight.

    Args:
        mass: ``[L]`` weight that each row got from the probes, over all heads.
        probes: ``[L]`` how many probes see it.
        places: ``[n]`` rows of the visual tokens.
        tau: share of all the weight that the important rows, words among them, have to hold.
    """
    important = important_tokens(mass, probes, tau)[places]
    best = (mass / probes)[places].argmax(dim=0, keepdim=True)
    important = important.index_fill(0, best, True)
    return true_indices(important, int(important.sum()))


class ZipVLTokens(LayerReducer, method="zipvl_tokens", paper="2410.08584"):
    """Keep a layer's important tokens, their number set by how its attention is spread (arXiv 2410.08584).

    Before each decoder layer from ``layer`` on, the weights that a few probe queries give all ``L`` rows in the layer
    about to be entered are summed over heads and probes. As many rows as hold ``tau`` of the sum when taken from the
    heaviest on are important: those with the largest mean weight over the probes that see them. Visual tokens that are
    not among them leave the sequence; words stay. Ties go to the earlier row. Each layer waits once for the number kept
    and computes its keys twice. ``tau: 1`` keeps everything.

    Written from the paper, since no code is public. There a token that is not important in one layer is left out of
    that layer's attention and cache only and may be important in the next; here it is gone for good, so that the same
    ``tau`` leaves fewer and fewer. (``attention: zipvl`` is the sparse prefill that drops nothing.) The paper's probes
    are the latest queries and random ones; ours lie at equal distances, so that runs can be repeated. Its cache of
    mixed precision is left out.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"weights"})

    complexity: ClassVar[str] = "O(LD²) + O(LD) per layer and probe"
    fidelity: ClassVar[str] = "paper only"

    tau: float = Field(0.975, gt=0, le=1, description="share of the probes' weights that the important tokens hold")
    recent: int = Field(64, ge=1, description="last queries that are probes")
    spread: int = Field(64, ge=0, description="further probes, at equal distances before those")
    layer: LayerPlace = Field(
        0, description="first decoder layer before which tokens are dropped: its index, or a share of the depth"
    )

    def prune_layers(self, depth: int) -> tuple[int, ...]:
        first = layer_index(self.layer, depth)
        return tuple(range(first, depth)) if self.tau < 1 else ()

    def reduce(self, tokens: LayerTokens, memory: Any) -> LayerReduction:
        assert tokens.weights is not None
        places = tokens.needed("places")
        rows = probe_rows(tokens.length, self.recent, self.spread, places.device)
        mass = torch.zeros(tokens.length, device=places.device)
        for some in rows.split(ROWS):
            mass = mass + tokens.weights(some, True).float().sum(dim=(0, 1))
        probes = (rows[:, None] >= torch.arange(tokens.length, device=rows.device)).sum(dim=0)
        return LayerReduction(zipvl_selection(mass, probes, places, self.tau))
