"""Block-sparse attention by FlashInfer's prefill kernels over pages of single keys, on GPUs."""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch
from torch import Tensor

from spatiotoken.attention.kernels.forward_only import forward_only
from spatiotoken.attention.kernels.pattern import SparsePattern, Valid, row_slices, seen_keys

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128, 256)
WORKSPACE = 128 << 20  # bytes; what FlashInfer recommends


def unavailable(device: torch.device) -> str | None:
    """Why the backend cannot run on a device; None where it can."""
    if find_spec("flashinfer") is None:
        return "FlashInfer is not installed (pip install 'spatiotoken[flashinfer]')"
    return None if device.type == "cuda" else f"it needs CUDA tensors, not {device.type}"


@forward_only("flashinfer")
def flashinfer_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: SparsePattern, *, scale: float, valid: Valid | None = None
) -> Tensor:
    """``[B, heads, Q, d]`` in the query's dtype: `SparsePattern`'s attention; padding comes out as zeros.

    Two passes: keys before a block of queries, which all of these see, without a mask, and the keys of the block itself
    with one. The results are joined by their log-sum-exp. The host waits for the device, since FlashInfer plans there.
    The first call with each dtype and head size compiles.

    Raises:
        RuntimeError: for float32 or a head size that FlashInfer has no kernel for.
    """
    if query.dtype not in DTYPES or query.shape[-1] not in HEAD_DIMS:
        raise RuntimeError(
            f"the flashinfer backend takes float16 and bfloat16 and head sizes of {', '.join(map(str, HEAD_DIMS))}, "
            f"got {query.dtype} and {query.shape[-1]}; gather takes all"
        )
    output = torch.empty_like(query) if valid is None else torch.zeros_like(query)
    for row, queries, keys in row_slices(query, key, valid):
        output[row, :, queries] = _attend_row(
            query[row, :, queries],
            key[row, :, keys],
            value[row, :, keys],
            pattern.blocks[row],
            None if pattern.columns is None else pattern.columns[row],
            (pattern.block_q, pattern.block_k),
            scale,
        )
    return output


def _attend_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    columns: Tensor | None,
    sizes: tuple[int, int],
    scale: float,
) -> Tensor:
    """One row without padding, ``[heads, Q, d]`` and ``[kv_heads, K, d]``.

    A request of FlashInfer's is a block of queries of one unit: a key head with the heads on it or, where each head has
    a pattern of its own, a head.
    """
    (_, num_queries, dim), (kv_heads, num_keys, _) = query.shape, key.shape
    (block_q, block_k), units, device = sizes, max(kv_heads, len(blocks)), query.device
    first, stop = (num_keys - num_queries) // block_q, -(-num_keys // block_q)
    seen = seen_keys(blocks[:, first:stop], columns, block_k, num_keys).expand(units, -1, -1)

    begin = torch.arange(first, stop, device=device)[:, None] * block_q
    end = (begin + block_q).clamp(max=num_keys)
    position = torch.arange(num_keys, device=device)
    far = seen & (position < begin)
    # A request without keys gets one, whose result is not used.
    some_far = far.any(dim=-1)
    far = far.masked_fill((position == 0) & ~some_far[..., None], True)

    near_position = begin + torch.arange(block_q, device=device)
    is_key = near_position < end
    is_query = is_key & (near_position >= num_keys - num_queries)
    near_seen = seen.gather(2, near_position.clamp(max=num_keys - 1).expand(units, -1, -1))
    near = near_seen[:, :, None] & (near_position[:, None] <= near_position[:, :, None])
    # Query by query and block by block, as FlashInfer reads masks.
    mask = near[:, is_query[:, :, None] & is_key[:, None]].flatten()

    counts = is_query.sum(dim=1)
    stacked = query.unflatten(0, (units, -1)).transpose(1, 2).flatten(0, 1).contiguous()
    cache = tuple(x.reshape(kv_heads * num_keys, 1, 1, dim) for x in (key, value))
    within = ((position >= begin) & (position < end)).expand(units, -1, -1)
    far_output, far_mass = _attend(stacked, cache, far, counts, None, scale)
    near_output, near_mass = _attend(stacked, cache, within, counts, mask, scale)

    # What a kernel returns where it saw nothing may be anything.
    far_lacks = ~some_far.repeat_interleave(counts, dim=1).flatten()[:, None]
    near_lacks = ~near.any(dim=-1)[:, is_query].flatten()[:, None]
    far_mass, near_mass = far_mass.masked_fill(far_lacks, -torch.inf), near_mass.masked_fill(near_lacks, -torch.inf)
    far_output = far_output.masked_fill(far_lacks[..., None], 0.0)
    near_output = near_output.masked_fill(near_lacks[..., None], 0.0)
    # FlashInfer's logarithms are to the base 2.
    share = torch.sigmoid((far_mass - near_mass) * math.log(2))[..., None]
    joined = near_output.float().lerp(far_output.float(), share).to(query.dtype)
    return joined.unflatten(0, (units, num_queries)).transpose(1, 2).flatten(0, 1)


def _attend(
    query: Tensor, cache: tuple[Tensor, ...], seen: Tensor, counts: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """``[units * Q, heads, d]`` and the logarithm of the sums of weights, float32 ``[units * Q, heads]``.

    Args:
        query: ``[units * Q, heads, d]``.
        cache: keys and values, ``[kv_heads * K, 1, 1, d]`` each: pages of one key of one head.
        seen: bool ``[units, nq, K]``.
        counts: queries in each block, ``[nq]``.
        mask: which of the keys of its request each query sees; None for all.
    """
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    units, _, num_keys = seen.shape
    unit, _, key = seen.nonzero(as_tuple=True)
    pages = unit // (units // (len(cache[0]) // num_keys)) * num_keys + key
    counted = seen.sum(dim=-1).flatten()
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=query.device)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        _bounds(counts.repeat(units)),
        _bounds(counted),
        pages.int(),
        torch.ones_like(counted, dtype=torch.int32),
        query.shape[1],
        1,
        query.shape[2],
        1,
        custom_mask=mask,
        sm_scale=scale,
        q_data_type=query.dtype,
    )
    attended: tuple[Tensor, Tensor] = wrapper.run(query, cache, return_lse=True)
    return attended


def _bounds(counts: Tensor) -> Tensor:
    """Where each request begins and the last one ends, int32."""
    return torch.nn.functional.pad(counts.cumsum(dim=0), (1, 0)).int()
