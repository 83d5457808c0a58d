"""Density-peak clustering with k nearest neighbours, which several methods merge by."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_distances(features: Tensor) -> Tensor:
    """``[..., n, n]`` Euclidean distances of rows of ``features [..., n, D]``, over the root of ``D``."""
    values = features.float()
    return torch.cdist(values, values) / values.shape[-1] ** 0.5


def density_peak_scores(distances: Tensor, neighbours: int) -> Tensor:
    """``[..., n]``: how much a point is the middle of a cluster, density times distance to the next denser point.

    Args:
        distances: ``[..., n, n]``, zero between a point and itself, which counts as its own neighbour.
        neighbours: how many a density is taken from; at most ``n``.
    """
    nearby = distances.topk(min(neighbours, distances.shape[-1]), dim=-1, largest=False).values
    density = (-nearby.square().mean(dim=-1)).exp()
    denser = density.unsqueeze(-2) > density.unsqueeze(-1)  # [..., i, j]: j is denser than i
    farthest = distances.amax(dim=(-2, -1))[..., None, None]
    return density * torch.where(denser, distances, farthest).amin(dim=-1)


def density_peak_centres(scores: Tensor, count: int) -> Tensor:
    """``[..., count]`` indices of the clusters' centres, the highest score first; of equals, the lowest index."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count]


def assign_to_centres(distances: Tensor, centres: Tensor) -> Tensor:
    """``[n]`` place in ``centres [m]`` of the nearest one, of equals the first; a centre belongs to itself."""
    nearest = distances[:, centres].argmin(dim=-1)
    return nearest.index_copy(0, centres, torch.arange(centres.shape[0], device=centres.device))
