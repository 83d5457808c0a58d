"""VidCom2: more tokens for unusual frames, and of each frame the most unusual tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import TokenReducer
from spatiotoken.tokens.budgets import leading
from spatiotoken.tokens.merging import top_indices

_BANDWIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
"""Of the Gaussian kernels whose sum is the similarity of two tokens."""
_CHUNK = 256
"""Tokens whose variance is summed at once."""


def steady_channels(embeddings: Tensor, share: float) -> Tensor:
    """``[int(D * share)]`` indices, at least one, of the channels that vary least over all tokens ``[N, D]``."""
    mean = embeddings.mean(dim=0, dtype=torch.float32)
    parts = embeddings.split(_CHUNK)  # small enough for the processor's cache, which makes this three times as fast
    deviation = torch.stack([(part.float() - mean).square().sum(dim=0) for part in parts]).sum(dim=0)
    return top_indices(deviation, max(1, int(mean.shape[0] * share)), largest=False)


def vidcom2_scores(frames: Tensor) -> tuple[Tensor, Tensor]:
    """``[T, N]`` similarity of each token of ``frames [T, N, D]`` to the mean of the video, and to that of its frame.

    Tokens have unit length, means do not.
    """
    unit = torch.nn.functional.normalize(frames.float(), dim=-1)
    centre = unit.mean(dim=1, keepdim=True)
    return _similarity(unit, centre.mean(dim=0)), _similarity(unit, centre)


def _similarity(unit: Tensor, centre: Tensor) -> Tensor:
    distance = (unit - centre).square().sum(dim=-1)
    return torch.stack([(distance / (-2 * bandwidth)).exp() for bandwidth in _BANDWIDTHS]).sum(dim=0)


def vidcom2_counts(to_video: Tensor, retention: float, temperature: float) -> Tensor:
    """``[T]`` how many tokens of each frame are kept, from the tokens' similarity ``[T, N]`` to the video.

    A frame's share is ``retention`` times one plus its excess in a softmax over the frames; at least one token.
    """
    share = (to_video.mean(dim=1).neg() / temperature).softmax(dim=0)
    rates = (retention * (1 + share - share.mean())).clamp(max=1)
    return (rates * to_video.shape[1]).round().long().clamp(min=1)


def vidcom2_mask(similarity: Tensor, counts: Tensor) -> Tensor:
    """``[T, N]`` bool, True at the ``counts[t]`` least similar tokens of each frame; ties go to the lowest index."""
    return leading(similarity.argsort(dim=1, stable=True), counts)


class VidCom2(TokenReducer, method="vidcom2", paper="2505.14454"):
    """Keep the tokens least like the video and their frame, more of them in unusual frames (arXiv 2505.14454).

    Tokens ``[T, N, D]`` are compared by the share ``channels`` of their channels that varies least, with a sum of
    Gaussian kernels. A frame keeps the rounded part of its ``N`` tokens that its own dissimilarity to the video gives
    it, at least one, unchanged and with their positions. ``retention`` is the authors' base ratio, about which the
    frames' ratios lie: rounding can add half a token a frame to it. Where it is 1 everything is kept; theirs would
    still cut the ordinary frames.
    """

    kind: ClassVar[str] = "importance and diversity"
    complexity: ClassVar[str] = "O(TND)"
    fidelity: ClassVar[str] = "authors' vectors"

    retention: Retention = 0.25
    channels: float = Field(0.5, gt=0, le=1, description="share of the channels, those that vary least, to compare by")
    temperature: float = Field(0.01, gt=0, description="of the softmax over frames; small gives it all to one frame")

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        if self.retention == 1.0:
            return ReducedTokens.everything(video)
        steady = video.embeddings.index_select(1, steady_channels(video.embeddings, self.channels))
        to_video, to_frame = vidcom2_scores(steady.unflatten(0, (video.grid[0], -1)))
        counts = vidcom2_counts(to_video, self.retention, self.temperature)
        mask = vidcom2_mask(to_video + to_frame, counts)
        return ReducedTokens.pruned(video, mask.flatten().nonzero()[:, 0])
