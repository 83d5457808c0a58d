"""EVS: drop patches that stay the same as in the previous frame."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import TokenReducer
from spatiotoken.tokens.merging import previous_cosine, top_mask, true_indices


def evs_count(grid: tuple[int, int, int], retention: float) -> int:
    """How many tokens are kept: the truncated share, but never less than the first frame."""
    frames, height, width = grid
    return max(height * width, int(frames * height * width * retention))


def evs_mask(embeddings: Tensor, grid: tuple[int, int, int], count: int) -> Tensor:
    """``[N]`` bool, True at the ``count`` tokens least like the same place one frame before.

    The first frame comes first whatever it shows. Ties go to the lowest index.
    """
    frames, places = embeddings.view(grid[0], -1, embeddings.shape[-1]).float(), grid[1] * grid[2]
    change = 1 - previous_cosine(frames)
    score = torch.cat([change.new_full((places,), torch.inf), change.flatten()])
    return top_mask(score, count)


class EVS(TokenReducer, method="evs", paper="2510.14624"):
    """Efficient video sampling: drop patches that stay the same as in the previous frame (arXiv 2510.14624).

    Keeps ``max(H * W, int(retention * N))`` of the ``[N, D]`` tokens over the whole clip, unchanged, with their
    position ids; the first frame is always whole, so a still image is untouched. ``retention`` is one minus the
    authors' pruning rate ``q``.
    """

    kind: ClassVar[str] = "temporal redundancy"
    complexity: ClassVar[str] = "O(TND)"
    fidelity: ClassVar[str] = "authors' vectors"

    retention: Retention = 0.25

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        count = evs_count(video.grid, self.retention)
        return ReducedTokens.pruned(video, true_indices(evs_mask(video.embeddings, video.grid, count), count))
