"""Density-peak clustering with k nearest neighbours, which several methods merge by."""

from __future__ import annotations

import torch
from torch import Tensor

_MANY = 128
"""Rows from which on less arithmetic is worth a copy of the result."""


def inner_products(values: Tensor) -> Tensor:
    """``[B, n, n]`` inner products of rows of ``values [B, n, D]``; a quarter of them is taken from the other side."""
    if values.shape[1] < _MANY:
        return values @ values.mT
    half = values.shape[1] // 32 * 16  # products of odd sizes are slower
    left, last = values @ values[:, :half].mT, values[:, half:] @ values[:, half:].mT
    return torch.cat([left, torch.cat([left[:, half:].mT, last], dim=1)], dim=2)


def scaled_distances(features: Tensor) -> Tensor:
    """``[..., n, n]`` Euclidean distances of rows of ``features [..., n, D]``, over the root of ``D``."""
    values = features.float().reshape(-1, *features.shape[-2:])
    # Tokens share a large part, which would cost the small distances their precision. Its estimate may be rough.
    products = inner_products(values - values[:, ::8].mean(dim=1, keepdim=True))
    squares = products.diagonal(dim1=1, dim2=2)
    distances = torch.add(squares[:, :, None], squares[:, None]).sub_(products, alpha=2)
    distances.diagonal(dim1=1, dim2=2).zero_()
    distances = distances.div_(values.shape[2]).clamp_(min=0).sqrt_()
    return distances.view(*features.shape[:-1], features.shape[-2])


def _smallest(values: Tensor, count: int) -> Tensor:
    """``[..., n, count]`` the smallest of each row of ``values [..., n, m]``, rising."""
    if values.shape[-1] >= 16 * count:
        # They lie in the groups that have the smallest minima, which leaves less to look through.
        groups = torch.nn.functional.pad(values, (0, -values.shape[-1] % 4), value=torch.inf).unflatten(-1, (4, -1))
        best = groups.amin(dim=-2).topk(count, dim=-1, largest=False, sorted=False).indices
        values = groups.gather(-1, best.unsqueeze(-2).expand(*groups.shape[:-1], -1)).flatten(-2)
    return values.topk(count, dim=-1, largest=False).values


def density_peak_scores(distances: Tensor, neighbours: int, most: Tensor | None = None) -> Tensor:
    """``[..., n]``: how much a point is the middle of a cluster, density times distance to the next denser point.

    Args:
        distances: ``[..., n, n]``, zero between a point and itself, which counts as its own neighbour.
        neighbours: how many a density is taken from, at most ``n``.
        most: ``[...]`` and at most so many in each set of points.
    """
    squares = _smallest(distances, min(neighbours, distances.shape[-1])).square()
    if most is None:
        density = (-squares.mean(dim=-1)).exp()
    else:
        place = torch.arange(squares.shape[-1], device=squares.device)
        density = (-torch.where(place < most[..., None, None], squares, torch.nan).nanmean(dim=-1)).exp()
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
