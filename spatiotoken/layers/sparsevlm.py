"""SparseVLM: the words that the pictures speak to rate the visual tokens, and some of the dropped ones are recycled."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from spatiotoken.layers.base import LayerReducer
from spatiotoken.layers.depth import LayerPlace, layer_indices
from spatiotoken.layers.words import ROWS, weights_of_words
from spatiotoken.registry import Retention
from spatiotoken.structures import LayerReduction, LayerTokens
from spatiotoken.tokens.budgets import whole_share
from spatiotoken.tokens.density_peaks import (
    assign_to_centres,
    density_peak_centres,
    density_peak_scores,
    scaled_distances,
)
from spatiotoken.tokens.merging import mean_by_assignment, top_indices


def text_raters(visual: Tensor, words: Tensor, asking: Tensor) -> Tensor:
    """``[t]`` bool: words that get more than the average of what the visual tokens give; all that ask if none does.

    Args:
        visual: ``[n, D]``; each gives softmax shares of its inner products with the words.
        words: ``[t, D]``.
        asking: ``[t]`` bool: which words can be raters.
    """
    products = (visual.float() @ words.float().mT).masked_fill(~asking, -torch.inf)
    share = products.softmax(dim=1).mean(dim=0)
    above = asking & (share > share.sum() / asking.sum())
    return torch.where(above.any(), above, asking)


def sparsevlm_relevance(mass: Tensor, raters: Tensor, heads: float) -> Tensor:
    """``[n]`` means over the raters ``[t]`` bool of ``mass [heads, n]``, their sums, and the share ``heads`` of the
    heads where these are largest; of equals the first."""
    best = top_indices(mass.sum(dim=1), whole_share(mass.shape[0], heads))
    return mass.index_select(0, best).mean(dim=0) / raters.sum().clamp(min=1)


def recycled_counts(num_dropped: int, share: float) -> tuple[int, int]:
    """How many of the dropped tokens are clustered, and to how many clusters; none if ``share`` is 0."""
    if not share or not num_dropped:
        return 0, 0
    candidates = min(int(num_dropped * share) + 1, num_dropped)
    return candidates, candidates // 10 + 1


def sparsevlm_clusters(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``[count]`` centres by density peaks with ``count`` neighbours, best first, and ``[n]`` whose each token is."""
    distances = scaled_distances(values)
    centres = density_peak_centres(density_peak_scores(distances, count), count)
    return centres, assign_to_centres(distances, centres)


def sparsevlm_recycle(hidden: Tensor, relevance: Tensor, kept: Tensor, share: float) -> LayerReduction:
    """``kept`` and the clusters of the most relevant dropped tokens, as means in the places of their centres."""
    num_candidates, count = recycled_counts(hidden.shape[0] - kept.shape[0], share)
    candidates = top_indices(relevance.index_fill(0, kept, -torch.inf), num_candidates)
    values = hidden.index_select(0, candidates)
    centres, owner = sparsevlm_clusters(values, count)
    means = mean_by_assignment(values, owner, count)
    survivors, order = torch.cat([kept, candidates[centres]]).sort()
    slot = order.argsort()
    assignment = slot.new_full(hidden.shape[:1], -1)
    assignment[kept] = slot[: kept.shape[0]]
    assignment[candidates] = slot[kept.shape[0] :][owner]
    return LayerReduction(survivors, torch.cat([hidden.index_select(0, kept), means])[order], assignment)


class SparseVLM(LayerReducer, method="sparsevlm", paper="2410.04417"):
    """Keeps what the words that matter to the pictures look at, and merges some of the rest (arXiv 2410.04417).

    At the entry, the raters are chosen: words after the pictures that get more than the average of softmax shares of
    the visual embeddings. Before each of ``layers``, the tokens with the largest mean attention of the raters, over
    heads, in the layer before are kept: ``int(keep * num_initial)``, or with ``scale`` so many times the rank of the
    ``[raters, n]`` attention, as released for the paper, which does not grow with the video. Of the tokens that would
    go, the most attended ``int(recycle * dropped) + 1`` are clustered to a tenth (and one) by density peaks, and come
    on top of those kept.

    The authors prune after layers 2, 6, 15 of 32, thus before 3, 7, 16. They append clusters behind the kept tokens
    and renumber; here a cluster takes the place of its centre and positions stay. They always drop a token, and get
    NaN where no word is above the average, as a single one never is. ``recycle: 0`` with ``heads: 0.5`` is their
    version 2, but for its division by the rotary map, which needs positions that a method does not see.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hidden", "text", "places", "rows", "weights"})

    merges: ClassVar[bool] = True
    complexity: ClassVar[str] = "O(t(L + N)D + N²D) with t words"
    fidelity: ClassVar[str] = "authors' vectors, in part"

    layers: tuple[LayerPlace, ...] = Field(
        (0.09375, 0.21875, 0.5),
        min_length=1,
        description="decoder layers before which tokens are dropped: indices or shares of the depth",
    )
    keep: tuple[Retention, ...] = Field(
        (0.521, 0.3473, 0.191), description="share of the original tokens that is kept from each of these layers on"
    )
    scale: float | None = Field(None, gt=0, description="keep so many times the rank of the attention instead")
    recycle: float = Field(0.3, ge=0, le=1, description="share of the dropped tokens that is merged into clusters")
    heads: float = Field(1.0, gt=0, le=1, description="share of the heads that rate, those that look most at pictures")

    @model_validator(mode="after")
    def _one_each(self) -> SparseVLM:
        if len(self.layers) != len(self.keep):
            raise ValueError(f"keep must have a share for each of the {len(self.layers)} layers, got {list(self.keep)}")
        return self

    def prune_layers(self, depth: int) -> tuple[int, ...]:
        return (0, *layer_indices(self.layers, depth))

    def reduce(self, tokens: LayerTokens, memory: Any) -> LayerReduction:
        assert tokens.rows is not None
        hidden, text = tokens.needed("hidden"), tokens.needed("text")
        raters: Tensor = text_raters(hidden, tokens.rows(text), tokens.needed("asking")) if memory is None else memory
        num_tokens = hidden.shape[0]
        everything = LayerReduction(torch.arange(num_tokens, device=hidden.device), memory=raters)
        if tokens.layer == 0 or not text.shape[0]:
            return everything
        stage = self.prune_layers(tokens.depth).index(tokens.layer) - 1
        count = 0 if self.scale else whole_share(tokens.num_initial, self.keep[stage])
        if count >= num_tokens:
            return everything
        sums, means = [], []
        for weights, who in zip(weights_of_words(tokens), raters.split(ROWS), strict=True):
            rated = weights * who[:, None]
            sums.append(rated.sum(dim=1))
            means.append(rated.mean(dim=0))
        if self.scale:
            # Rows of zeros for the other words add nothing to the rank.
            count = max(1, int(int(torch.linalg.matrix_rank(torch.cat(means))) * self.scale))
            if count >= num_tokens:
                return everything
        relevance = sparsevlm_relevance(torch.stack(sums).sum(dim=0), raters, self.heads)
        kept = top_indices(relevance, count)
        if not self.recycle:
            return LayerReduction(kept, memory=raters)
        left = sparsevlm_recycle(hidden, relevance, kept, self.recycle)
        return LayerReduction(left.kept, left.hidden, left.assignment, raters)
