"""CATP: tokens that stand for their picture and match the question."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import TokenReducer
from spatiotoken.tokens.budgets import even_quotas, first_picks, whole_share
from spatiotoken.tokens.merging import question_direction

_SIMILARITIES = 1 << 23
"""Similarities that are held at a time."""


def catp_count(num_tokens: int, retention: float) -> int:
    """How many tokens are kept: the truncated share, at least one."""
    return whole_share(num_tokens, retention)


def catp_order(unit: Tensor, alignment: Tensor, count: int, alignment_weight: float) -> Tensor:
    """``[T, count]`` distinct indices in the order in which the greedy search picks them, in each frame by itself.

    Greedy maximum of a submodular function of the picks: over all tokens of the frame, the similarity to the nearest
    pick, plus ``alignment_weight`` times the summed alignment of the picks. Ties go to the lowest index.

    Args:
        unit: ``[T, N, D]`` float32 tokens of length 1 (or 0); a similarity is a cosine rescaled to [0, 1].
        alignment: ``[T, N]`` similarity to the text, rescaled likewise.
    """
    step = max(1, _SIMILARITIES // unit.shape[1] ** 2)
    parts = zip(unit.split(step), (alignment_weight * alignment).split(step), strict=True)
    return torch.cat([_greedy_cover(*part, count) for part in parts])


def _greedy_cover(unit: Tensor, worth: Tensor, count: int) -> Tensor:
    similarity = (unit @ unit.transpose(1, 2) + 1) / 2
    covered = torch.zeros_like(worth)
    together = torch.empty_like(similarity)
    picks: list[Tensor] = []
    for _ in range(count):
        torch.maximum(similarity, covered[:, None], out=together)
        pick = (together.sum(dim=-1) + worth).argmax(dim=1, keepdim=True)
        covered = together.gather(1, pick[:, :, None].expand(-1, -1, together.shape[2]))[:, 0]
        worth = worth.scatter(1, pick, -torch.inf)
        picks.append(pick)
    return torch.cat(picks, dim=1)


class CATP(TokenReducer, method="catp", paper="2508.07871"):
    """Tokens of each picture that cover it and align with the text: the first stage of CATP (arXiv 2508.07871).

    Keeps ``int(retention * N)`` of the ``[N, D]`` tokens, unchanged, with their positions: an equal number of each
    frame, what is left over (or all, if there are fewer tokens than frames) one each of the frames that align best. In
    a frame they maximise, greedily, facility location (how well all tokens are stood for by the nearest kept one) plus
    ``alignment_weight`` times the alignment with the mean ``question`` embedding; cosines are rescaled to [0, 1].

    Written from the paper, which prunes each image of an in-context sequence with the text that is paired with it: here
    every frame or image is paired with the text that follows all pictures. Its second stage, in two decoder layers, is
    left out, so of its ratio ``R`` of pruned tokens only half goes: the default is that of ``R = 77.8 %``.
    """

    kind: ClassVar[str] = "importance and diversity"
    needs: ClassVar[frozenset[str]] = frozenset({"question"})
    complexity: ClassVar[str] = "O(TN^2 (D + K)) for K kept per frame"
    fidelity: ClassVar[str] = "paper only"

    retention: Retention = 0.611
    alignment_weight: float = Field(0.7, ge=0, description="weight of the alignment with the text against diversity")

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        count, places = catp_count(video.num_tokens, self.retention), video.tokens_per_frame
        if count == video.num_tokens:
            return ReducedTokens.everything(video)
        unit = torch.nn.functional.normalize(video.frames.float(), dim=-1)
        alignment = (unit @ question_direction(video.needed("question")) + 1) / 2
        quotas = even_quotas(count, alignment.mean(dim=1), places)
        order = catp_order(unit, alignment, -(-count // video.grid[0]), self.alignment_weight)
        return ReducedTokens.pruned(video, first_picks(order, quotas, places, count))
