"""Block-sparse attention on a GPU: our own forward kernel in Triton.

Two kernels. The first writes out, for each query block and pattern group, which key blocks and which single columns it
has to visit, so that nothing waits for the host and nothing is looked at in vain. The second walks these lists with an
online softmax: key blocks wholly before the query block without any mask, then the rest (the diagonal, the end of the
row) with one, then the columns, gathered in tiles.

Importing this module needs triton, which torch brings along on Linux only. Under ``TRITON_INTERPRET=1``, set before
triton is first imported, it runs on the CPU (slowly), which is how it is tested without a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spatiotoken.attention.kernels.forward_only import forward_only
from spatiotoken.attention.kernels.pattern import SparsePattern, Valid, row_bounds

MAX_HEAD_DIM = 128
MIN_BLOCK = 16  # the least side of a matrix product in triton
_LISTED_AT_ONCE = 256
_NO_COLUMN = tl.constexpr(2**31 - 1)
# Triton would compile anew for each that is 1 or divisible by 16, which gains nothing here and stalls new lengths.
_SIZES = ["heads", "kv_heads", "groups", "all_query_blocks", "all_key_blocks", "all_columns", "num_queries", "num_keys"]


@dataclass(frozen=True)
class Tiling:
    """How the kernel is cut and launched; changes speed, not the result.

    Args:
        queries, keys: what one program holds and loads at once; they divide the pattern's blocks.
        columns: single columns that are gathered at once.
        num_warps, num_stages: of the launch; stages are the tiles in flight.
    """

    queries: int
    keys: int
    columns: int
    num_warps: int
    num_stages: int


def tiling(dtype: torch.dtype, block_q: int, block_k: int) -> Tiling:
    """The tiles for one kind of input."""
    if dtype == torch.float32:
        # No tensor cores in exact float32: operands are held in registers, and larger tiles than these spill.
        return Tiling(min(block_q, 32), 16, 16, num_warps=8, num_stages=2)
    queries = min(block_q, 128)
    return Tiling(queries, min(block_k, 64), 64, num_warps=8 if queries > 64 else 4, num_stages=3)


@triton.jit
def _first_block(start: tl.tensor, num_queries: tl.tensor, num_keys: tl.tensor, BLOCK_Q: tl.constexpr) -> tl.tensor:
    """The query block, counted from the row's start, that holds the row's first valid query."""
    return tl.maximum(num_keys - num_queries - start, 0) // BLOCK_Q


@triton.jit(do_not_specialize=_SIZES)
def list_keys(
    blocks: tl.tensor,
    columns: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    block_list: tl.tensor,
    block_counts: tl.tensor,
    column_list: tl.tensor,
    column_counts: tl.tensor,
    groups: tl.tensor,
    all_query_blocks: tl.tensor,
    all_key_blocks: tl.tensor,
    all_columns: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """Program ``(m, b * G + g)`` writes what the row's ``m``-th query block in use has to visit.

    blocks: uint8 ``[B, G, nq, nk]``; columns: int64 ``[B, G, C]``; start, stop: int64 ``[B]``.
    block_list: int32 ``[B, G, M, nk]``, block numbers, rising.
    block_counts: int32 ``[B, G, M, 2]``: how many of them need no mask, and how many there are.
    column_list, column_counts: int32 ``[B, G, M, C]`` and ``[B, G, M]``: column numbers in no listed block.
    """
    row_group = tl.program_id(1).to(tl.int64)
    entry = row_group * tl.num_programs(0) + tl.program_id(0)
    row_start = tl.load(start + row_group // groups).to(tl.int32)
    length = tl.load(stop + row_group // groups).to(tl.int32) - row_start
    block = _first_block(row_start, num_queries, num_keys, BLOCK_Q) + tl.program_id(0)
    # A block past the row's end sees nothing: its last query is before its first one.
    first = block * BLOCK_Q
    last = tl.minimum(first + BLOCK_Q, length) - 1
    offsets = tl.arange(0, AT_ONCE)

    flags = blocks + (row_group * all_query_blocks + block) * all_key_blocks
    within = tl.where(last >= first, last // BLOCK_K + 1, 0)
    # Blocks below are wholly at or before the first query.
    unmasked = (first + 1) // BLOCK_K
    found = tl.zeros([], tl.int32)
    found_unmasked = tl.zeros([], tl.int32)
    for done in range(0, within, AT_ONCE):
        number = done + offsets
        chosen = (tl.load(flags + number, mask=number < within, other=0) != 0).to(tl.int32)
        place = found + tl.cumsum(chosen, 0) - 1
        tl.store(block_list + entry * all_key_blocks + place, number, mask=chosen != 0)
        found += tl.sum(chosen, 0)
        found_unmasked += tl.sum(tl.where(number < unmasked, chosen, 0), 0)
    tl.store(block_counts + entry * 2, found_unmasked)
    tl.store(block_counts + entry * 2 + 1, found)

    if HAS_COLUMNS:
        found = tl.zeros([], tl.int32)
        visited = tl.where(last >= first, all_columns, 0)
        for done in range(0, visited, AT_ONCE):
            index = done + offsets
            number = tl.load(columns + row_group * all_columns + index, mask=index < all_columns, other=-1).to(tl.int32)
            seen = (number >= 0) & (number <= last)
            chosen = tl.load(flags + number // BLOCK_K, mask=seen, other=1)
            lone = (seen & (chosen == 0)).to(tl.int32)
            place = found + tl.cumsum(lone, 0) - 1
            tl.store(column_list + entry * all_columns + place, number, mask=lone != 0)
            found += tl.sum(lone, 0)
        tl.store(column_counts + entry, found)


@triton.jit
def _step(
    output: tl.tensor,
    total: tl.tensor,
    highest: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    seen: tl.tensor,
    scale: tl.tensor,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """One tile of the online softmax in base 2: the output so far, the sum of weights, and the highest logit."""
    logits = tl.dot(query, key, input_precision="ieee")
    if MASKED:
        logits = tl.where(seen, logits * scale, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(logits, 1))
        # A row that has seen nothing so far: -inf - -inf would be NaN.
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(logits - shift[:, None])
    else:
        new_highest = tl.maximum(highest, tl.max(logits, 1) * scale)
        shift = new_highest
        weights = tl.exp2(logits * scale - shift[:, None])
    shrink = tl.exp2(highest - shift)
    total = total * shrink + tl.sum(weights, 1)
    output = tl.dot(weights.to(value.dtype), value, output * shrink[:, None], input_precision="ieee")
    return output, total, new_highest


@triton.jit(do_not_specialize=_SIZES)
def attend(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    output: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    block_list: tl.tensor,
    block_counts: tl.tensor,
    column_list: tl.tensor,
    column_counts: tl.tensor,
    query_row: tl.tensor,
    query_head: tl.tensor,
    query_token: tl.tensor,
    key_row: tl.tensor,
    key_head: tl.tensor,
    key_token: tl.tensor,
    value_row: tl.tensor,
    value_head: tl.tensor,
    value_token: tl.tensor,
    output_row: tl.tensor,
    output_head: tl.tensor,
    output_token: tl.tensor,
    scale: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    groups: tl.tensor,
    all_key_blocks: tl.tensor,
    all_columns: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_C: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
) -> None:
    """Program ``(m, b * heads + h)`` computes one tile of queries of one head from the lists of `list_keys`.

    Arguments named ``*_row``, ``*_head``, ``*_token`` are strides; the last dimension has stride 1. ``scale`` is that
    of the logits times ``log2(e)`` and positive. Positions count from the row's start throughout.
    """
    # Later queries see more, so they go first and the short ones fill the gaps at the end.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    used_block = program // (BLOCK_Q // TILE_Q)
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row_start = tl.load(start + row).to(tl.int32)
    length = tl.load(stop + row).to(tl.int32) - row_start
    block = _first_block(row_start, num_queries, num_keys, BLOCK_Q) + used_block
    first = block * BLOCK_Q + program % (BLOCK_Q // TILE_Q) * TILE_Q
    if first >= length:
        return

    # Query 0 is at this position, which is below 0 where the row begins with padding queries.
    shift = num_keys - num_queries - row_start
    position = first + tl.arange(0, TILE_Q)
    computed = (position >= shift) & (position < length)
    dims = tl.arange(0, PADDED_DIM)
    real = dims < HEAD_DIM
    query += row * query_row + head * query_head + (first - shift).to(tl.int64) * query_token
    queries = tl.load(
        query + tl.arange(0, TILE_Q)[:, None] * query_token + dims[None, :],
        mask=computed[:, None] & real[None, :],
        other=0.0,
    )
    kv_head = head * kv_heads // heads
    key += row * key_row + kv_head * key_head + row_start.to(tl.int64) * key_token
    value += row * value_row + kv_head * value_head + row_start.to(tl.int64) * value_token

    entry = (row * groups + head * groups // heads) * (tl.num_programs(0) // (BLOCK_Q // TILE_Q)) + used_block
    block_list += entry * all_key_blocks
    tiles: tl.constexpr = BLOCK_K // TILE_K
    unmasked = tl.load(block_counts + entry * 2) * tiles
    listed = tl.load(block_counts + entry * 2 + 1) * tiles
    tile = tl.arange(0, TILE_K)
    key_tile = tile[None, :] * key_token + dims[:, None]
    value_tile = tile[:, None] * value_token + dims[None, :]

    result = tl.zeros([TILE_Q, PADDED_DIM], tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    highest = tl.full([TILE_Q], float("-inf"), tl.float32)
    for index in range(0, unmasked):
        place = (tl.load(block_list + index // tiles) * BLOCK_K + index % tiles * TILE_K).to(tl.int64)
        if HEAD_DIM == PADDED_DIM:
            keys = tl.load(key + place * key_token + key_tile)
            values = tl.load(value + place * value_token + value_tile)
        else:
            keys = tl.load(key + place * key_token + key_tile, mask=real[:, None], other=0.0)
            values = tl.load(value + place * value_token + value_tile, mask=real[None, :], other=0.0)
        result, total, highest = _step(result, total, highest, queries, keys, values, computed, scale, False)
    for index in range(unmasked, listed):
        place = tl.load(block_list + index // tiles) * BLOCK_K + index % tiles * TILE_K
        number = place + tile
        inside = number < length
        place = place.to(tl.int64)
        keys = tl.load(key + place * key_token + key_tile, mask=inside[None, :] & real[:, None], other=0.0)
        values = tl.load(value + place * value_token + value_tile, mask=inside[:, None] & real[None, :], other=0.0)
        seen = inside[None, :] & (number[None, :] <= position[:, None])
        result, total, highest = _step(result, total, highest, queries, keys, values, seen, scale, True)
    if HAS_COLUMNS:
        column_list += entry * all_columns
        lone = tl.load(column_counts + entry)
        for index in range(0, lone, TILE_C):
            slot = index + tl.arange(0, TILE_C)
            taken = slot < lone
            number = tl.load(column_list + slot, mask=taken, other=_NO_COLUMN)
            place = number.to(tl.int64)
            keys = tl.load(
                key + place[None, :] * key_token + dims[:, None], mask=taken[None, :] & real[:, None], other=0.0
            )
            values = tl.load(
                value + place[:, None] * value_token + dims[None, :], mask=taken[:, None] & real[None, :], other=0.0
            )
            seen = number[None, :] <= position[:, None]
            result, total, highest = _step(result, total, highest, queries, keys, values, seen, scale, True)

    result = result / tl.where(total == 0.0, 1.0, total)[:, None]
    output += row * output_row + head * output_head + (first - shift).to(tl.int64) * output_token
    tl.store(
        output + tl.arange(0, TILE_Q)[:, None] * output_token + dims[None, :],
        result.to(output.dtype.element_ty),
        mask=computed[:, None] & real[None, :],
    )


INTERPRETED = not isinstance(attend, triton.JITFunction)
"""Whether the kernels run in triton's interpreter, on the CPU."""


