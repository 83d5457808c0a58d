"""Question-agnostic keyframes by clustering cheap frame features."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.frames.base import ScoredSelector
from spatiotoken.frames.clustering import cluster_means, nearest_members
from spatiotoken.structures import FrameChoice, Frames


def kmeans_keyframes(features: Tensor, count: int, iterations: int) -> Tensor:
    """``[count]`` distinct indices, rising: the member nearest the centre of each of ``count`` clusters.

    Args:
        features: ``[T, F]`` with ``T >= count``.

    Lloyd's algorithm, started from the farthest-point sequence that begins at the frame nearest the mean, so there is
    nothing random in it. Ties go to the earliest frame. A cluster that loses all its members keeps its centre.
    """
    points = features.float()
    centres = points[_farthest_points(points, count)]
    for _ in range(iterations):
        centres = cluster_means(points, torch.cdist(points, centres).argmin(dim=1), centres)
    return nearest_members(points, centres)


def _farthest_points(points: Tensor, count: int) -> Tensor:
    # Indices stay tensors of one element: a bare one would make the host wait for the device each time.
    order = [(points - points.mean(dim=0)).norm(dim=1).argmin(0, keepdim=True)]
    distance = points.new_full((points.shape[0],), torch.inf)
    while len(order) < count:
        distance = torch.minimum(distance, (points - points.index_select(0, order[-1])).norm(dim=1))
        distance.index_fill_(0, order[-1], -torch.inf)
        order.append(distance.argmax(0, keepdim=True))
    return torch.cat(order)


class KMeans(ScoredSelector, method="kmeans"):
    """Question-agnostic keyframes: k-means over frame features, the member nearest each centre.

    By default the features are what the pixels themselves say (downsampled colours), so no model is run for the choice.
    Nothing in it is random. A video with no more frames than ``num_frames`` is left whole.
    """

    kind: ClassVar[str] = "question-agnostic"
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    complexity: ClassVar[str] = "O(T K F) per round"
    fidelity: ClassVar[str] = "our own method"

    num_frames: int = Field(16, ge=1, description="how many frames are kept at most")
    iterations: int = Field(10, ge=1, le=100, description="rounds of Lloyd's algorithm")

    def select(self, frames: Frames) -> FrameChoice:
        if frames.num_frames <= self.num_frames:
            return FrameChoice.everything(frames)
        chosen = kmeans_keyframes(frames.needed("features"), self.num_frames, self.iterations)
        return FrameChoice(tuple(chosen.tolist()))
