"""Runs of tokens that stay alike at one place of the frame, for FrameFusion."""

from __future__ import annotations

import torch
from torch import Tensor

from spatiotoken.tokens.merging import cosine, mean_by_assignment, paired_dot

NO_PARTNER = -2.0
"""Similarity of a token that has none at its place before it: below every cosine."""
_CHUNK = 512
"""Tokens that are brought together at a time: few enough to stay in a CPU's cache; on a GPU 16 times as many."""


def framefusion_similarity(hidden: Tensor, place: Tensor) -> Tensor:
    """``[n]`` float32 cosine of each token with the last one left at its place, ``NO_PARTNER`` where there is none.

    Args:
        hidden: ``[n, D]`` in order of time.
        place: ``[n]`` int64, each token's place in its frame.
    """
    order = place.argsort(stable=True)
    chunk = _CHUNK if hidden.device.type == "cpu" else 16 * _CHUNK
    dots, squares = [], []
    for start in range(0, order.shape[0], chunk):
        rows = hidden.index_select(0, order[start : start + chunk + 1]).float()  # the next chunk's first too
        dots.append(paired_dot(rows[1:], rows[:-1]))
        squares.append(paired_dot(rows[:chunk], rows[:chunk]))
    square, grouped = torch.cat(squares), place[order]
    value = cosine(torch.cat(dots), square[1:], square[:-1])
    value = value.masked_fill(grouped[1:] != grouped[:-1], NO_PARTNER)
    return value.new_full(place.shape, NO_PARTNER).index_copy(0, order[1:], value)


def framefusion_merge(hidden: Tensor, place: Tensor, merges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge runs of tokens into the token before the run at the same place, as plain means.

    Args:
        hidden: ``[n, D]`` in order of time.
        place: ``[n]`` int64.
        merges: ``[n]`` bool, False at the first token of each place.

    Returns:
        ``merged [m, D]``; ``kept [m]``, rising, the token whose position each keeps; ``assignment [n]``, the survivor
        that each token is part of. A token that absorbed nothing is unchanged.
    """
    order = place.argsort(stable=True)
    run = (~merges[order]).cumsum(0) - 1
    heads = order[~merges[order]]
    kept, rank = heads.sort()
    survivor = torch.empty_like(rank).index_copy_(0, rank, torch.arange(rank.shape[0], device=rank.device))
    assignment = torch.empty_like(order).index_copy_(0, order, survivor[run])
    return mean_by_assignment(hidden, assignment, kept.shape[0]), kept, assignment