def list_constants(block_q: int, block_k: int, stripes: bool) -> dict[str, Any]:
    """What `list_keys` is compiled for."""
    return {"BLOCK_Q": block_q, "BLOCK_K": block_k, "HAS_COLUMNS": stripes, "AT_ONCE": _LISTED_AT_ONCE}


def attend_constants(tiles: Tiling, head_dim: int, block_q: int, block_k: int, stripes: bool) -> dict[str, Any]:
    """What `attend` is compiled for."""
    return {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": max(MIN_BLOCK, triton.next_power_of_2(head_dim)),
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "TILE_Q": tiles.queries,
        "TILE_K": tiles.keys,
        "TILE_C": tiles.columns,
        "HAS_COLUMNS": stripes,
    }


@forward_only("triton")
def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: SparsePattern,
    *,
    scale: float,
    valid: Valid | None = None,
) -> Tensor:
    """``[B, heads, Q, d]`` in the query's dtype: what `SparsePattern` says; padding queries come out as zeros.

    Sums are float32 and products of float32 inputs exact (no TF32). Nothing waits for the device. Beside the output it
    makes int32 lists of ``B * G * M * (nk + C)`` entries, with ``M`` the query blocks in use.

    Args:
        query: ``[B, heads, Q, d]``.
        key, value: ``[B, kv_heads, K, d]``.
        scale: factor of the logits.
        valid: see `Valid`; None where there is no padding. What padding holds does not matter, be it NaN.

    Raises:
        ValueError: for dtypes, head sizes, block sizes or scales that the kernel does not do.
        RuntimeError: off CUDA and outside triton's interpreter; in the backward pass, since there is none.
    """
    _check(query, key, value, pattern, scale)
    if INTERPRETED and query.dtype == torch.bfloat16:
        # The interpreter keeps bfloat16 as integers and multiplies those.
        return _launch(query.float(), key.float(), value.float(), pattern, scale, valid).to(query.dtype)
    return _launch(query, key, value, pattern, scale, valid)


