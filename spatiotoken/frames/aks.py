"""AKS: the frames most like the question, from the parts of the video that a recursive split finds."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.frames.base import ScoredSelector
from spatiotoken.frames.scorer import Scorer
from spatiotoken.structures import FrameChoice, Frames

Segment = tuple[int, int, int]
"""First frame, last frame, how often the video was halved to get there."""


def aks_segments(relevance: Tensor, count: int, threshold: float, deviation: float, depth: int) -> list[Segment]:
    """Parts of the video that are not halved further, those that were halved least first.

    Args:
        relevance: ``[T]`` on the CPU.
        count: how many of a part's best frames are compared with the mean of the part.
    """
    scores = _between_zero_and_one(relevance)
    final: list[Segment] = []
    level: list[Segment] = [(0, scores.shape[0] - 1, 0)]
    while level:
        halves: list[Segment] = []
        for first, last, halved in level:
            part = scores[first : last + 1]
            best = part.sort(descending=True).values[:count].mean()
            peaked = best - part.mean() > threshold and part.std(correction=0) > deviation
            if peaked or halved >= depth or first == last:
                final.append((first, last, halved))
            else:
                middle = first + part.shape[0] // 2
                halves += [(first, middle - 1, halved + 1), (middle, last, halved + 1)]
        level = halves
    return final


def aks_keyframes(relevance: Tensor, segments: list[Segment], count: int) -> list[int]:
    """``count`` frames, rising: of each part the best, as many as its share of the video; then the best of the rest.

    Args:
        relevance: ``[T]`` on the CPU, ``T >= count``.
    """
    order = relevance.argsort(descending=True, stable=True).tolist()
    chosen: set[int] = set()
    for first, last, halved in segments:
        ranked = relevance[first : last + 1].argsort(descending=True, stable=True)
        chosen.update((first + ranked[: count >> halved]).tolist())
    rest = [index for index in order if index not in chosen]
    return sorted([*chosen, *rest[: count - len(chosen)]])


def _between_zero_and_one(relevance: Tensor) -> Tensor:
    low, high = relevance.double().aminmax()
    return (relevance.double() - low) / (high - low) if high > low else torch.zeros_like(relevance, dtype=torch.float64)


class AKS(ScoredSelector, method="aks", paper="2502.21271"):
    """Adaptive keyframe sampling: the most relevant frames of parts that are halved to a peak (arXiv 2502.21271).

    Relevance is stretched to 0..1 over the video. A part is final if its ``num_frames`` best frames are on average more
    than ``threshold`` above its mean and its standard deviation is above ``deviation``; else it is halved, ``depth``
    times at most. A part that was halved ``d`` times gives its ``num_frames / 2^d`` best frames, rounded down.

    The authors' program returns no frame at all where ``num_frames < 2^depth``, and too few where such a share is
    rounded down: here a video is halved only as often as leaves each part a frame, and what rounding leaves over goes
    to the most relevant of the other frames, wherever they are. Where every share is whole nothing differs. Where all
    frames are equally relevant theirs divides by zero; here each part gives its first frames. Their command line reads
    the thresholds as integers, so that 0.8 cannot be given; here they are fractions.
    """

    kind: ClassVar[str] = "question-aware"
    needs: ClassVar[frozenset[str]] = frozenset({"relevance"})
    complexity: ClassVar[str] = "O(T log T) per halving"
    fidelity: ClassVar[str] = "authors' vectors"

    num_frames: int = Field(64, ge=1, description="how many frames are kept at most")
    scorer: Scorer = Field(Scorer(kind="clip"), description="by what frames are compared with the question")
    threshold: float = Field(
        0.8, ge=0, le=1, description="a part is final if its best frames are this far above its mean"
    )
    deviation: float = Field(
        -100.0, ge=-100, le=1, description="and if its standard deviation is above this; below 0 it always is"
    )
    depth: int = Field(5, ge=0, le=16, description="how often the video is halved at most")

    def select(self, frames: Frames) -> FrameChoice:
        if frames.num_frames <= self.num_frames:
            return FrameChoice.everything(frames)
        relevance = frames.needed("relevance").cpu()
        depth = min(self.depth, self.num_frames.bit_length() - 1)
        segments = aks_segments(relevance, self.num_frames, self.threshold, self.deviation, depth)
        return FrameChoice(tuple(aks_keyframes(relevance, segments, self.num_frames)), scores=relevance)
