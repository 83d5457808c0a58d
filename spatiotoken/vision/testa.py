"""TESTA: similar frames merge in the first layers of the tower, similar patches of a frame in the others."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field

from spatiotoken.registry import Retention
from spatiotoken.vision.base import TowerMerge, TowerReducer, TowerShape, TowerTokens
from spatiotoken.vision.pairs import mean_keys, merge_frames, merge_patches, steps_left


def frames_and_patches(frames: int, patches: int, retention: float, temporal: float) -> tuple[int, int]:
    """How many frames are left, and how many patches of each: together no more than the share, but one at least.

    If only one of the two merges, the other is whole.
    """
    if temporal in (0, 1):
        parts = frames * retention**temporal, patches * retention ** (1 - temporal)
        return max(1, int(parts[0] + 1e-9)), max(1, int(parts[1] + 1e-9))
    budget = max(1, int(frames * patches * retention + 1e-9))
    left = min(max(1, math.ceil(frames * retention**temporal - 1e-9)), budget)
    return left, budget // left


def frame_layers(depth: int, temporal: float) -> int:
    """How many layers merge frames; those behind them merge patches.

    Raises:
        ValueError: the tower is too shallow for both.
    """
    if 0 < temporal < 1:
        if depth < 2:
            raise ValueError(
                f"vision.temporal: {temporal} needs a tower of two layers, this one runs {depth}; use 0 or 1"
            )
        return max(1, min(depth - 1, round(depth * temporal)))
    return round(depth * temporal)


class TESTA(TowerReducer, method="testa", paper="2310.19060"):
    """Merges similar frames, then similar patches of each frame, some in every layer (arXiv 2310.19060).

    ``T`` frames of ``N`` patches become ``T * retention ** temporal`` frames, rounded up, of as many patches as make
    ``retention * T * N`` in all. Of the tower's layers a share of ``temporal`` merges frames, the others patches, each
    about as many, between attention and MLP. Frames are split into even and odd ones; each patch of an even frame votes
    for the odd frame whose patch at the same place has the most similar key (mean over heads, cosine), and the best
    matched frames merge place by place. Patches merge as in ``tome``. Means are over all patches that tokens stand for,
    and attention is proportional. ``temporal`` 0 merges patches only, 1 frames only, which leaves pictures as they are;
    else a picture, of one frame, merges patches only, in the layers that are there for it. The default is what the
    authors do to 96 frames: half of the frames, half of the patches.

    Theirs is a trained encoder with attention over time, whose keys match frames; these towers have none, so the keys
    are those of attention within a frame. Their blocks merge frames and patches in turn, and compare frames at places
    that patches have left; here all frames are done first, while places still correspond. Matches of frames are ranked
    by their mean cosine; the released code takes the ``mode`` of patches' cosines, as a rule the least of them. Their
    trained models go without proportional attention, which the code advises for models that were not trained for it.
    """

    kind: ClassVar[str] = "merging over time"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    complexity: ClassVar[str] = "O(T^2 N D + TN^2 D) per layer"
    fidelity: ClassVar[str] = "paper only"
    proportional: ClassVar[bool] = True

    retention: Retention = 0.25
    temporal: float = Field(0.5, ge=0, le=1, description="part of the reduction that merges frames, the rest patches")

    def layers(self, tower: TowerShape) -> tuple[int, ...]:
        if self.retention == 1:
            return ()
        frame_layers(tower.depth, self.temporal)  # too shallow a tower is an error at once
        return tuple(range(tower.depth))

    def reduce(self, tokens: TowerTokens) -> TowerMerge | None:
        time, height, width = tokens.grid
        frames, patches = frames_and_patches(time, height * width, self.retention, self.temporal)
        split = frame_layers(tokens.tower.depth, self.temporal)
        if tokens.layer < split:
            count = steps_left(time, frames, tokens.layer, split)
            return None if count == len(tokens.counts) else merge_frames(tokens, mean_keys(tokens), count)
        count = steps_left(height * width, patches, tokens.layer - split, tokens.tower.depth - split)
        return None if count == tokens.counts[0] else merge_patches(tokens, mean_keys(tokens), count)