def _check(query: Tensor, key: Tensor, value: Tensor, pattern: SparsePattern, scale: float) -> None:
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16) or {key.dtype, value.dtype} != {query.dtype}:
        raise ValueError(
            "the triton backend takes query, key and value all float32, float16 or bfloat16, "
            f"got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if query.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"the triton backend takes head sizes up to {MAX_HEAD_DIM}, got {query.shape[-1]}")
    for name, size in (("block_q", pattern.block_q), ("block_k", pattern.block_k)):
        if size < MIN_BLOCK or size & (size - 1):
            raise ValueError(f"the triton backend takes powers of two from {MIN_BLOCK} as {name}, got {size}")
    if not scale > 0:
        raise ValueError(f"the triton backend takes positive scales, got {scale}")
    if not (query.is_cuda or INTERPRETED):
        raise RuntimeError(f"the triton backend needs CUDA tensors, got {query.device}")


def _launch(
    query: Tensor, key: Tensor, value: Tensor, pattern: SparsePattern, scale: float, valid: Valid | None
) -> Tensor:
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    block_q, block_k = pattern.block_q, pattern.block_k
    _, groups, all_query_blocks, all_key_blocks = pattern.blocks.shape
    stripes = pattern.columns is not None
    # The first query need not begin a block, hence one block more than the queries fill.
    used = min(all_query_blocks, triton.cdiv(num_queries + block_q - 1, block_q))
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    # Padding queries are never written.
    output = torch.empty_like(query) if valid is None else torch.zeros_like(query)
    start, stop = (x.contiguous() for x in row_bounds(valid, batch, num_keys, query.device))
    blocks = pattern.blocks.contiguous().view(torch.uint8)
    # Without columns something has to stand in their place; nothing reads it.
    columns = blocks if pattern.columns is None else pattern.columns.contiguous()
    all_columns = 0 if pattern.columns is None else columns.shape[-1]
    shape = (batch, groups, used)
    block_list = blocks.new_empty((*shape, all_key_blocks), dtype=torch.int32)
    block_counts = blocks.new_empty((*shape, 2), dtype=torch.int32)
    column_list = blocks.new_empty((*shape, all_columns), dtype=torch.int32)
    column_counts = blocks.new_empty(shape, dtype=torch.int32)
    tiles = tiling(query.dtype, block_q, block_k)
    with torch.cuda.device_of(query):
        list_keys[(used, batch * groups)](
            blocks,
            columns,
            start,
            stop,
            block_list,
            block_counts,
            column_list,
            column_counts,
            groups,
            all_query_blocks,
            all_key_blocks,
            all_columns,
            num_queries,
            num_keys,
            **list_constants(block_q, block_k, stripes),
        )
        attend[(used * (block_q // tiles.queries), batch * heads)](
            query,
            key,
            value,
            output,
            start,
            stop,
            block_list,
            block_counts,
            column_list,
            column_counts,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *output.stride()[:3],
            scale * math.log2(math.e),
            heads,
            kv_heads,
            groups,
            all_key_blocks,
            all_columns,
            num_queries,
            num_keys,
            **attend_constants(tiles, head_dim, block_q, block_k, stripes),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return output
