"""Question-agnostic keyframes by clustering cheap frame features."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.frames.base import FrameSelector
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
        nearest = torch.cdist(points, centres).argmin(dim=1)
        total = torch.zeros_like(centres).index_add_(0, nearest, points)
        members = torch.bincount(nearest, minlength=count)[:, None]
        centres = torch.where(members > 0, total / members.clamp(min=1), centres)
    distance = torch.cdist(points, centres)
    keyframes = torch.empty(count, dtype=torch.int64, device=points.device)
    for cluster in range(count):
        keyframes[cluster] = distance[:, cluster].argmin()
        # A frame stands for one cluster only, even where two centres coincide.
        distance[keyframes[cluster]] = torch.inf
    return keyframes.sort().values


def _farthest_points(points: Tensor, count: int) -> Tensor:
    order = torch.empty(count, dtype=torch.int64, device=points.device)
    order[0] = (points - points.mean(dim=0)).norm(dim=1).argmin()
    distance = points.new_full((points.shape[0],), torch.inf)
    for step in range(1, count):
        distance = torch.minimum(distance, (points - points[order[step - 1]]).norm(dim=1))
        distance[order[step - 1]] = -torch.inf
        order[step] = distance.argmax()
    return order


class KMeans(FrameSelector, name="kmeans"):
    """Question-agnostic keyframes: k-means over cheap frame features, the member nearest each centre.

    The features are what the pixels themselves say (downsampled colours), so no model is run for the choice. Works on
    a patched model's input and, as the ``selector`` of ``load_video``, while a file is decoded. A video with no more
    frames than ``num_frames`` is left whole.
    """

    num_frames: int = Field(16, ge=1, description="how many keyframes are kept at most")
    iterations: int = Field(10, ge=1, le=100, description="rounds of Lloyd's algorithm")

    def select(self, frames: Frames) -> FrameChoice:
        if frames.num_frames <= self.num_frames:
            return FrameChoice(tuple(range(frames.num_frames)))
        return FrameChoice(tuple(kmeans_keyframes(frames.features, self.num_frames, self.iterations).tolist()))
