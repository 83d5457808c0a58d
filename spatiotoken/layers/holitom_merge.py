"""HoliTom inside the language model: what the last prompt token overlooks merges into its likeness that it does not."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.layers.base import LayerReducer
from spatiotoken.layers.depth import LayerPlace, layer_indices
from spatiotoken.registry import Retention
from spatiotoken.structures import LayerReduction, LayerTokens
from spatiotoken.tokens.merging import mean_by_assignment, nearest, top_mask, true_indices


def holitom_merge_count(num_tokens: int, retention: float) -> int:
    """How many tokens are kept: the rounded share (half to even), at least one."""
    return max(1, round(num_tokens * retention))


def folded(hidden: Tensor, kept: Tensor, dropped: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """``[k, D]`` kept tokens into which the dropped ones were folded one by one, each as ``(kept + dropped) / 2``.

    So the last one folded weighs a half, the one before it a quarter, and so on.

    Args:
        hidden: ``[n, D]``.
        kept: ``[k]`` indices, rising.
        dropped: ``[m]`` the others, in the order in which they are folded.
        target: ``[m]`` the place in ``kept`` of what each goes to.

    Returns:
        Also the ``[n]`` place in ``kept`` that each token went to.
    """
    count = kept.shape[0]
    # In each group the kept one first, then those folded into it.
    group, order = torch.cat([torch.arange(count, device=kept.device), target]).sort(stable=True)
    tokens = torch.cat([kept, dropped])[order]
    first = torch.searchsorted(group, torch.arange(count + 1, device=group.device))
    size = first.diff()[group]
    rank = torch.arange(group.shape[0], device=group.device) - first[group]
    weight = torch.pow(0.5, (size - rank.clamp(min=1)).float())
    assignment = torch.empty_like(tokens).scatter_(0, tokens, group)
    scale = torch.empty_like(weight).scatter_(0, tokens, weight * size)
    return mean_by_assignment(hidden.float() * scale[:, None], assignment, count).to(hidden.dtype), assignment


def holitom_merge(hidden: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fold all but the ``count`` tokens of largest score into the most similar (by cosine) of these, in their order.

    Args:
        hidden: ``[n, D]``.
        scores: ``[n]``; ties go to the lowest index.

    Returns:
        ``[count]`` kept indices, rising, ``[count, D]`` what becomes of these, and the ``[n]`` assignment.
    """
    stays = top_mask(scores, count)
    kept, dropped = true_indices(stays, count), true_indices(~stays, scores.shape[0] - count)
    target = nearest(hidden.index_select(0, dropped), hidden.index_select(0, kept))
    merged, assignment = folded(hidden, kept, dropped, target)
    return kept, merged, assignment


class HoliTomMerge(LayerReducer, method="holitom_merge", paper="2505.21334"):
    """Folds tokens that the last prompt token overlooks into the most similar ones it looks at (arXiv 2505.21334).

    Before decoder layer ``layer`` the ``round(retention * n)`` visual tokens with the largest head-mean attention of
    the last prompt token in the layer before are kept. Each of the others goes to the kept one with the highest cosine:
    in ascending order, each time the mean of the two, as released. Later ones thus weigh more, and the kept token
    itself least of all where it takes many. The authors do so in the model's precision, here it is float32. HoliTom's
    part before the language model is ``tokens: holitom``.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention", "hidden"})

    merges: ClassVar[bool] = True
    complexity: ClassVar[str] = "O(LD + N²D)"
    fidelity: ClassVar[str] = "authors' vectors"

    layer: LayerPlace = Field(0.643, description="decoder layer before which tokens merge: index or share of depth")
    retention: Retention = 0.5

    def prune_layers(self, depth: int) -> tuple[int, ...]:
        return layer_indices((self.layer,), depth, "layer")

    def reduce(self, tokens: LayerTokens, memory: Any) -> LayerReduction:
        hidden = tokens.needed("hidden")
        count = holitom_merge_count(hidden.shape[0], self.retention)
        if count == hidden.shape[0]:
            return LayerReduction(torch.arange(count, device=hidden.device))
        return LayerReduction(*holitom_merge(hidden, tokens.needed("attention").mean(dim=0), count))
