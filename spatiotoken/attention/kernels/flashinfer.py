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
    position = torch.arange(num_keys, device=device)
    far = seen & (position < begin)
    # A request without keys gets one, whose result is not used.
    some_far = far.any(dim=-1)
    far = far.masked_fill((position == 0) & ~some_far[..., None], True)

    near_position = begin + torch.arange(block_q, device=device)
    is_key = near_position < num_keys
    is_query = is_key & (near_position >= num_keys - num_queries)
    near_seen = seen.gather(2, near_position.clamp(max=num_keys - 1).expand(units, -1, -1))
    near = near_seen[:, :, None] & (near_position[:, None] <= near_position[:, :, None])
    # Query by query and block by block, as FlashInfer reads masks.
    mask = near[:, is_query[:, :, None] & is_key[:, None]].flatten()

    counts = is_query.sum(dim=1)
    stacked = query.unflatten(0, (units, -1)).transpose(1, 2).flatten(0, 1).contiguous()
    cache = tuple(x.reshape(kv_heads * num_keys, 1, 1, dim) for x in (key, value))
    key_head = torch.arange(units, device=device) // (units // kv_heads)
    flat = far.flatten().nonzero()[:, 0]
    far_pages = key_head[flat // far[0].numel()] * num_keys + flat % num_keys
    near_pages = (key_head[:, None] * num_keys + near_position[is_key]).flatten()
    near_counts = is_key.sum(dim=1).repeat(units)
    attended = _joined(
        _attend(stacked, cache, counts.repeat(units), far_pages, far.sum(dim=-1).flatten(), scale),
        some_far.repeat_interleave(counts, dim=1).flatten(),
        _attend(stacked, cache, counts.repeat(units), near_pages, near_counts, scale, mask),
        near.any(dim=-1)[:, is_query].flatten(),
    )
    return attended.to(query.dtype).unflatten(0, (units, num_queries)).transpose(1, 2).flatten(0, 1)


def _joined(far: tuple[Tensor, Tensor], some_far: Tensor, near: tuple[Tensor, Tensor], some_near: Tensor) -> Tensor:
    """Float32 attention over the keys of two passes, by what `_attend` returns of each.

    Args:
        some_far, some_near: whether a query saw anything. What a kernel returns where it saw nothing may be anything.
    """
    (far_output, far_mass), (near_output, near_mass) = (
        (output.float().masked_fill(~some[:, None, None], 0.0), mass.masked_fill(~some[:, None], -torch.inf))
        for (output, mass), some in ((far, some_far), (near, some_near))
    )
    # FlashInfer's logarithms are to the base 2.
    share = torch.sigmoid((far_mass - near_mass) * math.log(2))
    return near_output.lerp(far_output, share[..., None])


def _attend(
    query: Tensor,
    cache: tuple[Tensor, ...],
    query_counts: Tensor,
    pages: Tensor,
    page_counts: Tensor,
    scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``[units * Q, heads, d]`` and the logarithm of the sums of weights, float32 ``[units * Q, heads]``.

    Args:
        query: ``[units * Q, heads, d]``.
        cache: keys and values, ``[kv_heads * K, 1, 1, d]`` each: pages of one key of one head.
        query_counts, page_counts: queries and pages of each request.
        pages: those of all requests, one request after the other.
        mask: which of the keys of its request each query sees; None for all.
    """
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=query.device)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        _bounds(query_counts),
        _bounds(page_counts),
        pages.int(),
        torch.ones_like(page_counts, dtype=torch.int32),
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
