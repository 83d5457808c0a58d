"""TS-LLaVA's tokens: sampled at equal distances from the tokens of all frames."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.frames.ts_llava import linspace_indices
from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import TokenReducer
from spatiotoken.tokens.budgets import whole_share


def ts_llava_tokens_count(num_tokens: int, retention: float) -> int:
    """How many tokens are kept: the truncated share, at least one."""
    return whole_share(num_tokens, retention)


def ts_llava_tokens_selection(num_tokens: int, count: int) -> Tensor:
    """``[count]`` distinct indices, rising, from the first token of the first frame to the last of the last."""
    return linspace_indices(num_tokens, count)


class TSLlavaTokens(TokenReducer, method="ts_llava_tokens", paper="2411.11066"):
    """Token sampling of TS-LLaVA: at equal distances through the tokens of all frames (arXiv 2411.11066).

    The tokens of a video count as one line, frame after frame and row after row; whatever they show, those at the
    rounded places of a ``linspace`` are kept, unchanged. The authors keep 2880 of 50 frames of 576 tokens each, which
    is the default ``retention``; they renumber positions (``positions: compact``), and refuse videos that have fewer
    tokens than that. Where theirs rounds two places to one token and keeps it twice, this keeps the next one.

    Their model also sees a thumbnail of a few frames: ``prompts.thumbnail_inputs``. For a model that takes images only
    (the authors' LLaVA), whose prompt is the thumbnail and the frames as images, ``images: frames`` with ``thumbnail:
    first`` or ``last`` leaves that one whole and takes ``retention`` of the others' tokens.
    """

    kind: ClassVar[str] = "baseline"
    complexity: ClassVar[str] = "O(TN)"
    fidelity: ClassVar[str] = "authors' vectors"

    retention: Retention = 0.1

    thumbnail: Literal["none", "first", "last"] = Field("none", description="which frame is a thumbnail, left whole")

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        per_frame = video.tokens_per_frame if self.thumbnail != "none" and video.grid[0] > 1 else 0
        sampled = video.num_tokens - per_frame
        count = ts_llava_tokens_count(sampled, self.retention)
        if count == sampled:
            return ReducedTokens.everything(video)
        chosen = ts_llava_tokens_selection(sampled, count)
        if self.thumbnail == "first":
            chosen = torch.cat([torch.arange(per_frame), chosen + per_frame])
        elif self.thumbnail == "last":
            chosen = torch.cat([chosen, torch.arange(per_frame) + sampled])
        return ReducedTokens.pruned(video, chosen.to(video.embeddings.device))
