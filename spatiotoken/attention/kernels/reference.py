"""Block-sparse attention in float64 from an explicit mask: the yardstick of the other backends."""

from __future__ import annotations

import torch
from torch import Tensor

from spatiotoken.attention.kernels.pattern import SparsePattern, Valid, row_bounds, valid_queries, visible_pairs


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: SparsePattern,
    *,
    scale: float,
    valid: Valid | None = None,
    check: bool = False,
) -> Tensor:
    """``[B, heads, Q, d]`` float64: what `SparsePattern` says, computed plainly; padding queries come out as zeros.

    What padding holds does not matter, be it NaN. Makes several ``[B, heads, Q, K]`` tensors of float64, so it is for
    small sizes.

    Args:
        query: ``[B, heads, Q, d]``.
        key, value: ``[B, kv_heads, K, d]``.
        scale: factor of the logits.
        valid: see `Valid`; None where there is no padding.
        check: also look for valid queries that see no key (a mistake of the pattern's maker).

    Raises:
        ValueError: with ``check``, for a valid query without any key.
    """
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    num_queries, num_keys = query.shape[2], key.shape[2]
    seen = visible_pairs(pattern, num_queries, num_keys, valid)
    bounds = row_bounds(valid, query.shape[0], num_keys, query.device)
    if check:
        empty = valid_queries(num_queries, num_keys, bounds)[:, None] & ~seen.any(dim=-1)
        if empty.any():
            row, group, index = empty.nonzero()[0].tolist()
            raise ValueError(
                f"{int(empty.sum())} valid queries see no key, the first is query {index} of row {row}, group {group}; "
                "a pattern must hold its diagonal blocks"
            )
    value = value.masked_fill(~valid_queries(num_keys, num_keys, bounds)[:, None, :, None], 0.0)
    wide_key, wide_value = (x.double().repeat_interleave(groups, dim=1) for x in (key, value))
    logits = query.double() @ wide_key.transpose(-1, -2) * scale
    shared = seen.repeat_interleave(heads // seen.shape[1], dim=1)
    # A row that sees nothing (a padding query) is NaN and becomes zeros.
    weights = logits.masked_fill(~shared, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
    return weights @ wide_value
