"""CDPruner: a determinantal point process over tokens, weighed by their relevance to the question."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import TokenReducer
from spatiotoken.tokens.budgets import even_quotas, first_picks, whole_share
from spatiotoken.tokens.merging import question_direction

_KERNEL = 1 << 23
"""Kernel entries that are held at a time."""
_NOISE = 1e-5
"""Share of its own kernel entry below which a token's residual is rounding error: it depends on those picked."""


def cdpruner_count(num_tokens: int, retention: float) -> int:
    """How many tokens are kept: the truncated share, at least one."""
    return whole_share(num_tokens, retention)


def cdpruner_relevance(similarity: Tensor) -> Tensor:
    """``similarity`` stretched over (0, 1] by its extremes; ones where these differ by no more than rounding."""
    low, high = similarity.amin(), similarity.amax()
    stretched = (similarity - low + 1e-6) / (high - low).clamp(min=1e-12)
    return torch.where(high - low > 1e-6, stretched, 1.0)


def cdpruner_order(unit: Tensor, relevance: Tensor, count: int) -> Tensor:
    """``[T, count]`` distinct indices in the order in which the greedy search picks them, in each frame by itself.

    Greedy MAP of a determinantal point process with kernel ``relevance_i * cos_ij * relevance_j``: the pick that
    enlarges the determinant most, by an incremental Cholesky factorisation. Ties go to the lowest index. Once the
    picks span the others, these follow by relevance (the authors then take roots of rounding errors).

    Args:
        unit: ``[T, N, D]`` float32 tokens of length 1 (or 0).
        relevance: ``[T, N]``, not negative.
    """
    step = max(1, _KERNEL // unit.shape[1] ** 2)
    parts = zip(unit.split(step), relevance.split(step), strict=True)
    return torch.cat([_greedy_map(*part, count) for part in parts])


def _greedy_map(unit: Tensor, relevance: Tensor, count: int) -> Tensor:
    kernel = relevance[:, :, None] * (unit @ unit.transpose(1, 2)) * relevance[:, None]
    residual = kernel.diagonal(dim1=1, dim2=2).clone()
    floor = _NOISE * residual
    factors = kernel.new_empty(kernel.shape[0], count, kernel.shape[2])
    picks: list[Tensor] = []
    for done in range(count):
        pick = residual.argmax(dim=1, keepdim=True)
        past, at = factors[:, :done], pick[:, :, None]
        row = kernel.gather(1, at.expand(-1, -1, kernel.shape[2]))
        row = row - past.gather(2, at.expand(-1, done, -1)).transpose(1, 2) @ past
        factors[:, done] = row[:, 0] / residual.gather(1, pick).clamp(min=1e-30).sqrt()
        residual = torch.maximum(residual - factors[:, done].square(), floor)
        residual.scatter_(1, pick, -torch.inf)
        floor.scatter_(1, pick, -torch.inf)
        picks.append(pick)
    return torch.cat(picks, dim=1)


class CDPruner(TokenReducer, method="cdpruner", paper="2506.10967"):
    """Diverse visual tokens of each frame, conditioned on the question (arXiv 2506.10967).

    Keeps ``int(retention * N)`` of the ``[N, D]`` tokens, unchanged, with their positions: an equal number of each
    frame, what is left over (or all, if there are fewer tokens than frames) one each of the most relevant frames. In a
    frame they are the greedy MAP of a determinantal point process whose kernel is the cosine of two tokens times the
    relevance of both.

    The authors' relevance comes from CLIP's text tower, and their code negates it, against the paper. A language
    model's own vision tower has no such text tower, so here it is the cosine to the mean ``question`` embedding in the
    language model's space, not negated, stretched over (0, 1] by the extremes of the clip. From the relevance on, the
    selection is theirs; their vectors are reproduced from their relevance.
    """

    kind: ClassVar[str] = "importance and diversity"
    needs: ClassVar[frozenset[str]] = frozenset({"question"})
    complexity: ClassVar[str] = "O(TN^2 (D + K^2 / N)) for K kept per frame"
    fidelity: ClassVar[str] = "authors' vectors, in part"

    retention: Retention = 0.112

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        count, places = cdpruner_count(video.num_tokens, self.retention), video.tokens_per_frame
        if count == video.num_tokens:
            return ReducedTokens.everything(video)
        unit = torch.nn.functional.normalize(video.frames.float(), dim=-1)
        relevance = cdpruner_relevance(unit @ question_direction(video.needed("question")))
        quotas = even_quotas(count, relevance.mean(dim=1), places)
        order = cdpruner_order(unit, relevance, -(-count // video.grid[0]))
        return ReducedTokens.pruned(video, first_picks(order, quotas, places, count))
