"""Softmax weights of a few query rows, which methods rank keys by."""

from __future__ import annotations

import torch
from torch import Tensor


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
