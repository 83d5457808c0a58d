"""AIM: the merging of similar tokens within each frame that it does before the language model."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import TokenReducer
from spatiotoken.tokens.matching import bipartite_matching, merge_matched


def aim_count(tokens_per_frame: int, retention: float) -> int:
    """How many tokens each frame keeps: the share rounded up, which at 0.25 is what the authors keep of a square."""
    return max(1, math.ceil(tokens_per_frame * retention - 1e-9))


def aim_merge(frames: Tensor, count: int, weighted: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Halve each frame by bipartite matching until ``count`` tokens are left; the last step merges only what it must.

    Args:
        frames: ``[T, N, D]``.
        weighted: weigh by the number of tokens that each is made of already.

    Returns:
        ``[T, count, D]`` float32 means and ``[T, count]`` the token of the frame whose place each takes, both in ToMe's
        order, and ``[T, N]`` which of these each token goes to.
    """
    values = frames.float()
    index = owner = torch.arange(frames.shape[1], device=frames.device).expand(frames.shape[0], -1)
    sizes: Tensor | None = None
    while values.shape[1] > count:
        left, places = bipartite_matching(values, values.shape[1] - count)
        values, merged_sizes = merge_matched(values, sizes, places, left.shape[1])
        sizes = merged_sizes if weighted else None
        index, owner = index.gather(1, left), places.gather(1, owner)
    return values, index, owner


class AIM(TokenReducer, method="aim", paper="2412.03248"):
    """Merges the most similar tokens of each frame in pairs, halving it step by step (arXiv 2412.03248).

    Each step splits the ``[N, D]`` tokens of a frame into even and odd ones and merges even ones into their most
    similar odd one, whose place the mean takes (ToMe's matching, arXiv 2210.09461); the first halves the frame, as
    does the second, and so on until ``ceil(retention * N)`` are left. 0.25 gives the authors' two steps on every
    square grid; on a frame of ``4 n + 3`` tokens they would leave one more.

    As released, a step takes the plain mean of what it merges, even where one of these is a mean already, so that late
    comers weigh more; ``weighted`` counts the tokens instead. A survivor is a convex combination of the tokens that
    are assigned to it. Tokens stay in place and keep their position ids, where the authors leave unmerged tokens in
    order of similarity. AIM's second part, pruning in the language model, is ``layers: aim_prune``.
    """

    kind: ClassVar[str] = "segmentation and merging"
    merges: ClassVar[bool] = True
    complexity: ClassVar[str] = "O(T N^2 D)"
    fidelity: ClassVar[str] = "authors' vectors"

    retention: Retention = 0.25
    weighted: bool = Field(False, description="weigh a token by how many it is made of; the authors do not")

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        places = video.tokens_per_frame
        count = aim_count(places, self.retention)
        if count == places:
            return ReducedTokens.everything(video)
        values, index, owner = aim_merge(video.frames, count, self.weighted)
        time = torch.arange(video.grid[0], device=index.device)[:, None]
        source, order = (index + time * places).flatten().sort()
        assignment = order.argsort()[(owner + time * count).flatten()]
        return ReducedTokens(values.flatten(0, 1).index_select(0, order).to(video.embeddings.dtype), source, assignment)
