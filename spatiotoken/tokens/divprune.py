"""DivPrune: max-min diversity selection."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import TokenReducer
from spatiotoken.tokens.merging import waits_are_free
from spatiotoken.tokens.todre import farthest_first

_SAMPLE, _FEWEST, _MOST = 128, 64, 1024
"""Tokens that are compared with all others at first, and at a time after that; no matter for the result."""
_MARGIN = 1e-6
"""Two cosines may differ by less because of rounding alone."""


def divprune_count(num_tokens: int, retention: float) -> int:
    """How many tokens are kept: the rounded share, at least one."""
    return max(1, round(num_tokens * retention))


def divprune_order(embeddings: Tensor, count: int) -> Tensor:
    """``[count]`` distinct indices in the order in which the greedy search picks them.

    The first is the token farthest from its nearest neighbour, each next one the token farthest from all picked so
    far, by cosine distance. Ties go to the lowest index, as far as rounding lets them tie. Memory is ``O(N)`` where the
    authors hold ``N x N``.
    """
    unit = torch.nn.functional.normalize(embeddings.float(), dim=-1)
    return farthest_first(unit, loneliest(unit), count)


def loneliest(unit: Tensor) -> Tensor:
    """``[1]`` index of the row of ``unit [N, D]`` whose nearest other row is the farthest.

    What some rows are compared with has a neighbour at least as near as they are, so most rows are soon out of the
    question: they have a nearer one than the best of those that were compared with all.
    """
    if not waits_are_free(unit.device):
        blocks = torch.arange(unit.shape[0], device=unit.device).split(_MOST)
        compared = [(unit[rows] @ unit.T).scatter_(1, rows[:, None], -torch.inf).amax(dim=1) for rows in blocks]
        return torch.cat(compared).argmin(0, keepdim=True)
    nearest = unit.new_full(unit.shape[:1], -torch.inf)  # a bound for those not in ``done``
    done = torch.zeros_like(nearest, dtype=torch.bool)
    rows = torch.arange(0, unit.shape[0], -(-unit.shape[0] // _SAMPLE), device=unit.device)
    block = _FEWEST
    while rows.shape[0]:
        likeness = (unit.index_select(0, rows) @ unit.T).scatter_(1, rows[:, None], -torch.inf)
        nearest = torch.maximum(nearest, likeness.amax(dim=0)).index_copy_(0, rows, likeness.amax(dim=1))
        done.index_fill_(0, rows, True)
        left = nearest.masked_fill(done, torch.inf)
        rows = left.argsort()[: min(int((left <= nearest[done].amin() + _MARGIN).sum()), block)]
        block = min(2 * block, _MOST)
    return (1 - nearest).masked_fill_(~done, -torch.inf).argmax(0, keepdim=True)


class DivPrune(TokenReducer, method="divprune", paper="2503.02175"):
    """Max-min diversity selection of visual tokens over the whole clip (arXiv 2503.02175).

    Keeps ``round(retention * N)`` of the ``[N, D]`` tokens, unchanged, with their positions (the authors renumber
    them). Where everything left coincides with a picked token the authors may pick one twice; this does not.
    """

    kind: ClassVar[str] = "importance and diversity"
    complexity: ClassVar[str] = "O(K TN D) for K kept"
    fidelity: ClassVar[str] = "authors' vectors"

    retention: Retention = 0.25

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        count = divprune_count(video.num_tokens, self.retention)
        if count == video.num_tokens:
            return ReducedTokens.pruned(video, torch.arange(count, device=video.embeddings.device))
        return ReducedTokens.pruned(video, divprune_order(video.embeddings, count).sort().values)
