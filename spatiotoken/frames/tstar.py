"""T*: a search that looks at a few frames at a time, next where those seen so far promise most."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.frames.base import ScoredSelector
from spatiotoken.frames.scorer import Scorer
from spatiotoken.frames.uniform import uniform_indices
from spatiotoken.structures import FrameChoice, Frames

UNSEEN = 1e-6
"""Score of a frame that nothing is known of: above one in which nothing was found, below all others."""


def spread_scores(scores: Tensor, numbers: Sequence[int], confidence: Tensor, window: int) -> Tensor:
    """``[T]`` scores after a look: each seen frame's is its confidence, its neighbours' rise with the best quarter.

    A frame whose confidence is at least the look's third quartile lifts those up to ``window`` frames away to its score
    divided by one more than the distance, if theirs is lower.

    Args:
        scores: ``[T]`` float64 on the CPU.
        numbers: the frames that were looked at.
        confidence: ``[len(numbers)]`` float64, 0..1.
    """
    scores = scores.clone()
    scores[torch.tensor(numbers)] = confidence
    distance = torch.arange(-window, window + 1)
    for place in (confidence >= confidence.quantile(0.75)).nonzero()[:, 0].tolist():
        near = numbers[place] + distance
        inside = (near >= 0) & (near < scores.shape[0])
        near, share = near[inside], scores[numbers[place]] / (distance[inside].abs() + 1)
        scores[near] = torch.maximum(scores[near], share)
    return scores


def frame_distribution(scores: Tensor, seen: Tensor, smoothing: float) -> Tensor:
    """``[T]`` float64 probabilities: the sigmoid of a smoothing spline through the scores of the frames seen.

    Args:
        scores: ``[T]`` float64 on the CPU.
        seen: ``[T]`` bool, at least one True; fewer than four lower the spline's degree, one leaves all alike.
        smoothing: the sum of squared residuals that the spline may leave.

    Raises:
        ImportError: SciPy is not installed.
    """
    try:
        interpolate = import_module("scipy.interpolate")
    except ImportError as error:
        raise ImportError("tstar fits a spline with SciPy: pip install 'spatiotoken[tstar]'") from error
    places, frames = seen.nonzero()[:, 0], scores.shape[0]
    degree = min(3, places.shape[0] - 1)
    if degree < 1:
        return torch.full_like(scores, 1 / frames)
    with warnings.catch_warnings():
        # FITPACK tells of every fit that misses the residuals asked for by a little; the curve is used anyway.
        warnings.simplefilter("ignore", UserWarning)
        spline = interpolate.UnivariateSpline(places.numpy(), scores[places].numpy(), k=degree, s=smoothing)
    curve = torch.from_numpy(spline(torch.arange(frames).numpy()))
    weight = curve.clamp(min=1 / frames).sigmoid()
    return weight / weight.sum()


def next_look(probability: Tensor, seen: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """``count`` unseen frames, rising, drawn without replacement from the likeliest quarter of the video.

    Args:
        probability: ``[T]`` float64 on the CPU.
        seen: ``[T]`` bool, at least ``count`` of them False.
    """
    weight = (probability + count / seen.shape[0]) * ~seen
    likely = weight * (weight >= weight.quantile(0.75))
    if int(likely.count_nonzero()) < count:
        likely = weight
    return likely.multinomial(count, generator=generator).sort().values.tolist()


class TStar(ScoredSelector, method="tstar", paper="2504.02259"):
    """T*: looks at a few frames, then where these promise most, until its budget is spent (arXiv 2504.02259).

    First ``grid`` frames at equal distances, then ``grid`` at a time drawn from the likeliest quarter of a distribution
    that is fitted to what was seen, until ``budget`` of the frames (but at least ``grid`` frames) are described by the
    scorer: only these are paid for. Kept are the ``num_frames`` best scores; frames next to good ones count.

    With any scorer: the authors run an object detector on the frames of a look, tiled into one picture. Here the
    confidence of a frame of relevance ``r`` is ``z / (1 + z)`` with ``z = (r - median) / (best - median)``, not below
    0, median and best being those of the first look. So what is no better than a usual frame counts as nothing found,
    the best of the first look as 0.5, and a better one as more, never quite 1. There being no objects to confirm, the
    search ends with its budget only.

    Differences from the authors' program: the frames that are kept are the best, not drawn in proportion to the score;
    the first look covers the whole video (their step is rounded down, which leaves out its end); no frame is looked at
    twice; the budget holds to the frame (theirs is exceeded by up to a look, and never above a literal 1,000 frames).
    Their literal window of 5 and smoothing of 0.5 are fields. The update of scores and distribution is theirs.

    Raises:
        ImportError: SciPy is not installed, and the budget allows for more than one look.
    """

    kind: ClassVar[str] = "question-aware"
    needs: ClassVar[frozenset[str]] = frozenset({"score"})
    complexity: ClassVar[str] = "O(T log T) and a spline per look"
    fidelity: ClassVar[str] = "authors' vectors, in part"

    num_frames: int = Field(8, ge=1, description="how many frames are kept at most")
    scorer: Scorer = Field(Scorer(kind="clip"), description="by what frames are compared with the question")
    grid: int = Field(16, ge=1, description="frames that are looked at at once")
    budget: float = Field(0.1, gt=0, le=1, description="share of the frames that may be looked at")
    window: int = Field(5, ge=0, le=1000, description="how many frames away a good frame lifts its neighbours")
    smoothing: float = Field(0.5, ge=0, le=1e6, description="squared residuals that the fitted spline may leave in all")
    seed: int = Field(0, ge=0, description="of the draws")

    def select(self, frames: Frames) -> FrameChoice:
        total = frames.num_frames
        if total <= self.num_frames:
            return FrameChoice.everything(frames)
        if frames.score is None:
            raise ValueError("these frames come without score, which the method needs")
        generator = torch.Generator().manual_seed(self.seed)
        looks = min(total, max(self.grid, math.ceil(self.budget * total)))
        numbers = list(uniform_indices(total, self.grid))
        relevance = frames.score(numbers).double().cpu()
        usual, best = relevance.quantile(0.5), relevance.max()
        scores = torch.full((total,), UNSEEN, dtype=torch.float64)
        seen = torch.zeros(total, dtype=torch.bool)
        while True:
            above = ((relevance - usual) / (best - usual).clamp(min=1e-6)).clamp(min=0)
            scores = spread_scores(scores, numbers, above / (1 + above), self.window)
            seen[torch.tensor(numbers)] = True
            looks -= len(numbers)
            if looks <= 0:
                break
            probability = frame_distribution(scores, seen, self.smoothing)
            numbers = next_look(probability, seen, min(self.grid, looks), generator)
            relevance = frames.score(numbers).double().cpu()
        kept = scores.argsort(descending=True, stable=True)[: self.num_frames].sort().values
        return FrameChoice(tuple(kept.tolist()), scores=scores.float())
