"""DivPrune: max-min diversity selection."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import TokenReducer

_CHUNK = 1024
"""Rows of the first pass that are compared with all tokens at once; bounds its memory to ``_CHUNK * N``."""


def divprune_count(num_tokens: int, retention: float) -> int:
    """How many tokens are kept: the rounded share, at least one."""
    return max(1, round(num_tokens * retention))


def divprune_order(embeddings: Tensor, count: int) -> Tensor:
    """``[count]`` distinct indices in the order in which the greedy search picks them.

    The first is the token farthest from its nearest neighbour, each next one the token farthest from all picked so
    far, by cosine distance. Ties go to the lowest index. One row of distances is computed per pick, so memory is
    ``O(N)`` where the authors hold ``N x N``.
    """
    unit = torch.nn.functional.normalize(embeddings.float(), dim=-1)
    # Picks stay tensors of one element: indexing with a bare one would make the host wait for the device each time.
    picks = [_nearest_neighbour_distance(unit).argmax(0, keepdim=True)]
    to_picked = unit.new_full((unit.shape[0],), torch.inf)
    while len(picks) < count:
        to_picked = torch.minimum(to_picked, 1 - unit @ unit.index_select(0, picks[-1])[0])
        # Below every real distance: duplicates at distance 0 must not make a token be picked twice.
        to_picked.index_fill_(0, picks[-1], -torch.inf)
        picks.append(to_picked.argmax(0, keepdim=True))
    return torch.cat(picks)


def _nearest_neighbour_distance(unit: Tensor) -> Tensor:
    """``[N]`` cosine distance of each unit row to its nearest other row (0 for a lone row)."""
    if unit.shape[0] == 1:
        return unit.new_zeros(1)
    nearest = []
    for start in range(0, unit.shape[0], _CHUNK):
        similarity = unit[start : start + _CHUNK] @ unit.T
        similarity.diagonal(offset=start).fill_(-torch.inf)
        nearest.append(1 - similarity.amax(dim=1))
    return torch.cat(nearest)


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
