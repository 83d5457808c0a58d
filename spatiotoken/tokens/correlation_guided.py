"""Correlation-guided compression: repeated patterns say how many tokens to keep, the frame's summary which."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import TokenReducer
from spatiotoken.tokens.long_tail import long_tail_mask, similarity_to_frame

_CHUNK = 1024
"""Rows that are compared with all tokens of their frame at once; bounds the memory to ``_CHUNK * N``."""


def lookalikes(frames: Tensor, similarity: float) -> Tensor:
    """``[T, N]`` how many others in its frame of ``frames [T, N, D]`` have a cosine above ``similarity`` to a token."""
    counts = []
    for frame in frames:
        unit = torch.nn.functional.normalize(frame.float(), dim=-1)
        for start in range(0, unit.shape[0], _CHUNK):
            cosine = unit[start : start + _CHUNK] @ unit.T
            cosine.diagonal(offset=start).fill_(-torch.inf)
            counts.append((cosine > similarity).sum(dim=1))
    return torch.cat(counts).view(frames.shape[:2])


def correlation_guided_counts(lookalikes: Tensor, repeats: float) -> Tensor:
    """``[T]`` how many tokens of each frame are kept: as many as are not redundant, at least one.

    A token is redundant if more than the share ``repeats`` of the other tokens of its frame look like it.
    """
    redundant = lookalikes > repeats * (lookalikes.shape[1] - 1)
    return (~redundant).sum(dim=1).clamp(min=1)


class CorrelationGuided(TokenReducer, method="correlation_guided", paper="2407.14439"):
    """Keep as many tokens as are not repeated in their frame, those most like its summary (arXiv 2407.14439).

    An image method, applied to every frame (the paper's are the sub-images of a document). The information density
    of a frame is the share of its tokens ``[N, D]`` that few others look like, by the cosine of their features in the
    vision tower. That share of the frame is kept, unchanged: the tokens whose features have the highest cosine with
    the tower's summary of the frame. How many these are depends on the picture.

    Built from the paper's description; its code is not public. The bounds that make a token redundant are ours, and
    its sampling by the correlation with the CLS token is the deterministic choice of the highest.
    """

    kind: ClassVar[str] = "importance and diversity"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden", "frame_features"})
    complexity: ClassVar[str] = "O(TN^2 D)"
    fidelity: ClassVar[str] = "paper only"

    similarity: float = Field(0.8, ge=-1, lt=1, description="cosine above which two tokens of a frame look alike")
    repeats: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of the other tokens of its frame that a redundant one looks like; 1 keeps all",
    )

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        if self.repeats == 1.0:
            return ReducedTokens.everything(video)
        hidden, summary = video.needed("hidden"), video.needed("frame_features")
        counts = correlation_guided_counts(
            lookalikes(hidden.unflatten(0, (summary.shape[0], -1)), self.similarity), self.repeats
        )
        mask = long_tail_mask(similarity_to_frame(hidden, summary), counts)
        return ReducedTokens.pruned(video, mask.flatten().nonzero()[:, 0])
