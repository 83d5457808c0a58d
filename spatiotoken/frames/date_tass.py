"""TASS, the sampling of DATE: the frames most like the question, apart in time."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.frames.base import ScoredSelector
from spatiotoken.frames.scorer import Scorer
from spatiotoken.frames.uniform import uniform_indices
from spatiotoken.structures import FrameChoice, Frames


def above_mean(relevance: Tensor, count: int) -> Tensor:
    """At most ``count`` indices of the frames that are more relevant than the mean, the most relevant first."""
    scores = relevance.double()
    order = scores.argsort(descending=True, stable=True)
    return order[scores[order] > scores.mean()][:count]


def apart_in_time(times: Tensor, count: int, interval: float, decay: float) -> list[int]:
    """``count`` positions in ``times``, in the order in which they are chosen.

    A pass goes through the positions in order and takes each that is at least ``interval`` from all that were taken
    before; while there are too few the next pass asks for ``decay`` times as much.

    Args:
        times: ``[n]`` on the CPU, ``n >= count``.
    """
    times = times.double()
    gap = torch.full_like(times, torch.inf)
    chosen: list[int] = []
    start = 0
    while len(chosen) < count:
        fits = (gap[start:] >= interval).nonzero()
        if fits.shape[0]:
            chosen.append(start + int(fits[0]))
            start = chosen[-1] + 1
            gap = torch.minimum(gap, (times - times[chosen[-1]]).abs())
            gap[chosen[-1]] = -1.0
        else:
            # Passes that take nothing are skipped; frames of one and the same time are apart by no interval but zero.
            widest, start = float(gap.max()), 0
            while interval > widest:
                interval = interval * decay if widest > 0 else 0.0
    return chosen


class DateTASS(ScoredSelector, method="date_tass", paper="2509.09263"):
    """Sampling of DATE: relevant frames first, with a least distance in time that shrinks (arXiv 2509.09263).

    Frames more relevant than the mean, at most ``pool * num_frames`` of them, are taken by relevance if at least
    ``interval`` seconds from all that are taken already; the interval is multiplied by ``decay`` after each pass until
    there are ``num_frames``. If no more than that are above the mean these are all, as in the authors' code: the
    method may keep fewer frames than it is allowed. Where the model is not told the time the interval counts frames.

    Differences from the authors' code: a video of at most ``num_frames`` is left whole, where theirs still drops what
    is below the mean; where all are equally relevant none is above the mean, theirs returns nothing and this frames at
    equal distances; indices rise, as timestamps do (theirs are left in the order in which they were chosen); a flag of
    theirs fails if it is left out, and is not there. Their literal 20 seconds, half and 4 are ``interval``, ``decay``
    and ``pool``. DATE's other part, timestamps in the prompt, is not a matter of which frames are seen.
    """

    kind: ClassVar[str] = "question-aware"
    needs: ClassVar[frozenset[str]] = frozenset({"relevance"})
    complexity: ClassVar[str] = "O(T log T + K^2)"
    fidelity: ClassVar[str] = "authors' vectors"

    num_frames: int = Field(256, ge=1, description="how many frames are kept at most")
    scorer: Scorer = Field(Scorer(kind="clip"), description="by what frames are compared with the question")
    interval: float = Field(20.0, ge=0, le=86400, description="seconds between two frames in the first pass")
    decay: float = Field(0.5, gt=0, le=0.99, description="by what the interval is multiplied after each pass")
    pool: int = Field(4, ge=1, description="how many times num_frames are looked at, the most relevant first")

    def select(self, frames: Frames) -> FrameChoice:
        if frames.num_frames <= self.num_frames:
            return FrameChoice.everything(frames)
        relevance = frames.needed("relevance").cpu()
        candidates = above_mean(relevance, self.pool * self.num_frames)
        if not candidates.shape[0]:
            return FrameChoice(uniform_indices(frames.num_frames, self.num_frames), scores=relevance)
        if candidates.shape[0] > self.num_frames:
            times = frames.timestamps.cpu()[candidates]
            candidates = candidates[apart_in_time(times, self.num_frames, self.interval, self.decay)]
        return FrameChoice(tuple(candidates.sort().values.tolist()), scores=relevance)
