"""KTV's keyframes: k-means over DINOv2 features."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.frames.base import ScoredSelector
from spatiotoken.frames.clustering import cluster_means, nearest_members
from spatiotoken.frames.scorer import Scorer
from spatiotoken.structures import FrameChoice, Frames


def ktv_keyframes(features: Tensor, count: int, restarts: int = 10, seed: int = 0, iterations: int = 300) -> Tensor:
    """``[count]`` distinct indices, rising: the frame nearest the centre of each of ``count`` clusters.

    Of ``restarts`` runs of k-means, the one of least inertia (the summed squared distances to the nearest centre), of
    equals the first. Runs on the CPU, so that the same seed finds the same frames whatever the device.

    Args:
        features: ``[T, F]`` with ``T >= count``.
    """
    points = features.float().cpu()
    points = points - points.mean(dim=0)  # distances are taken from inner products, in which an offset costs digits
    generator = torch.Generator().manual_seed(seed)
    runs = [_k_means(points, _spread_points(points, count, generator), iterations) for _ in range(restarts)]
    return nearest_members(points, min(runs, key=lambda run: run[0])[1])


def _k_means(points: Tensor, first: Tensor, iterations: int) -> tuple[float, Tensor]:
    """The inertia, less what all runs share, and the centres; begun at the points ``first``, until nothing moves."""
    centres = points[first]
    for _ in range(iterations):
        cluster = _nearness(points, centres).argmax(dim=1)
        before, centres = centres, cluster_means(points, cluster, centres)
        if torch.equal(before, centres):
            break
    return -float(_nearness(points, centres).amax(dim=1).double().sum()), centres


def _nearness(points: Tensor, centres: Tensor) -> Tensor:
    """``[T, K]`` minus half the squared distance, but for each point's own square: a tenth of the time of distances."""
    return (points @ centres.T).sub_(centres.square().sum(dim=1) / 2)


def _spread_points(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``[count]`` indices by greedy k-means++.

    After the first, each is the best of a few that are drawn in proportion to the squared distance to the nearest so
    far: the one that leaves the least of it.
    """
    squares, last = points.square().sum(dim=1), points.shape[0] - 1
    order = torch.randint(last + 1, (1,), generator=generator)
    left, trials = (squares - 2 * _nearness(points, points[order])[:, 0]).clamp_(min=0), 2 + int(math.log(count))
    for _ in range(count - 1):
        mass = left.double().cumsum(0)
        draws = torch.rand(trials, generator=generator, dtype=torch.float64) * mass[-1]
        drawn = torch.searchsorted(mass, draws, right=True).clamp_(max=last)  # beyond the last if none is left
        distance = (squares[:, None] - 2 * _nearness(points, points[drawn])).clamp_(min=0)
        after = torch.minimum(left[:, None], distance)
        best = after.sum(dim=0).argmin()
        order, left = torch.cat([order, drawn[best, None]]), after[:, best]
    return order


class KTV(ScoredSelector, method="ktv", paper="2602.03615"):
    """Question-agnostic keyframes of KTV: k-means over DINOv2 features (arXiv 2602.03615).

    Of each cluster the frame nearest its centre; the authors take 12 or 6. k-means is begun ``restarts`` times, by
    k-means++ with a generator of its own, and the tightest result is used: what the authors have scikit-learn do, with
    other random numbers, so that only where clusters are not clear may other frames come out. A video with no more
    frames than ``num_frames`` is left whole.

    Two centres may have the same nearest frame. The second takes its next nearest then; the authors give the clustering
    up and take frames at equal distances. They hand frames on by their CLIP similarity to the question; here these stay
    in order of time. How that similarity decides over tokens is the other half of the method: ``ktv_tokens``.
    """

    kind: ClassVar[str] = "question-agnostic"
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    complexity: ClassVar[str] = "O(T K F) per round and restart"
    fidelity: ClassVar[str] = "authors' vectors"

    num_frames: int = Field(6, ge=1, description="how many frames are kept at most")
    scorer: Scorer = Field(Scorer(kind="dinov2"), description="by what frames are described")
    restarts: int = Field(10, ge=1, le=100, description="runs of k-means, of which the tightest is used")
    iterations: int = Field(300, ge=1, le=1000, description="most rounds of Lloyd's algorithm in a run")
    seed: int = Field(0, ge=0, description="seed of the generator that starts k-means")

    def select(self, frames: Frames) -> FrameChoice:
        if frames.num_frames <= self.num_frames:
            return FrameChoice.everything(frames)
        features = frames.needed("features")
        chosen = ktv_keyframes(features, self.num_frames, self.restarts, self.seed, self.iterations)
        return FrameChoice(tuple(chosen.tolist()))
