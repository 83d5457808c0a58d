"""CDPruner: a determinantal point process over tokens, weighed by their relevance to the question."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import TokenReducer
from spatiotoken.tokens.budgets import even_quotas, first_picks, whole_share
from spatiotoken.tokens.merging import paired_dot, question_direction

_KERNEL = 1 << 23
"""Kernel entries that are held at a time."""
_FEW = 8
"""Picks are few if they are less than one in so many of a frame's tokens."""
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


def cdpruner_order(tokens: Tensor, weights: Tensor, count: int) -> Tensor:
    """``[T, count]`` distinct indices in the order in which the greedy search picks them, in each frame by itself.

    Greedy MAP of a determinantal point process with kernel ``weight_i * <token_i, token_j> * weight_j``: the pick that
    enlarges the determinant most, by an incremental Cholesky factorisation. Ties go to the lowest index. Once the
    picks span the others, these follow by weight and length (the authors then take roots of rounding errors).

    The kernel's rows are computed pick by pick where only a few are needed, else all at once, ``N x N`` for a frame.

    Args:
        tokens: ``[T, N, D]`` float32.
        weights: ``[T, N]``, not negative: the tokens' relevance, over their length where this is not 1.
    """
    residual = weights.square() * paired_dot(tokens, tokens)
    if count * _FEW > tokens.shape[1]:
        step = max(1, _KERNEL // tokens.shape[1] ** 2)
        parts = zip(tokens.split(step), weights.split(step), residual.split(step), strict=True)
        return torch.cat([_greedy_map(*part, count) for part in parts])
    return _greedy_map(tokens, weights, residual, count)


def _greedy_map(tokens: Tensor, weights: Tensor, residual: Tensor, count: int) -> Tensor:
    places = tokens.shape[1]
    products = (tokens @ tokens.mT).flatten(0, 1) if count * _FEW > places else None
    start = places * torch.arange(tokens.shape[0], device=tokens.device)
    floor = _NOISE * residual
    factors = tokens.new_zeros(*weights.shape, count)
    never = residual.new_full((tokens.shape[0],), -torch.inf)
    picks: list[Tensor] = []
    for done in range(count):
        pick = residual.argmax(dim=1)
        at = start + pick
        row = products.index_select(0, at) if products is not None else _times(tokens, at)
        row = row * weights * weights.take(at)[:, None] - _times(factors, at)
        factors[..., done] = row / residual.take(at).clamp(min=1e-30).sqrt()[:, None]
        residual = torch.maximum(residual - factors[..., done].square(), floor)
        residual.put_(at, never)
        floor.put_(at, never)
        picks.append(pick)
    return torch.stack(picks, dim=1)


def _times(rows: Tensor, at: Tensor) -> Tensor:
    """``[T, N]`` products of ``rows [T, N, C]`` with one row of each group, the rows ``at [T]`` of all."""
    # Transposed, a column is what MKL expects: with its last axis added it takes ten times as long.
    return (rows @ rows.flatten(0, 1).index_select(0, at)[:, None].mT)[..., 0]


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
        frames = video.frames.float()
        lengths = torch.linalg.vector_norm(frames, dim=-1).clamp(min=1e-12)
        relevance = cdpruner_relevance(frames @ question_direction(video.needed("question")) / lengths)
        quotas = even_quotas(count, relevance.mean(dim=1), places)
        order = cdpruner_order(frames, relevance / lengths, -(-count // video.grid[0]))
        return ReducedTokens.pruned(video, first_picks(order, quotas, places, count))
