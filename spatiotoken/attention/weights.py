"""Softmax weights of a few query rows, which methods rank keys by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from spatiotoken.attention.base import PrefillInputs

ROWS_AT_ONCE = 64
"""Sampled queries whose weights are held at once."""


def row_weights(query: Tensor, key: Tensor, visible: Tensor, scale: float) -> Tensor:
    """``[B, heads, R, keys]`` float32 weights; a row that sees nothing is NaN.

    Args:
        query: ``[B, heads, R, d]``.
        key: ``[B, kv_heads, keys, d]``, ``heads`` a multiple of ``kv_heads``.
        visible: ``[B, R, keys]`` bool.
    """
    # In float32 from the start: half-precision products can overflow before they are scaled.
    grouped = (query.float() * scale).unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    logits = (grouped @ key.float().transpose(-1, -2)).unflatten(2, (-1, query.shape[2])).flatten(1, 2)
    return logits.masked_fill_(~visible[:, None], -torch.inf).softmax(dim=-1)


def last_rows_weights(inputs: PrefillInputs, rows: int) -> Tensor:
    """``[heads, min(rows, L), L]`` float32 weights that the last ``rows`` queries give all keys, causally."""
    length, rows = inputs.length, min(rows, inputs.length)
    position = torch.arange(length, device=inputs.query.device)
    visible = position <= position[length - rows :, None]
    return row_weights(inputs.query[None, :, length - rows :], inputs.key[None], visible[None], inputs.scale)[0]


def spread_rows(count: int, before: int, device: torch.device) -> Tensor:
    """``count`` places at equal distances among the first ``before``, the last of them included."""
    return (torch.arange(count, device=device) + 1) * before // max(count, 1) - 1


def sampled_mass(inputs: PrefillInputs, count: int, before: int) -> Tensor:
    """``[heads, L]`` float32 sum of the causal weights that ``spread_rows(count, before)`` give all keys."""
    mass = torch.zeros(inputs.query.shape[:2], device=inputs.query.device)
    rows, position = spread_rows(count, before, mass.device), torch.arange(inputs.length, device=mass.device)
    key = inputs.key.float()
    for first in range(0, count, ROWS_AT_ONCE):
        last = min(first + ROWS_AT_ONCE, count)
        now, stop = rows[first:last], last * before // count  # later keys are seen by none of these
        visible = position[:stop] <= now[:, None]
        weights = row_weights(inputs.query[None, :, now], key[None, :, :stop], visible[None], inputs.scale)
        mass[:, :stop] += weights[0].sum(dim=1)
    return mass
