"""Question-agnostic keyframes by temporal redundancy, as a video codec sees it."""

from __future__ import annotations

import heapq
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.frames.base import ScoredSelector
from spatiotoken.structures import FrameChoice, Frames

_CHUNK = 64  # frames whose residuals are computed at once


def changes(patches: Tensor, skip: float) -> tuple[Tensor, Tensor]:
    """What a codec would have to write down, as the mean residual of a block beyond ``skip`` times the median one.

    Args:
        patches: ``[T, P, F]`` blocks of frames.

    Returns:
        ``[T - 1]`` for each frame after the first when it is predicted from the frame before; and ``[T]`` for each
        frame when every block is predicted from the frame before or the one after, whichever is better.
    """
    steps = zip(patches[:-1].split(_CHUNK), patches[1:].split(_CHUNK), strict=True)
    residual = torch.cat([(after.float() - before.float()).norm(dim=2) for before, after in steps]).cpu()
    skipped = skip * residual.median()
    nothing = residual.new_full((1, residual.shape[1]), torch.inf)
    better = torch.minimum(torch.cat([nothing, residual]), torch.cat([residual, nothing]))
    return _mean_beyond(residual, skipped), _mean_beyond(better, skipped)


def _mean_beyond(residual: Tensor, skipped: Tensor) -> Tensor:
    return (residual - skipped).clamp(min=0).mean(dim=1)


def group_starts(change: Tensor, count: int) -> list[int]:
    """First frames of ``count`` groups of pictures: they begin at the largest changes ``[T - 1]``.

    Where fewer frames change at all, the longest group is cut in half (the earliest of the longest) until there are
    enough, as a codec puts in a keyframe when none has come for long.
    """
    largest = change.argsort(descending=True, stable=True)[: count - 1]
    starts = [0, *sorted((largest[change[largest] > 0] + 1).tolist())]
    ends = [*starts[1:], change.shape[0] + 1]
    groups = [(start - end, start) for start, end in zip(starts, ends, strict=True)]  # by size, the largest first
    heapq.heapify(groups)
    while len(groups) < count:
        size, start = -groups[0][0], groups[0][1]
        heapq.heapreplace(groups, (-(size // 2), start))
        heapq.heappush(groups, (size // 2 - size, start + size // 2))
    return sorted(start for _, start in groups)


class KFFocus(ScoredSelector, method="kffocus", paper="2508.08989"):
    """Keyframes by temporal redundancy: of each group of pictures the least redundant frame (arXiv 2508.08989).

    KFFocus is a trained system without public code; of the paper this is the idea alone, that keyframes are found by
    their temporal redundancy, following the principles of video compression. How is ours: a frame's change is what a
    codec would have to write down, the residual of its blocks against the frame before, where blocks below ``skip``
    times the median residual of the video are skipped. ``num_frames`` groups begin at the largest changes, and each
    keeps the frame that neither neighbour predicts: the one with the largest residual when every block is predicted
    from the better of both, the earliest of several. Its condensed tokens and its spatiotemporal module, which are
    trained, are left out.
    """

    kind: ClassVar[str] = "question-agnostic"
    needs: ClassVar[frozenset[str]] = frozenset({"patches"})
    complexity: ClassVar[str] = "O(T F + T log T)"
    fidelity: ClassVar[str] = "paper only"

    num_frames: int = Field(16, ge=1, description="how many frames are kept at most")
    skip: float = Field(
        2.0, ge=0.0, le=100.0, description="blocks that change by less than this many median changes are unchanged"
    )

    def select(self, frames: Frames) -> FrameChoice:
        if frames.num_frames <= self.num_frames:
            return FrameChoice.everything(frames)
        change, novelty = changes(frames.needed("patches"), self.skip)
        starts = group_starts(change, self.num_frames)
        ends = [*starts[1:], frames.num_frames]
        kept = [start + int(novelty[start:end].argmax()) for start, end in zip(starts, ends, strict=True)]
        return FrameChoice(tuple(kept), scores=novelty)
