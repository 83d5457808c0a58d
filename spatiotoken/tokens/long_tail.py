"""Long-tail pruning: cut the sorted similarity to the whole picture at its knee."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import TokenReducer
from spatiotoken.tokens.budgets import leading


def similarity_to_frame(hidden: Tensor, frame_features: Tensor) -> Tensor:
    """``[T, N]`` cosine between the tokens ``[T * N, D]`` of each frame and its summary ``[T, D]``."""
    summary = torch.nn.functional.normalize(frame_features.float(), dim=-1)[:, None]
    tokens = hidden.float().unflatten(0, (summary.shape[0], -1))
    # Not a matrix product: that may round equal tokens differently, and ties would not go to the lowest index.
    return (tokens * summary).sum(dim=-1) / torch.linalg.vector_norm(tokens, dim=-1).clamp(min=1e-12)


def long_tail_counts(similarity: Tensor, min_retention: float) -> Tensor:
    """``[T]`` how many tokens of each frame come before the long tail of their sorted similarity ``[T, N]``.

    The knee is the point of the falling curve farthest from the chord between its ends; below the chord the tail
    begins with it, above the chord after it. A straight curve has no knee and is kept whole.
    """
    size = similarity.shape[1]
    curve = similarity.sort(dim=1, descending=True).values
    chord = torch.lerp(curve[:, :1], curve[:, -1:], torch.linspace(0, 1, size, device=curve.device))
    height = curve - chord
    farthest, knee = height.abs().max(dim=1)
    head = knee + (height.gather(1, knee[:, None])[:, 0] > 0)
    return torch.where(farthest > 0, head, size).clamp(min=max(1, round(size * min_retention)))


def long_tail_mask(similarity: Tensor, counts: Tensor) -> Tensor:
    """``[T, N]`` bool, True at the ``counts[t]`` most similar tokens of each frame; ties go to the lowest index."""
    return leading(similarity.argsort(dim=1, descending=True, stable=True), counts)


class LongTail(TokenReducer, method="long_tail", paper="2409.01162"):
    """Cut the long tail of the tokens' sorted similarity to their frame at its knee (arXiv 2409.01162).

    An image method, applied to every frame: its tokens ``[N, D]`` are sorted by the cosine of their features in the
    vision tower with the tower's own summary of the frame, and those before the point farthest from the chord are
    kept, unchanged. How many these are depends on the picture.

    Built from the paper, whose code is not public. Its second cut, inside the language model, is left out, and
    ``min_retention`` is added: 1 keeps everything.
    """

    kind: ClassVar[str] = "importance and diversity"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden", "frame_features"})
    complexity: ClassVar[str] = "O(TN (D + log N))"
    fidelity: ClassVar[str] = "paper only"

    min_retention: float = Field(0.0, ge=0, le=1, description="share of a frame's tokens that is kept in any case")

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        if self.min_retention == 1.0:
            return ReducedTokens.everything(video)
        similarity = similarity_to_frame(video.needed("hidden"), video.needed("frame_features"))
        mask = long_tail_mask(similarity, long_tail_counts(similarity, self.min_retention))
        return ReducedTokens.pruned(video, mask.flatten().nonzero()[:, 0])
