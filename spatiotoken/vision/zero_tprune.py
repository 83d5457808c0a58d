"""Zero-TPrune: patches go that are like more important ones, then those that attention's graph ranks lowest."""

from __future__ import annotations

import math
from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.tokens.budgets import whole_share
from spatiotoken.tokens.merging import top_mask, true_indices
from spatiotoken.vision.base import TowerAttention, TowerMerge, TowerReducer, TowerShape, TowerTokens
from spatiotoken.vision.pairs import mean_keys, steps_left
from spatiotoken.vision.pruning import PAIRS, DepthShare, graphs, nearest_layers, pruned, vote

VARIANCE = (0.01, 0.7)
"""Least and greatest variance of a head's scores, whose mean is 1, with which it has a say."""


def zero_tprune_count(patches: int, retention: float, step: int, steps: int) -> int:
    """How many of a frame's ``patches`` are left after ``step + 1`` of ``steps`` that each take about as many."""
    return steps_left(patches, whole_share(patches, retention), step, steps)


def voting_rounds(layer: int, depth: int) -> int:
    """Rounds of the page rank: 30 in the first quarter of the layers, 1 in the last, 5 between them."""
    return 30 if 4 * layer < depth else 5 if 4 * layer < 3 * depth else 1


def importance(scores: Tensor) -> Tensor:
    """``[frames, n]`` root mean square over heads of ``scores [frames, heads, n]``, each head's scaled to a mean of 1.

    Only heads whose variance is within bounds count; all, where none is.
    """
    scores = scores / scores.mean(dim=-1, keepdim=True)
    variance = scores.var(dim=-1, correction=0)
    fit = (variance >= VARIANCE[0]) & (variance <= VARIANCE[1])
    say = (fit | ~fit.any(dim=1, keepdim=True))[..., None].to(scores.dtype)
    return ((scores.square() * say).sum(dim=1) / say.sum(dim=1)).sqrt()


def page_rank(query: Tensor, key: Tensor, cls_query: Tensor | None, scale: float, rounds: int) -> Tensor:
    """``[frames, n]`` importance in the graph of attention between patches.

    Args:
        query, key: ``[frames, n, heads, d]``.
        cls_query: ``[frames, heads, d]``. Its patch votes once, in the first round, with ``sqrt(n)`` votes.
        rounds: of voting.
    """
    frames, places, heads, _ = query.shape
    first = None
    if cls_query is not None:
        logits = (key.float() * (cls_query.float() * scale)[:, None]).sum(dim=-1)
        first = math.sqrt(places) * logits.softmax(dim=1).transpose(1, 2).flatten(0, 1)
    start = torch.ones(frames * heads, places, device=query.device)
    votes = vote(graphs(query), graphs(key), scale, start, rounds, first=first)
    return importance(votes.unflatten(0, (frames, heads)))


def alike(ranks: Tensor, keys: Tensor, count: int) -> Tensor:
    """``[frames, n]`` bool with ``count`` True: of the less important half, what is most like one of the other half.

    By cosine. The more important half is the larger if ``n`` is odd.

    Args:
        ranks: ``[frames, n]`` importance.
        keys: ``[frames, n, d]``.
        count: at most ``n // 2``.
    """
    places = ranks.shape[1]
    order = ranks.argsort(dim=1, descending=True, stable=True)
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    unit = unit.gather(1, order[..., None].expand_as(unit))
    upper = (places + 1) // 2
    parts = unit.split(max(1, PAIRS // places**2))
    best = torch.cat([(part[:, upper:] @ part[:, :upper].mT).amax(dim=-1) for part in parts])
    # Back in their places, so that ties go to the lowest index.
    return top_mask(torch.full_like(ranks, -torch.inf).scatter_(1, order[:, upper:], best), count)


class ZeroTPrune(TowerReducer, method="zero_tprune", paper="2305.17328"):
    """Leaves out patches alike to more important ones, then unimportant ones (Zero-TPrune, arXiv 2305.17328).

    A patch is important if important patches attend to it: in each head, ``[n]`` patches of a frame that begin with one
    vote each give what they have to those that they attend to, round after round; heads whose scores vary too little or
    too much have no say, and the root of the mean square over the others is the importance. Three steps, as in the
    paper: after one round patches are split into a more and a less important half; of the latter, those whose key (mean
    over heads) is most like one of the former go; then a page rank of more rounds among what is left sends the least
    important away. ``similar`` is the first part. This happens between attention and MLP of the layers nearest to
    ``at`` that attend to whole frames; each takes about as many, so that of a frame's ``N`` patches
    ``int(retention * N)``, at least one, are left at the end. The most similar patch of its frame that is left, by key,
    stands for each that goes. Rounds are the fewest that the paper gives: 30, 5 and 1 in the first, the middle and the
    last layers.

    No code of the authors was found. They search layers and numbers for each model; here both are even. Attention is
    that among patches: there are no keys of CLS tokens, which vote in the first round alone, with the paper's
    ``sqrt(n)`` votes. The variance has the paper's bounds, 0.01 to 0.7, for scores with a mean of 1: with a sum of 1 no
    head could reach 0.01 where there are a hundred patches. If no head is within them, all have a say. Weights of what
    is left after the first step are made anew, so that no votes are lost to patches that went.
    """

    kind: ClassVar[str] = "pruning"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    complexity: ClassVar[str] = "O(TN^2 D) per layer"
    fidelity: ClassVar[str] = "paper only"

    retention: Retention = 0.5
    similar: float = Field(0.5, ge=0, le=1, description="part of those that go that goes for being alike")
    at: tuple[DepthShare, ...] = Field(
        (0.25, 0.5, 0.75), min_length=1, description="shares of the depth at which patches go"
    )

    def layers(self, tower: TowerShape) -> tuple[int, ...]:
        return () if self.retention == 1 else nearest_layers(self.at, tower.whole_frames, tower.depth)

    def reduce(self, tokens: TowerTokens) -> TowerMerge | None:
        acting, frames, places = self.layers(tokens.tower), len(tokens.counts), tokens.counts[0]
        patches = tokens.grid[1] * tokens.grid[2]
        count = zero_tprune_count(patches, self.retention, acting.index(tokens.layer), len(acting))
        if count == places:
            return None
        attention, keys = cast(TowerAttention, tokens.needed("attention")), mean_keys(tokens)
        query, key = (states.unflatten(0, (frames, -1)) for states in (attention.query, attention.key))
        cls, scale = attention.cls_query, attention.scale
        kept = torch.ones(frames, places, dtype=torch.bool, device=keys.device)
        going = min(int((places - count) * self.similar + 1e-9), places // 2)
        if going:
            kept = ~alike(page_rank(query, key, cls, scale, 1), keys, going)
        if places - going > count:
            left = true_indices(kept, places - going)
            index = left[..., None, None].expand(-1, -1, *query.shape[2:])
            rounds = voting_rounds(tokens.layer, tokens.tower.depth)
            ranks = page_rank(query.gather(1, index), key.gather(1, index), cls, scale, rounds)
            kept = torch.zeros_like(kept).scatter_(1, left, top_mask(ranks, count))
        return pruned(tokens, keys, kept, (count,) * frames)
