"""ToDRE: from the most attended token on, always the token that is least like those picked."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import SaliencyReducer
from spatiotoken.tokens.budgets import whole_share
from spatiotoken.tokens.merging import waits_are_free

_FEWEST, _MOST = 32, 256
"""Candidates that the search looks ahead by at a time; no matter for the result."""


def todre_count(num_tokens: int, retention: float) -> int:
    """How many tokens are kept: the truncated share, at least one."""
    return whole_share(num_tokens, retention)


def farthest_first(unit: Tensor, first: Tensor, count: int) -> Tensor:
    """``[count]`` distinct indices: ``first``, then always the token farthest from the nearest of those picked.

    By cosine; ties go to the lowest index, those of copies of one token as far as rounding lets them tie.

    Picking one by one reads all tokens once per pick. On a CPU the search goes on among a few candidates, those
    farthest now, for as long as it is certain that no other token can be the next, and only then are the others
    compared with all that was picked: some thirty rounds for a quarter of 6000 tokens. Memory is ``O(N (D + 256))``.

    Args:
        unit: ``[N, D]`` float32 tokens of length 1 (or 0).
        first: ``[1]`` index.
    """
    if not waits_are_free(unit.device):
        return _one_by_one(unit, first, count)
    picks, done, width = [first], 1, _FEWEST
    likeness = (unit @ unit.index_select(0, first)[0]).index_fill_(0, first, torch.inf)
    while done < count:
        order = likeness.argsort(stable=True)
        near, others = order[:width].sort().values, order[width : width + 1].tolist()
        rows, local = unit[near], likeness[near]
        between, indices = rows @ rows.T, near.tolist()
        # Likeness to the nearest pick can only grow, so no token outside can become the next before this.
        limit = min([(likeness[other].item(), other) for other in others], default=(torch.inf, 0))
        places: list[int] = []
        while len(places) < min(len(indices), count - done):
            place = int(local.argmin())
            if (local[place].item(), indices[place]) > limit:
                break
            places.append(place)
            torch.maximum(local, between[place], out=local)
            local[place] = torch.inf
        chosen = near[places]
        likeness = torch.maximum(likeness, (unit @ unit[chosen].T).amax(dim=1)).index_fill_(0, chosen, torch.inf)
        picks.append(chosen)
        done, width = done + chosen.shape[0], min(max(_FEWEST, 2 * chosen.shape[0]), _MOST)
    return torch.cat(picks)


def _one_by_one(unit: Tensor, first: Tensor, count: int) -> Tensor:
    # Picks stay tensors of one element: indexing with a bare one would make the host wait for the device each time.
    picks = [first]
    likeness = unit.new_full(unit.shape[:1], -torch.inf)
    while len(picks) < count:
        latest = unit @ unit.index_select(0, picks[-1])[0]
        likeness = torch.maximum(likeness, latest).index_fill_(0, picks[-1], torch.inf)
        picks.append(likeness.argmin(0, keepdim=True))
    return torch.cat(picks)


def max_sum_first(unit: Tensor, first: Tensor, count: int) -> Tensor:
    """``[count]`` distinct indices: ``first``, then always the token with the least summed cosine to those picked.

    Ties go to the lowest index. Arguments as of ``farthest_first``.
    """
    picks = [first]
    likeness = torch.zeros_like(unit[:, 0])
    while len(picks) < count:
        likeness += unit @ unit.index_select(0, picks[-1])[0]
        likeness.index_fill_(0, picks[-1], torch.inf)
        picks.append(likeness.argmin(0, keepdim=True))
    return torch.cat(picks)


class ToDRE(SaliencyReducer, method="todre", paper="2505.18757"):
    """Greedy k-centre from the most attended token, over the whole clip (arXiv 2505.18757).

    Keeps ``int(retention * N)`` of the ``[N, D]`` tokens, unchanged, with their positions. The first is the most
    salient of the clip, each next one the farthest by cosine distance from the nearest of those picked, as the first
    version of the paper says; its second version (``objective: max-sum``) takes the one that is least like all of them
    together.

    Written from the paper, without its second stage (dropping all visual tokens in a late decoder layer once text and
    picture hardly attend to each other), which is no matter of this one. No code is public.
    """

    kind: ClassVar[str] = "importance and diversity"
    complexity: ClassVar[str] = "O(K TN D) for K kept"
    fidelity: ClassVar[str] = "paper only"

    retention: Retention = 0.1
    objective: Literal["k-center", "max-sum"] = Field(
        "k-center", description="what the next token is far from: the nearest of those picked, or all of them together"
    )

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        count = todre_count(video.num_tokens, self.retention)
        if count == video.num_tokens:
            return ReducedTokens.everything(video)
        unit = torch.nn.functional.normalize(video.embeddings.float(), dim=-1)
        first = video.needed("saliency")[-1].argmax(0, keepdim=True)
        search = farthest_first if self.objective == "k-center" else max_sum_first
        return ReducedTokens.pruned(video, search(unit, first, count).sort().values)
