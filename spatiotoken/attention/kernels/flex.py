"""Block-sparse attention through torch's flex attention, compiled."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo import maybe_mark_dynamic
from torch._inductor import config as inductor_config
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.functional import pad

from spatiotoken.attention.kernels.forward_only import forward_only
from spatiotoken.attention.kernels.pattern import SparsePattern, Valid, row_slices, seen_keys

# Past dynamo's limit of recompiled variants a plain `torch.compile(flex_attention)` runs uncompiled without a word,
# and that ignores all block lists. The variants here (head counts and sizes, block sizes, dtypes) count against a
# function of our own, which is compiled whole or raises, and may have many.
VARIANTS = 256
# Keys that the mask's table has room for at least: fewer sizes to compile.
LEAST_CAPACITY = 1024


def unavailable(device: torch.device) -> str | None:
    """Why the backend cannot run on a device; None where it can."""
    if device.type == "cuda":
        return None if find_spec("triton") else "it needs triton to compile for CUDA"
    if device.type != "cpu":
        return f"it compiles for CPU and CUDA, not for {device.type}"
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        return "it needs a CPU with AVX2"
    compilers = [name for name in inductor_config.cpp.cxx if name]
    if not any(shutil.which(name) for name in compilers):
        return f"it needs a C++ compiler, and there is none of {', '.join(compilers)}"
    return None


@forward_only("flex")
def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: SparsePattern, *, scale: float, valid: Valid | None = None
) -> Tensor:
    """``[B, heads, Q, d]`` in the query's dtype: `SparsePattern`'s attention; padding comes out as zeros.

    The first call with each combination of head counts, groups, head size, block sizes, dtype and least power of two
    that holds the keys compiles for many seconds. Blocks are skipped, or computed without a mask, where the pattern
    allows. The diagonal and every block that is not chosen but holds a column are computed whole and masked, so many
    scattered columns make it slow.

    Raises:
        RuntimeError: where compilation is switched off, since the result would take ``Q x K`` memory.
    """
    return attend(query, key, value, pattern, scale, valid, tiles=(pattern.block_q, pattern.block_k))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: SparsePattern,
    scale: float,
    valid: Valid | None,
    *,
    tiles: tuple[int, int],
    options: Mapping[str, Any] | None = None,
) -> Tensor:
    """What `flex_attention` says, in other blocks than the pattern's.

    Args:
        tiles: queries and keys of the blocks that the kernel computes or skips. Those that hold more than the pattern
            are masked.
        options: torch's ``kernel_options``.
    """
    output = torch.empty_like(query) if valid is None else torch.zeros_like(query)
    for row, queries, keys in row_slices(query, key, valid):
        attended = _attend_row(
            query[row : row + 1, :, queries],
            key[row : row + 1, :, keys],
            value[row : row + 1, :, keys],
            pattern.blocks[row],
            None if pattern.columns is None else pattern.columns[row],
            (pattern.block_q, pattern.block_k),
            scale,
            tiles,
            dict(options or {}),
        )
        if attended.shape == query.shape:
            return attended  # all there is: copies of large tensors take a tenth of the time of sparse attention
        output[row, :, queries] = attended[0]
    return output


def split_blocks(seen: Tensor, first: int, block_q: int, tiles: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """``(full, partial)``, bool ``[G, nq, nk]`` each: tiles all of whose pairs are seen, and the others with some.

    Args:
        seen: as `seen_keys` has it, for the blocks of ``block_q`` queries from number ``first`` on.
        tiles: queries and keys of a tile; the first begins with the first query of ``seen``.
    """
    (tile_q, tile_k), num_keys = tiles, seen.shape[-1]
    # Queries and keys past the end are no pairs: they must not keep a tile from being full.
    missing = -num_keys % tile_k
    every = pad(seen, (0, missing), value=True).unflatten(2, (-1, tile_k)).all(dim=-1)
    some = pad(seen, (0, missing)).unflatten(2, (-1, tile_k)).any(dim=-1)
    if tile_q != block_q:
        step = math.gcd(tile_q, block_q)
        every, some = (x.repeat_interleave(block_q // step, dim=1) for x in (every, some))
        filling = (0, 0, 0, -every.shape[1] % (tile_q // step))
        every = pad(every, filling, value=True).unflatten(1, (-1, tile_q // step)).all(dim=2)
        some = pad(some, filling).unflatten(1, (-1, tile_q // step)).any(dim=2)
    low = first * block_q + torch.arange(every.shape[1], device=seen.device)[:, None] * tile_q
    begin = torch.arange(every.shape[2], device=seen.device) * tile_k
    full = every & ((begin + tile_k).clamp(max=num_keys) - 1 <= low)
    return full, some & (begin < low + tile_q) & ~full


def _attend_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    columns: Tensor | None,
    sizes: tuple[int, int],
    scale: float,
    tiles: tuple[int, int],
    options: dict[str, Any],
) -> Tensor:
    """One row without padding, ``[1, heads, Q, d]`` and ``[1, kv_heads, K, d]``."""
    (_, heads, num_queries, _), num_keys, (block_q, block_k) = query.shape, key.shape[2], sizes
    # Flex counts query blocks from the first query, a pattern from position 0: queries are added to fill a block.
    first, added = divmod(num_keys - num_queries, block_q)
    seen = seen_keys(blocks[:, first : -(-num_keys // block_q)], columns, block_k, num_keys)
    share = heads // len(blocks)
    rows = -(-(num_queries + added) // tiles[0])
    split = (x[:, :rows].repeat_interleave(share, dim=0) for x in split_blocks(seen, first, block_q, tiles))
    lists = [_listed(x) for x in split]
    # `pad` copies even where nothing is added.
    query = (pad(query, (0, 0, added, 0)) if added else query).contiguous()
    key, value = key.contiguous(), value.contiguous()
    table = None
    if columns is not None or block_q % tiles[0] or block_k % tiles[1]:
        # Lengths are compiled as variables, except in what the mask reads: torch 2.14 mixes up their names in the C++
        # that it generates for masks. The table is filled up to a power of two, and each power is compiled anew.
        capacity = max(LEAST_CAPACITY, 1 << (num_keys - 1).bit_length())
        table = pad(seen, (0, capacity - num_keys, 0, -(-capacity // block_q) - seen.shape[1]))
    for tensor, dims in (
        (query, [2]),
        (key, [2]),
        (value, [2]),
        *((count, [2]) for count, _ in lists),
        *((numbers, [2, 3]) for _, numbers in lists),
    ):
        maybe_mark_dynamic(tensor, dims)
    position = torch.tensor(first * block_q, dtype=torch.int32, device=query.device)
    with dynamo_config.patch(recompile_limit=VARIANTS, accumulated_recompile_limit=VARIANTS):
        attended = _compiled()(
            query, key, value, *lists[0], *lists[1], table, position, share, block_q, scale, tiles, options
        )
    return attended[:, :, added:]


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """``[1, H, nq]`` counts and ``[1, H, nq, nk]`` block numbers with the chosen ones first, int32, from a mask."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32)[None], order.to(torch.int32)[None]


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_flex_row, fullgraph=True, dynamic=False)


def _flex_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    full_counts: Tensor,
    full_numbers: Tensor,
    counts: Tensor,
    numbers: Tensor,
    table: Tensor | None,
    position: Tensor,
    share: int,
    block_q: int,
    scale: float,
    tiles: tuple[int, int],
    options: Any,
) -> Tensor:
    if not torch.compiler.is_compiling():
        raise RuntimeError("the flex backend runs compiled only, and torch.compile is switched off")

    def mask(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        # A tile within a chosen block lacks nothing but causality; to look pairs up in a table takes up to a sixth more
        # time.
        causal = key_index <= query_index + position
        if table is None:
            return causal
        return causal & table[head // share, query_index // block_q, key_index]

    block_mask = torch_flex.BlockMask.from_kv_blocks(
        counts,
        numbers,
        full_counts,
        full_numbers,
        BLOCK_SIZE=tiles,
        mask_mod=mask,
        seq_lengths=(query.shape[2], key.shape[2]),
        compute_q_blocks=False,  # of use in a backward pass only
    )
    attended: Any = torch_flex.flex_attention(
        query, key, value, block_mask=block_mask, scale=scale, enable_gqa=True, kernel_options=options
    )
    return attended
