"""EarlyTom's first stage: of alike frames those in the middle merge, early in the tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.tokens.merging import cosine, paired_dot
from spatiotoken.vision.base import TowerMerge, TowerReducer, TowerShape, TowerTokens

_FRAMES = 32
"""Frames that are compared with later ones at a time."""


def near_cosines(frames: Tensor, reach: int) -> Tensor:
    """``[T, reach]`` float32 mean cosine over places of each of ``frames [T, N, D]`` with the next ``reach``.

    Nothing is similar to what lies beyond the end.
    """
    found = frames.new_zeros(frames.shape[0], reach, dtype=torch.float32)
    for start in range(0, frames.shape[0], _FRAMES):
        block = frames[start : start + _FRAMES + reach].float()
        squares = paired_dot(block, block)
        for step in range(1, min(reach, block.shape[0] - 1) + 1):
            last = min(_FRAMES, block.shape[0] - step)
            own, later = slice(last), slice(step, last + step)
            alike = cosine(paired_dot(block[own], block[later]), squares[own], squares[later])
            found[start : start + last, step - 1] = alike.mean(dim=1)
    return found


def segment_lengths(cosines: Sequence[Sequence[float]], similarity: float, decay: float, window: int) -> list[int]:
    """Lengths of runs of frames that are like their first.

    A run ends before the frame at which the running mean of similarities falls below ``similarity``, or which would
    make it ``window`` long.

    Args:
        cosines: of each frame with the next ``window - 2``, or with all if there are fewer.
        decay: weight of the latest similarity in the running mean, which begins at 1.
    """
    lengths, start, running = [], 0, 1.0
    for frame in range(1, len(cosines)):
        if frame - start + 1 < window:
            running = decay * cosines[start][frame - start - 1] + (1 - decay) * running
            if not running < similarity:
                continue
        lengths.append(frame - start)
        start, running = frame, 1.0
    return [*lengths, len(cosines) - start]


def merged_frames(
    cosines: Sequence[Sequence[float]], lengths: Sequence[int]
) -> tuple[list[int], list[int], list[float]]:
    """What is left of segments of these ``lengths``: their first and last frame, and some of those between.

    Of the frames between, the last goes, with no share in the more alike of its neighbours, which stands for it. Going
    through the others, a frame merges with the next if these are more alike than the segment's first and last, and
    than the next pair is; shares are as the two similarities. Segments of three frames stay as they are.

    Returns:
        The frames that are left, and, for every frame, which of them stands for it and its share in that one.
    """
    left: list[int] = []
    owner: list[int] = []
    shares: list[float] = []

    def keep(frame: int) -> None:
        owner.append(len(left))
        left.append(frame)
        shares.append(1.0)

    start = 0
    for length in lengths:
        last = start + length - 1
        if length < 4:
            for frame in range(start, last + 1):
                keep(frame)
        else:
            keep(start)
            ends, frame = cosines[start][length - 2], start + 1
            while frame < last - 1:
                near, after = cosines[frame][0], cosines[frame + 1][0]
                keep(frame)
                if frame + 1 < last - 1 and near > ends and near > after:
                    shares[-1] = near / (near + after) if after > 0 else 1.0
                    shares.append(1 - shares[-1])
                    owner.append(owner[-1])
                    frame += 1
                frame += 1
            owner.append(len(left) - 1 if cosines[last - 2][0] >= cosines[last - 1][0] else len(left))
            shares.append(0.0)
            keep(last)
        start += length
    return left, owner, shares


class EarlyMerge(TowerReducer, method="early_merge", paper="2605.30010"):
    """Merges alike frames within segments of a video, early in the tower (EarlyTom's stage one, arXiv 2605.30010).

    Before each of a few layers, frames ``[N, D]`` are compared place by place with the first of their segment, which
    ends where an exponential mean of these similarities falls below ``similarity``, or at ``window - 1`` frames. First
    and last frame of a segment stay; between them pairs of neighbours merge that are more alike than these two and
    than the pair that follows, weighted by both similarities. Whole frames merge, so attention is as before. How many
    are left depends on the clip, so the host waits for the device once in each of these layers; three frames of a
    segment always stay. ``similarity`` 1 turns it off.

    Follows the released code (Apache-2.0), which the published speed rests on, in that the last of the frames between
    always goes, like or unlike; the more alike of its neighbours then stands for it, where theirs is lost. Their mean
    of attention, their refined segments and their choice of tokens belong behind the tower: left out. They tune layers
    and threshold to each benchmark; the defaults are those of MVBench (behind layers 6, 14 and 20 of 26 at 0.8), as
    shares of the depth. A pair's share stays within 0 and 1, even if the next pair points the other way.
    """

    kind: ClassVar[str] = "merging over time"
    complexity: ClassVar[str] = "O(W TND) per layer for a window of W"
    fidelity: ClassVar[str] = "authors' vectors, in part"
    before_layer: ClassVar[bool] = True

    similarity: float = Field(0.8, ge=0, le=1, description="similarity to its first frame that a segment needs; 1: off")
    window: int = Field(6, ge=5, description="frames that a segment stays below")
    decay: float = Field(0.9, gt=0, le=1, description="weight of the latest frame in the mean of similarities")
    behind: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
        (0.27, 0.58, 0.81), min_length=1, description="shares of the tower's layers that run before frames merge"
    )

    def layers(self, tower: TowerShape) -> tuple[int, ...]:
        places = {min(tower.depth - 1, round(share * tower.depth)) for share in self.behind}
        return tuple(sorted(places)) if self.similarity < 1 else ()

    def reduce(self, tokens: TowerTokens) -> TowerMerge | None:
        frames = tokens.hidden.unflatten(0, (len(tokens.counts), -1))
        if frames.shape[0] < 4:
            return None
        cosines = near_cosines(frames, min(self.window - 2, len(frames) - 1)).tolist()
        left, owner, shares = merged_frames(cosines, segment_lengths(cosines, self.similarity, self.decay, self.window))
        if len(left) == len(owner):
            return None
        place = torch.arange(frames.shape[1], device=frames.device)
        survivors, assignment = (
            (torch.tensor(part, device=frames.device)[:, None] * place.shape[0] + place).flatten()
            for part in (left, owner)
        )
        weights = torch.tensor(shares, device=frames.device).repeat_interleave(place.shape[0])
        return TowerMerge(survivors, assignment, weights, tokens.counts[: len(left)])
