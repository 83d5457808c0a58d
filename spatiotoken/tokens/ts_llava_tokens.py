"""TS-LLaVA's tokens: sampled at equal distances from the tokens of all frames."""

from __future__ import annotations

from typing import ClassVar

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

    Their model also sees a thumbnail of a few frames: ``prompts.thumbnail_inputs``.
    """

    kind: ClassVar[str] = "baseline"
    complexity: ClassVar[str] = "O(TN)"
    fidelity: ClassVar[str] = "authors' vectors"

    retention: Retention = 0.1

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        count = ts_llava_tokens_count(video.num_tokens, self.retention)
        if count == video.num_tokens:
            return ReducedTokens.everything(video)
        return ReducedTokens.pruned(
            video, ts_llava_tokens_selection(video.num_tokens, count).to(video.embeddings.device)
        )
