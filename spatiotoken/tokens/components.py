"""Connected components of the graph of similar tokens, without ever holding all of its edges."""

from __future__ import annotations

import torch
from torch import Tensor

_PAIRS = 1 << 23
"""Pairs of tokens that are looked at together; bounds the memory."""


def connected_components(features: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Exact components of graphs in which tokens with a cosine above ``threshold`` are neighbours.

    Each block of rows of the graph is computed once; its edges join the components found so far.

    Args:
        features: ``[B, n, D]``, a graph for each ``B``. A zero vector has no neighbours.

    Returns:
        ``[B, n]`` lowest index in the component of each token, and ``[B, n]`` number of its neighbours, with itself.
    """
    batch, count, _ = features.shape
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    roots = torch.arange(batch * count, device=unit.device)
    degree = torch.ones_like(roots)
    step = max(1, _PAIRS // (batch * count))
    for start in range(0, count, step):
        # The graph is symmetric, so pairs with a lower second index are left out.
        near = (unit[:, start : start + step] @ unit[:, start:].mT > threshold).triu_(1)
        graph, row, column = near.nonzero(as_tuple=True)
        first = graph * count + start
        ends = torch.stack([first + row, first + column])
        degree.index_add_(0, ends.flatten(), torch.ones_like(ends).flatten())
        roots = _join(roots, ends, count.bit_length())
    first = count * torch.arange(batch, device=unit.device)[:, None]
    return roots.view(batch, count) - first, degree.view(batch, count)


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
