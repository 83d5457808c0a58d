"""DyCoke: of each four frames the later ones keep what differs most from the earlier ones."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import TokenReducer
from spatiotoken.tokens.merging import cosine, paired_dot, top_indices


def dycoke_places(tokens_per_frame: int, merging_ratio: float) -> int:
    """How many tokens a cut frame keeps: the truncated share."""
    return int((1 - merging_ratio) * tokens_per_frame)


def dycoke_thirds(num_frames: int, reference: bool = False) -> int:
    """In how many groups of four the third frame is cut: in all that have one, or in all but the last group."""
    return (num_frames - 1) // 4 if reference else (num_frames + 1) // 4


def dycoke_count(num_frames: int, tokens_per_frame: int, merging_ratio: float, reference: bool = False) -> int:
    """How many tokens of the clip are kept."""
    cut = num_frames // 2 + dycoke_thirds(num_frames, reference)
    return (num_frames - cut) * tokens_per_frame + cut * dycoke_places(tokens_per_frame, merging_ratio)


def dycoke_selection(frames: Tensor, merging_ratio: float, reference: bool = False) -> Tensor:
    """``[dycoke_count]`` indices of the kept tokens, rising.

    Of each four frames the second is compared with the first, the fourth with the third and the third with the
    first, place by place, all as they were before any dropping; the least similar tokens stay. Ties go to the lowest
    index. A shorter last group is treated alike, as far as it goes.

    Args:
        frames: ``[T, N, D]``.
        reference: leave the third frame of the last group whole.
    """
    num_frames, places = frames.shape[:2]
    index = torch.arange(num_frames * places, device=frames.device).view(num_frames, places)
    pairs, thirds = num_frames // 2, dycoke_thirds(num_frames, reference)
    squares = paired_dot(frames, frames)
    similarity = torch.cat(
        [
            cosine(paired_dot(frames[later], frames[earlier]), squares[later], squares[earlier])
            for later, earlier in (
                (slice(1, None, 2), slice(0, 2 * pairs, 2)),
                (slice(2, 4 * thirds, 4), slice(0, 4 * thirds, 4)),
            )
        ]
    )
    different = top_indices(similarity, dycoke_places(places, merging_ratio), largest=False)
    cut = torch.cat([index[1::2], index[2::4][:thirds]]).gather(1, different)
    return torch.cat([part.flatten() for part in (index[::4], index[2::4][thirds:], cut)]).sort().values


class DyCoke(TokenReducer, method="dycoke", paper="2411.15024"):
    """Temporal token merging in groups of four frames, by the similarity of equal places (arXiv 2411.15024).

    In each group the first frame is whole; the second is compared with the first, the fourth with the third, and the
    third with the first. A compared frame keeps the ``int((1 - merging_ratio) * N)`` of its ``N`` tokens ``[D]`` that
    are least similar to the same place, unchanged, with their position ids; the others are dropped, their earlier
    twins standing for them (nothing is averaged). About ``1 - 3/4 merging_ratio`` of a clip is left.

    The authors' code fails on clips of up to four frames, loses an odd last frame, never cuts the third frame of the
    last group, and leaves the tokens of a cut frame in order of similarity; here short and odd clips work, every group
    is treated alike, and tokens stay in place. ``reference`` restores the third point, which the published numbers
    rest on. Their second part, dropping KV cache at each decoding step, is no matter of this stage: left out.
    """

    kind: ClassVar[str] = "temporal redundancy"
    complexity: ClassVar[str] = "O(TND)"
    fidelity: ClassVar[str] = "authors' vectors"

    merging_ratio: float = Field(0.7, ge=0, le=1, description="share of a compared frame's tokens that is dropped")
    reference: bool = Field(False, description="leave the third frame of the last group whole, as the authors do")

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        count = dycoke_count(video.grid[0], video.tokens_per_frame, self.merging_ratio, self.reference)
        if count == video.num_tokens:
            return ReducedTokens.everything(video)
        return ReducedTokens.pruned(video, dycoke_selection(video.frames, self.merging_ratio, self.reference))
