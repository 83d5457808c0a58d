"""Which keys each query sees, in blocks and single columns, and how many pairs that is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Valid = tuple[Tensor, Tensor]
"""``(start, stop)``, int64 ``[B]`` each: the keys of a row that are no padding are ``start <= j < stop``."""


@dataclass(frozen=True, eq=False)
class SparsePattern:
    """The (query, key) pairs that block-sparse attention computes.

    Sequences are ``query [B, heads, Q, d]`` and ``key, value [B, kv_heads, K, d]`` with the queries aligned to the last
    keys: query ``i`` has position ``p = K - Q + i``. It sees key ``j`` of its row iff ``j <= p``, both are valid (see
    `Valid`), and either ``blocks`` holds their pair of blocks or ``columns`` holds the key.

    Blocks and columns COUNT FROM THE ROW'S START: key ``j`` is in block ``(j - start) // block_k``, position ``p`` in
    block ``(p - start) // block_q``, column ``c`` is key ``start + c``. So a padded batch computes exactly what its
    single prompts do. Query blocks go by position also where ``Q < K``.

    Every valid query must see a key. The maker sees to that by setting the diagonal blocks; no kernel checks it.

    Args:
        blocks: bool ``[B, G, nq, nk]``, ``G`` one of 1, kv_heads and heads; ``nq = ceil(K / block_q)``,
            ``nk = ceil(K / block_k)``. Blocks wholly after their queries or past the row's end count for nothing.
        columns: int64 ``[B, G, C]``, distinct keys that all later queries see (stripes), rising; -1 where a row has
            fewer. None for none. A column inside a chosen block adds nothing.
        block_q, block_k: sizes in tokens.

    Raises:
        ValueError: for tensors of other shapes or dtypes than these, or sizes below 1.
    """

    blocks: Tensor
    columns: Tensor | None
    block_q: int
    block_k: int

    def __post_init__(self) -> None:
        if self.block_q < 1 or self.block_k < 1:
            raise ValueError(f"block sizes must be at least 1, got {self.block_q} and {self.block_k}")
        if self.blocks.ndim != 4 or self.blocks.dtype != torch.bool:
            raise ValueError(f"blocks must be bool [B, G, nq, nk], got {self.blocks.dtype} {list(self.blocks.shape)}")
        if self.columns is None:
            return
        shape = self.columns.shape
        if self.columns.dtype != torch.int64 or len(shape) != 3 or shape[:2] != self.blocks.shape[:2]:
            raise ValueError(
                f"columns must be int64 [B, G, C] with B, G = {list(self.blocks.shape[:2])}, "
                f"got {self.columns.dtype} {list(shape)}"
            )
        if self.columns.device != self.blocks.device:
            raise ValueError(f"columns are on {self.columns.device}, blocks on {self.blocks.device}")


def row_bounds(valid: Valid | None, batch: int, num_keys: int, device: torch.device) -> Valid:
    """``valid``, or the bounds of rows without padding."""
    if valid is not None:
        return valid
    return (
        torch.zeros(batch, dtype=torch.int64, device=device),
        torch.full((batch,), num_keys, dtype=torch.int64, device=device),
    )


def row_slices(query: Tensor, key: Tensor, valid: Valid | None) -> Iterator[tuple[int, slice, slice]]:
    """Number of each row that has valid queries, which of its queries these are, and its valid keys.

    Waits for the device where there is padding.
    """
    num_keys, offset = key.shape[2], key.shape[2] - query.shape[2]
    start, stop = row_bounds(valid, query.shape[0], num_keys, key.device)
    for row, (first, last) in enumerate(torch.stack([start, stop], dim=1).tolist()):
        queries = slice(max(0, first - offset), max(0, last - offset))
        if queries.start < queries.stop:
            yield row, queries, slice(first, last)


def seen_keys(blocks: Tensor, columns: Tensor | None, block_k: int, num_keys: int) -> Tensor:
    """``[G, nq, K]`` bool: the keys that each block of queries has in its pattern, before causality.

    Args:
        blocks: bool ``[G, nq, nk]``, of a row without padding.
        columns: ``[G, C]`` or None.
        num_keys: ``K``; later ones are left out.
    """
    seen = blocks.repeat_interleave(block_k, dim=2)[..., :num_keys]
    if columns is None:
        return seen
    # One more key takes what is no column.
    striped = seen.new_zeros(len(seen), num_keys + 1)
    striped.scatter_(1, columns.where((columns >= 0) & (columns < num_keys), num_keys), True)
    return seen | striped[:, None, :num_keys]


def valid_queries(num_queries: int, num_keys: int, valid: Valid) -> Tensor:
    """``[B, Q]`` bool: the queries whose position is no padding."""
    position = torch.arange(num_keys - num_queries, num_keys, device=valid[0].device)
    return (position >= valid[0][:, None]) & (position < valid[1][:, None])


def visible_pairs(pattern: SparsePattern, num_queries: int, num_keys: int, valid: Valid | None = None) -> Tensor:
    """``[B, G, Q, K]`` bool: what each query sees, written out; for tests and small sizes."""
    blocks = pattern.blocks
    start, stop = row_bounds(valid, blocks.shape[0], num_keys, blocks.device)
    key = torch.arange(num_keys, device=blocks.device) - start[:, None]
    query = key[:, num_keys - num_queries :]
    batch = torch.arange(blocks.shape[0], device=blocks.device)[:, None, None]
    query_block = query.clamp(min=0)[:, :, None] // pattern.block_q
    key_block = key.clamp(min=0)[:, None, :] // pattern.block_k
    seen = blocks.transpose(0, 1)[:, batch, query_block, key_block].transpose(0, 1)
    if pattern.columns is not None:
        # A -1 can only match keys before the row's start, which are not inside.
        seen = seen | (pattern.columns[..., None] == key[:, None, None, :]).any(dim=2)[:, :, None, :]
    causal = key[:, None, :] <= query[:, :, None]
    inside = valid_queries(num_keys, num_keys, (start, stop))
    return seen & (causal & inside[:, None, :] & inside[:, num_keys - num_queries :, None])[:, None]


def computed_pairs(pattern: SparsePattern, num_queries: int, num_keys: int, valid: Valid | None = None) -> Tensor:
    """Int64 scalar: computed (query, key) pairs over all rows and groups; makes nothing of size ``Q x K``."""
    pairs, edge_q, length = _block_pairs(pattern, num_queries, num_keys, valid)
    computed = pairs.new_zeros(())
    # One group at a time: on long prompts the counts of all of them would take gigabytes.
    for group, blocks in enumerate(pattern.blocks.unbind(dim=1)):
        computed += (pairs * blocks).sum()
        if pattern.columns is None:
            continue
        columns = pattern.columns[:, group]
        real = (columns >= 0) & (columns < length)
        block = columns.clamp(min=0, max=num_keys - 1) // pattern.block_k
        chosen = blocks.gather(2, block[:, None, :].expand(-1, blocks.shape[1], -1))
        low, high = edge_q[:, :-1, None], edge_q[:, 1:, None]
        rows = (high - low.maximum(columns[:, None])).clamp(min=0)
        computed += (rows * (real[:, None] & ~chosen)).sum()
    return computed


def pair_counts(pattern: SparsePattern, num_queries: int, num_keys: int, valid: Valid | None = None) -> tuple[int, int]:
    """``(computed, causal)`` (query, key) pairs over all rows and groups; waits for the device."""
    total = _block_pairs(pattern, num_queries, num_keys, valid)[0].sum() * pattern.blocks.shape[1]
    counted = torch.stack([computed_pairs(pattern, num_queries, num_keys, valid), total]).tolist()
    return counted[0], counted[1]


def _block_pairs(
    pattern: SparsePattern, num_queries: int, num_keys: int, valid: Valid | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal pairs ``[B, nq, nk]`` in each pair of blocks, the edges ``[B, nq + 1]`` of the query blocks within what is
    valid, and the lengths ``[B, 1]`` of the rows."""
    blocks = pattern.blocks
    start, stop = row_bounds(valid, blocks.shape[0], num_keys, blocks.device)
    length = (stop - start)[:, None]
    first = (num_keys - num_queries - start)[:, None].clamp(min=0)  # the first valid query, counted from the start
    edge_q = torch.arange(blocks.shape[2] + 1, device=blocks.device) * pattern.block_q
    edge_k = torch.arange(blocks.shape[3] + 1, device=blocks.device) * pattern.block_k
    # Edges moved into what is valid: blocks outside become empty and count nothing.
    edge_q = edge_q.maximum(first).minimum(length.maximum(first))
    edge_k = edge_k.minimum(length)
    # The pairs key <= query over queries < a and keys >= b are the triangle of a - b.
    side = (edge_q[:, :, None] - edge_k[:, None, :]).clamp(min=0)
    triangle = side * (side + 1) // 2
    return triangle.diff(dim=1).diff(dim=2).neg(), edge_q, length


def density(pattern: SparsePattern, num_queries: int, num_keys: int, valid: Valid | None = None) -> float:
    """Share of the valid causal (query, key) pairs that are computed, mean over groups; 1.0 where there are none."""
    computed, causal = pair_counts(pattern, num_queries, num_keys, valid)
    return computed / causal if causal else 1.0
