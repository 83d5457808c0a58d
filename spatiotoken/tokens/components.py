"""Connected components of the graph of similar tokens, without ever holding all of its edges."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spatiotoken.tokens.density_peaks import inner_products
from spatiotoken.tokens.merging import nearest

_PAIRS = 1 << 23
"""Pairs of tokens that are looked at together; bounds the memory."""
_ROWS = 128
"""Tokens of a large set whose pairs are bounded together."""
_LARGE = 1024
"""Tokens from which on bounds are worth their time."""
_BASIS = 95
"""Dimensions that bounds are taken from, the rest being one more."""
_SLACK = 1e-5
"""By how much bounds for vectors of length 1 are too high at least, since they are rounded."""


def connected_components(features: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Exact components of graphs in which tokens with a cosine above ``threshold`` are neighbours.

    Each part of the graph is computed once; its edges join the components found so far.

    Args:
        features: ``[B, n, D]``, a graph for each ``B``. A zero vector has no neighbours.

    Returns:
        ``[B, n]`` lowest index in the component of each token, and ``[B, n]`` number of its neighbours, with itself.
    """
    batch, count, _ = features.shape
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    roots = torch.arange(batch * count, device=unit.device)
    degree = torch.ones_like(roots)
    edges = _edges_of_large(unit[0], threshold) if batch == 1 and count >= _LARGE else _edges(unit, threshold)
    for ends in edges:
        degree.index_add_(0, ends.flatten(), torch.ones_like(ends).flatten())
        roots = _join(roots, ends, count.bit_length())
    first = count * torch.arange(batch, device=unit.device)[:, None]
    return roots.view(batch, count) - first, degree.view(batch, count)


def _edges(unit: Tensor, threshold: float) -> Iterator[Tensor]:
    """``[2, E]`` at a time, as places in the ``B * n`` of ``unit [B, n, D]``, the lower end first."""
    batch, count, _ = unit.shape
    step = max(1, _PAIRS // (batch * count))
    for start in range(0, count, step):
        # The graph is symmetric, so pairs with a lower second index are left out.
        rest = unit[:, start:]
        near = (inner_products(rest) if step >= count else rest[:, :step] @ rest.mT) > threshold
        graph, row, column = near.triu_(1).nonzero(as_tuple=True)
        first = graph * count + start
        yield torch.stack([first + row, first + column])


def _edges_of_large(unit: Tensor, threshold: float) -> Iterator[Tensor]:
    """The same of a single graph ``[n, D]``, of which most is left out since bounds are below the threshold."""
    bounds = sketch(unit, sketch_basis(unit))
    for start in range(0, unit.shape[0], _ROWS):
        limit = (bounds[start : start + _ROWS] @ bounds[start:].T).amax(dim=0)
        others, index = candidates(unit[start:], limit > threshold)
        row = torch.arange(min(_ROWS, unit.shape[0] - start), device=unit.device)
        near = (unit[start : start + _ROWS] @ others.T > threshold) & (index > row[:, None])
        row, column = near.nonzero(as_tuple=True)
        yield torch.stack([row, index[column]]) + start


def sketch_basis(unit: Tensor) -> Tensor:
    """``[D, k]`` orthonormal, where most of ``unit [n, D]`` lies."""
    sample = unit[:: max(1, unit.shape[0] // _LARGE)]
    some = sample[:: max(1, sample.shape[0] // _BASIS)][:_BASIS]
    return torch.linalg.qr(sample.T @ (sample @ some.T)).Q  # one step towards the principal components


def sketch(values: Tensor, basis: Tensor) -> Tensor:
    """``[n, k + 1]`` whose inner products are above those of ``values [n, D]``, by more than rounding.

    Coordinates in an orthonormal ``basis [D, k]``, and the length of what is outside of it (Cauchy and Schwarz).
    """
    inside = values @ basis
    squares = torch.linalg.vector_norm(values, dim=1).square()
    outside = (squares * (1 + _SLACK) - inside.square().sum(dim=1)).clamp(min=0).sqrt()
    return torch.cat([inside, outside[:, None]], dim=1)


def candidates(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``values [n, D]`` that ``mask [n]`` marks, and their indices; all of them, if most are marked."""
    index = mask.nonzero()[:, 0]
    if 3 * index.shape[0] > 2 * mask.shape[0]:
        return values, torch.arange(mask.shape[0], device=mask.device)
    return values.index_select(0, index), index


def nearest_from(queries: Tensor, anchors: Tensor, guess: Tensor) -> Tensor:
    """As ``nearest`` does, in less time for many anchors: what cannot be nearer than the ``guess [n]`` is left out."""
    if anchors.shape[0] < _LARGE:
        return nearest(queries, anchors)
    unit = torch.nn.functional.normalize(anchors.float(), dim=-1)
    least = _products(queries, unit, guess)
    basis, goal = sketch_basis(unit), guess.clone()
    bounds = sketch(unit, basis)
    # Nothing is nearer than what is parallel.
    parallel = torch.linalg.vector_norm(queries, dim=1) * (1 - 1e-6)
    for rows in (least <= parallel).nonzero()[:, 0].split(_ROWS):
        part = queries.index_select(0, rows)
        limit = sketch(part, basis) @ bounds.T
        found = torch.maximum(least[rows], _products(part, unit, limit.argmax(dim=1)))
        others, index = candidates(unit, limit.sub_(found[:, None]).amax(dim=0) >= 0)
        goal[rows] = index[(part @ others.T).argmax(dim=1)]
    return goal


def _products(queries: Tensor, anchors: Tensor, index: Tensor) -> Tensor:
    """``[n]`` inner products of ``queries [n, D]`` and the rows ``index [n]`` of ``anchors``."""
    parts = zip(queries.split(_ROWS), index.split(_ROWS), strict=True)
    return torch.cat([(part * anchors.index_select(0, own)).sum(dim=1) for part, own in parts])


def _join(roots: Tensor, ends: Tensor, jumps: int) -> Tensor:
    """Roots ``[n]`` after joining along edges ``[2, E]``; ``2 ** jumps`` is above the size of any component."""
    while True:
        low, high = roots[ends].aminmax(dim=0)
        if torch.equal(low, high):
            return roots
        # Hang higher roots below lower ones, then let everyone jump to the top of the chain.
        roots = roots.scatter_reduce(0, high, low, "amin")
        for _ in range(jumps):
            roots = roots[roots]


def best_in_group(scores: Tensor, group: Tensor, count: int) -> Tensor:
    """``[B, count]`` index of the member with the highest score in each group; of equals, the lowest index.

    Args:
        scores: ``[B, n]``.
        group: ``[B, n]`` in ``[0, count)``. A group without members gets an arbitrary index.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    last = scores.shape[-1] - 1
    first = torch.full((*scores.shape[:-1], count), last, device=scores.device)
    first.scatter_reduce_(-1, group, order.argsort(dim=-1), "amin")
    return order.gather(-1, first)
