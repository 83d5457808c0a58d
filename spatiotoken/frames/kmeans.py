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
    ones = points.new_ones(points.shape[0], 1)
    for _ in range(iterations):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        total = torch.zeros_like(centres).index_add_(0, nearest, points)
        members = ones.new_zeros(count, 1).index_add_(0, nearest, ones)
        centres = torch.where(members > 0, total / members.clamp(min=1), centres)
    distance = torch.cdist(points, centres)
    keyframes = []
    for cluster in range(count):
        keyframes.append(distance[:, cluster].argmin(0, keepdim=True))
        # A frame stands for one cluster only, even where two centres coincide.
        distance.index_fill_(0, keyframes[-1], torch.inf)
    return torch.cat(keyframes).sort().values


def _farthest_points(points: Tensor, count: int) -> Tensor:
    # Indices stay tensors of one element: a bare one would make the host wait for the device each time.
    order = [(points - points.mean(dim=0)).norm(dim=1).argmin(0, keepdim=True)]
    distance = points.new_full((points.shape[0],), torch.inf)
    while len(order) < count:
        distance = torch.minimum(distance, (points - points.index_select(0, order[-1])).norm(dim=1))
        distance.index_fill_(0, order[-1], -torch.inf)
        order.append(distance.argmax(0, keepdim=True))
    return torch.cat(order)


class KMeans(FrameSelector, method="kmeans"):
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
