"""Learning-free token reduction: merge in time what repeats, then drop in each frame what is redundant."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import TokenReducer
from spatiotoken.tokens.merging import mean_by_assignment, paired_cosine


def learning_free_count(num_tokens: int, retention: float) -> int:
    """How many tokens are kept: the truncated share, at least one."""
    return max(1, int(num_tokens * retention))


def temporal_count(num_frames: int, places: int, retention: float, temporal: float) -> int:
    """How many tokens merging in time leaves: one per place at least, and never fewer than are kept in the end."""
    total = num_frames * places
    return max(places, learning_free_count(total, retention), round(total * retention**temporal))


def temporal_runs(frames: Tensor, count: int) -> Tensor:
    """``[T * N]`` bool: tokens that begin a run in time, ``count`` of them; the others join the token before them.

    The most similar pairs of neighbours in time, at one place of ``frames [T, N, D]``, are joined; of equals the first.
    """
    similarity = paired_cosine(frames[1:], frames[:-1]).flatten()
    places = frames.shape[1]
    begins = torch.ones(similarity.shape[0] + places, dtype=torch.bool, device=frames.device)
    begins[similarity.argsort(descending=True, stable=True)[: begins.shape[0] - count] + places] = False
    return begins


def spatial_selection(tokens: Tensor, frame: Tensor, num_frames: int, count: int) -> Tensor:
    """``[count]`` rising indices of the most significant of ``tokens [n, D]``, the same share of each frame's.

    A token is significant if its mean cosine with the tokens of its frame is low; of equals the first wins.

    Args:
        frame: ``[n]`` int64, rising: which of ``num_frames`` frames each token belongs to.
    """
    unit = torch.nn.functional.normalize(tokens.float(), dim=-1)
    total = unit.new_zeros(num_frames, unit.shape[1]).index_add_(0, frame, unit)
    size = torch.zeros(num_frames, dtype=torch.int64, device=frame.device).index_add_(0, frame, torch.ones_like(frame))
    alike = (unit * total[frame]).sum(dim=-1) / size[frame]
    by_frame = alike.argsort(stable=True)
    by_frame = by_frame[frame[by_frame].argsort(stable=True)]  # frame by frame, the least like the others first
    rank = torch.arange(frame.shape[0], device=frame.device) - (size.cumsum(0) - size)[frame]
    # The middle of each token's share of its frame: cutting all frames at one height leaves each the same share.
    height = torch.empty_like(alike).index_copy_(0, by_frame, (rank + 0.5) / size[frame])
    return height.argsort(stable=True)[:count].sort().values


class LearningFree(TokenReducer, method="learning_free", paper="2501.17391"):
    """Neighbours in time merged, then redundant tokens of each frame dropped, learning-free (arXiv 2501.17391).

    Built from the abstract of the paper (titled LFTR later) and summaries of it, without code to compare with: first
    neighbouring tokens are merged in time, then the less significant are removed in space, both by similarity, to 16
    times fewer tokens in all. The rest is filled in here. In time, the pairs of one place in neighbouring frames with
    the highest cosine are joined until ``retention ** temporal`` of the ``T * N`` tokens ``[D]`` are left, or one per
    place; a run becomes its mean, at the place of its first token. In space, each frame keeps the same share of its
    tokens, those with the lowest mean cosine to the others, until ``int(retention * T * N)`` are left in all (at least
    one); the members of a dropped run are assigned to none. Ties go to the lowest index.
    """

    kind: ClassVar[str] = "temporal redundancy"
    merges: ClassVar[bool] = True
    complexity: ClassVar[str] = "O(TND)"
    fidelity: ClassVar[str] = "paper only"

    retention: Retention = 0.0625
    temporal: float = Field(0.5, ge=0, le=1, description="exponent of the retention that merging in time brings about")

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        count = learning_free_count(video.num_tokens, self.retention)
        if count == video.num_tokens:
            return ReducedTokens.everything(video)
        frames, places = video.grid[0], video.tokens_per_frame
        joined = temporal_count(frames, places, self.retention, self.temporal)
        begins = temporal_runs(video.frames, joined)
        index = torch.arange(video.num_tokens, device=begins.device)
        first = (index * begins).view(frames, places).cummax(dim=0).values.flatten()
        run = (begins.cumsum(0) - 1)[first]
        source = begins.to(torch.uint8).argsort(descending=True, stable=True)[:joined]
        merged = mean_by_assignment(video.embeddings, run, joined)
        chosen = spatial_selection(merged, source // places, frames, count)
        rank = torch.full_like(source, -1).index_copy_(0, chosen, index[:count])
        return ReducedTokens(merged[chosen], source[chosen], rank[run])
