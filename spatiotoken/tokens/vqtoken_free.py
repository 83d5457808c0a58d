"""VQToken's codebook of a clip's tokens by k-means, without its trained attention."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import TokenReducer
from spatiotoken.tokens.components import best_in_group
from spatiotoken.tokens.merging import mean_by_assignment

_CELLS = 1 << 24
"""Similarities of tokens with codes that are held at once."""


def vqtoken_free_count(num_tokens: int, retention: float) -> int:
    """How many codes there are, at most if their number is adaptive: the truncated share, at least one."""
    return max(1, int(num_tokens * retention + 1e-9))


def farthest_tokens(unit: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``[count]`` distinct tokens far from each other by cosine: the most typical one, then always the farthest.

    Ties go to the lowest index.

    Args:
        unit: ``[n, D]`` of length 1.

    Returns:
        The tokens, and ``[count]`` the distortion that is left with each as the last: the sum of distances of all
        tokens to the nearest one.
    """
    pick = (unit @ unit.mean(dim=0)).argmax(0, keepdim=True)
    picks, distortion = pick.new_empty(count), unit.new_empty(count)
    distance = unit.new_full((unit.shape[0],), torch.inf)
    for place in range(count):
        picks[place : place + 1] = pick
        distance = torch.minimum(distance, 1 - unit @ unit.index_select(0, pick)[0])
        distance.index_fill_(0, pick, -torch.inf)  # below every real one: never picked twice
        distortion[place] = distance.clamp(min=0).sum()
        pick = distance.argmax(0, keepdim=True)
    return picks, distortion


def elbow(distortion: Tensor) -> int:
    """How many codes are enough: where the gain by one more falls off most, between 0.6 of them and all."""
    count = distortion.shape[0]
    least = max(2, round(0.6 * count))
    if least >= count:
        return count
    gain = -distortion.diff()[least - 2 :]
    return least + int((gain[:-1] - gain[1:]).argmax())


def best_codes(unit: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """``[n]`` cosine with the nearest code, and ``[n]`` which one that is, of equals the first."""
    best = [(part @ codes.T).max(dim=1) for part in unit.split(max(1, _CELLS // codes.shape[0]))]
    return torch.cat([part.values for part in best]), torch.cat([part.indices for part in best])


def spherical_kmeans(unit: Tensor, codes: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Clusters by cosine, beginning with the given codes; those that lose all members stay where they were.

    Returns:
        ``[n]`` cosine of each token with its code, and ``[n]`` the code.
    """
    fit, labels = best_codes(unit, codes)
    for _ in range(iterations):
        means = mean_by_assignment(unit, labels, codes.shape[0])
        codes = torch.where(means.any(dim=1, keepdim=True), normalize(means, dim=-1), codes)
        before = labels
        fit, labels = best_codes(unit, codes)
        if torch.equal(labels, before):
            break
    return fit, labels


def represent(fit: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``[count]`` the token nearest each code among its members, and ``[n]`` labels in which every code has a member.

    A code without members gets the token that fits its own code worst, of those that do not stand for one themselves.

    Args:
        fit: ``[n]`` cosine of each token with its code, of ``labels [n]``.
    """
    source = best_in_group(fit, labels, count)
    empty = labels[source] != torch.arange(count, device=labels.device)
    taken = torch.zeros_like(fit).index_add_(0, source, (~empty).float()) > 0
    worst = fit.masked_fill(taken, torch.inf).argsort(stable=True)
    source = torch.where(empty, worst[empty.cumsum(0) - 1], source)
    return source, labels.index_copy(0, source, torch.arange(count, device=labels.device))


class VQTokenFree(TokenReducer, method="vqtoken_free", paper="2503.16980"):
    """A small codebook of the clip by k-means, the part of VQToken that needs no training (arXiv 2503.16980).

    All ``[TN, D]`` tokens are clustered by cosine; each cluster's mean takes the place of the member nearest to it,
    with its position ids. There are ``int(retention * TN)`` codes, or with ``adaptive`` between 0.6 of these and all,
    up to where the gain by one more falls off most (the paper's adaptive length; its code tries 12 to 20 codes).

    k-means begins with tokens that are far from each other, so that it is deterministic (the authors' with random ones,
    and anew for each number of codes, where here the distortion of the first choice tells the number). Codes are means
    of tokens as they are, not of tokens of length 1, since no trained layer follows; theirs feeds an attention over the
    map of code indices, which is left out. A code that loses its members takes the token that fits its own one worst.
    """

    kind: ClassVar[str] = "segmentation and merging"
    merges: ClassVar[bool] = True
    complexity: ClassVar[str] = "O(K TN D) per iteration for K kept"
    fidelity: ClassVar[str] = "paper only"

    retention: Retention = 0.005
    adaptive: bool = Field(False, description="fewer codes, down to 0.6 of the budget, where more gain little")
    iterations: int = Field(10, ge=0, le=300, description="most iterations of k-means")

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        count = vqtoken_free_count(video.num_tokens, self.retention)
        if count == video.num_tokens:
            return ReducedTokens.everything(video)
        unit = normalize(video.embeddings.float(), dim=-1)
        picks, distortion = farthest_tokens(unit, count)
        codes = unit[picks[: elbow(distortion)] if self.adaptive else picks]
        source, labels = represent(*spherical_kmeans(unit, codes, self.iterations), codes.shape[0])
        source, order = source.sort()
        labels = order.argsort()[labels]
        return ReducedTokens(mean_by_assignment(video.embeddings, labels, source.shape[0]), source, labels)
