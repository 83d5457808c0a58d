"""Softmax weights of a few query rows, which methods rank keys by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from spatiotoken.attention.base import PrefillInputs


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
    return logits.masked_fill(~visible[:, None], -torch.inf).softmax(dim=-1)


def last_rows_weights(inputs: PrefillInputs, rows: int) -> Tensor:
    """``[heads, min(rows, L), L]`` float32 weights that the last ``rows`` queries give all keys, causally."""
    length, rows = inputs.length, min(rows, inputs.length)
    position = torch.arange(length, device=inputs.query.device)
    visible = position <= position[length - rows :, None]
    return row_weights(inputs.query[None, :, length - rows :], inputs.key[None], visible[None], inputs.scale)[0]
