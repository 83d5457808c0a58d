"""Sink, local window and the columns that matter to the last queries."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.attention.base import SparsePrefill
from spatiotoken.attention.weights import row_weights


def column_mass(query: Tensor, key: Tensor, key_valid: Tensor | None, scale: float) -> Tensor:
    """``[B, heads, keys]``: softmax mass that the given queries, the last of the causal sequence, put on each key.

    Args:
        query: ``[B, heads, R, d]``, the last ``R`` queries of each row.
        key: ``[B, kv_heads, keys, d]``.
        key_valid: ``[B, keys]`` bool or None. The queries end at each row's last valid key.
    """
    rows, keys = query.shape[2], key.shape[2]
    position = torch.arange(keys, device=key.device)
    last = _last_valid(key_valid, keys, position)
    visible = position <= (last[:, None] - rows + 1 + position[:rows])[..., None]
    if key_valid is not None:
        visible = visible & key_valid[:, None, :]
    # A row with nothing to see (a short prompt in a padded batch) is NaN and counts for nothing.
    return row_weights(query, key, visible.expand(query.shape[0], -1, -1), scale).nan_to_num(0.0).sum(dim=2)


def important_columns(mass: Tensor, key_valid: Tensor | None, sink: int, columns: int) -> Tensor:
    """``[B, heads, min(sink + columns, keys)]`` rising key indices: the first ``sink`` valid keys and the heaviest."""
    keys = mass.shape[-1]
    position = torch.arange(keys, device=mass.device)
    first = position.new_zeros(mass.shape[0]) if key_valid is None else key_valid.int().argmax(dim=1)
    is_sink = (position >= first[:, None]) & (position < first[:, None] + sink)
    if key_valid is not None:
        mass = mass.masked_fill(~key_valid[:, None], -torch.inf)
    score = mass.masked_fill(is_sink[:, None], torch.inf)
    return score.argsort(dim=-1, descending=True, stable=True)[..., : sink + columns].sort(dim=-1).values


def gather_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    key_valid: Tensor | None,
    window: int,
    block: int,
    scale: float,
) -> Tensor:
    """Causal attention of each query to its ``window`` latest keys and to ``columns``; everything else is skipped.

    Works one block of queries at a time on gathered keys, so no ``queries x keys`` tensor exists.

    Args:
        columns: ``[B, heads, C]`` key indices of each head.
    """
    batch, heads, num_queries, dim = query.shape
    keys, groups = key.shape[2], heads // key.shape[1]
    offset = keys - num_queries
    wide = columns[..., None].expand(-1, -1, -1, dim)
    column_key = key.repeat_interleave(groups, dim=1).gather(2, wide)
    column_value = value.repeat_interleave(groups, dim=1).gather(2, wide)
    batch_index = torch.arange(batch, device=key.device)[:, None]
    column_valid = None if key_valid is None else key_valid[batch_index, columns.flatten(1)].view_as(columns)
    output = torch.empty_like(query)
    for start in range(0, num_queries, block):
        stop = min(start + block, num_queries)
        low, high = max(0, offset + start - window + 1), offset + stop
        query_position = torch.arange(offset + start, high, device=key.device)[:, None]
        local_position = torch.arange(low, high, device=key.device)
        near = (local_position <= query_position) & (local_position > query_position - window)
        near = near.expand(batch, 1, -1, -1)
        if key_valid is not None:
            # Every query sees itself, also at padding, so that no row of the softmax is empty.
            near = near & (key_valid[:, None, None, low:high] | (local_position == query_position))
        far = columns[:, :, None, :] <= query_position - window
        if column_valid is not None:
            far = far & column_valid[:, :, None, :]
        local = [x[:, :, low:high].repeat_interleave(groups, dim=1) for x in (key, value)]
        output[:, :, start:stop] = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, start:stop],
            torch.cat([column_key, local[0]], dim=2),
            torch.cat([column_value, local[1]], dim=2),
            attn_mask=torch.cat([far, near.expand(-1, heads, -1, -1)], dim=-1),
            scale=scale,
        )
    return output


def _last_valid(key_valid: Tensor | None, keys: int, position: Tensor) -> Tensor:
    if key_valid is None:
        return position[-1:]
    return (key_valid * position).amax(dim=1)


class SlidingVertical(SparsePrefill, method="sliding_vertical"):
    """Sparse prefill over attention sinks, a local window and the columns that the last queries weigh most.

    Per head, the ``columns`` keys with the largest softmax mass over the last ``last_queries`` queries are kept for
    all queries, beside the first ``sink`` keys and each query's own ``window`` latest keys (the vertical part of
    MInference, arXiv 2407.02490, with a sliding window in place of its slashes). A reference on plain torch: keys are
    gathered per block of queries, so it makes no ``queries x keys`` tensor. (For padded batches transformers itself
    makes a mask of that size.) Token-exact, so a padded batch equals single prompts.
    """

    sink: int = Field(64, ge=1, description="first keys that every query sees")
    window: int = Field(1024, ge=1, description="latest keys that each query sees, itself included")
    columns: int = Field(1024, ge=0, description="further keys per head that every query sees")
    last_queries: int = Field(64, ge=1, description="queries whose attention ranks the columns")
    block: int = Field(128, ge=1, description="queries that are computed at once; changes speed, not the result")

    def is_dense(self, num_queries: int, num_keys: int) -> bool:
        return num_keys <= self.window or num_keys <= self.sink + self.columns

    def attend(self, query: Tensor, key: Tensor, value: Tensor, key_valid: Tensor | None, scale: float) -> Tensor:
        rows = min(self.last_queries, query.shape[2])
        if key_valid is None:
            last_rows = query[:, :, -rows:]
        else:
            position = torch.arange(key.shape[2], device=key.device)
            last = _last_valid(key_valid, key.shape[2], position) - (key.shape[2] - query.shape[2])
            index = (last[:, None] - rows + 1 + position[:rows]).clamp(min=0)
            last_rows = query.gather(2, index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        mass = column_mass(last_rows, key, key_valid, scale)
        chosen = important_columns(mass, key_valid, self.sink, self.columns)
        return gather_attention(query, key, value, chosen, key_valid, self.window, self.block, scale)
