"""Clusters of frames, and the frames that stand for them."""

from __future__ import annotations

import torch
from torch import Tensor


def cluster_means(points: Tensor, cluster: Tensor, centres: Tensor) -> Tensor:
    """``[K, F]`` means of the points of each cluster; one without points keeps its centre.

    Args:
        points: ``[T, F]`` float32.
        cluster: ``[T]`` the cluster of each.
        centres: ``[K, F]``.
    """
    total = torch.zeros_like(centres).index_add_(0, cluster, points)
    members = points.new_zeros(centres.shape[0], 1).index_add_(0, cluster, points.new_ones(points.shape[0], 1))
    return torch.where(members > 0, total / members.clamp(min=1), centres)


def nearest_members(points: Tensor, centres: Tensor) -> Tensor:
    """``[K]`` distinct indices, rising: the point nearest to each of ``centres [K, F]``; ties go to the first point.

    Args:
        points: ``[T, F]`` with ``T >= K``.
    """
    distance = torch.cdist(points, centres)
    chosen = []
    for cluster in range(centres.shape[0]):
        chosen.append(distance[:, cluster].argmin(0, keepdim=True))
        # A point stands for one cluster only, even where two centres coincide.
        distance.index_fill_(0, chosen[-1], torch.inf)
    return torch.cat(chosen).sort().values
