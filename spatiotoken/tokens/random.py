"""Baseline: uniformly random tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import TokenReducer


def random_count(num_tokens: int, retention: float) -> int:
    """How many tokens are kept: the rounded share, at least one."""
    return max(1, round(num_tokens * retention))


def random_selection(num_tokens: int, count: int, seed: int) -> Tensor:
    """``[count]`` distinct indices, rising; drawn on the CPU, so the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_tokens, generator=generator)[:count].sort().values


class Random(TokenReducer, method="random"):
    """Uniformly random tokens, seeded: the baseline that a method has to beat.

    The same seed keeps the same tokens of every video of the same size, so batches equal single prompts.
    """

    kind: ClassVar[str] = "baseline"
    complexity: ClassVar[str] = "O(TN)"
    fidelity: ClassVar[str] = "not published"

    retention: Retention = 0.25
    seed: int = Field(0, ge=0, description="seed of the draw")

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        count = random_count(video.num_tokens, self.retention)
        source = random_selection(video.num_tokens, count, self.seed).to(video.embeddings.device)
        return ReducedTokens.pruned(video, source)
