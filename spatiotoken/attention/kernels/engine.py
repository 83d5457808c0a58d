"""One entry to all backends of block-sparse attention: checks the inputs and picks what runs."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from spatiotoken.attention.kernels.pattern import SparsePattern, Valid, pair_counts, row_slices

BACKENDS = ("reference", "gather", "flex", "triton", "flashinfer", "flex_flash")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: SparsePattern,
    *,
    scale: float,
    valid: Valid | None = None,
    backend: str = "auto",
) -> Tensor:
    """``[B, heads, Q, d]`` in the query's dtype: causal attention over what `SparsePattern` holds.

    Queries are aligned to the last keys. Rows of padding queries are zeros. For inference: only ``dense`` and
    ``reference`` have a backward pass.

    Args:
        query: ``[B, heads, Q, d]`` float32, float16 or bfloat16.
        key, value: ``[B, kv_heads, K, d]``, ``K >= Q``, ``heads`` a multiple of ``kv_heads``.
        scale: factor of the logits.
        valid: see `Valid`; None where there is no padding.
        backend: one of `BACKENDS`, ``dense`` (for patterns that hold everything) or ``auto``; see `choose`.

    Raises:
        ValueError: for inputs that do not fit together, or a backend that there is not.
        RuntimeError: for a backend that cannot run here; in the backward pass of one that has none.
    """
    _check(query, key, value, pattern, valid)
    name = choose(pattern, query, key, backend, valid)
    if name == "dense":
        return _dense(query, key, value, scale, valid)
    return _kernel(name)(query, key, value, pattern, scale=scale, valid=valid).to(query.dtype)


def choose(
    pattern: SparsePattern, query: Tensor, key: Tensor, backend: str = "auto", valid: Valid | None = None
) -> str:
    """The backend that `block_sparse_attention` runs for these arguments: ``dense`` or one of `BACKENDS`.

    ``auto`` is ``dense`` where the pattern holds every causal pair (counting them waits for the device), else
    `best_backend`.

    Raises:
        ValueError: for an unknown name, or ``dense`` for a pattern that leaves pairs out.
        RuntimeError: for a backend that cannot run here; it says why and names those that can.
    """
    if backend not in ("auto", "dense", *BACKENDS):
        raise ValueError(f"there is no backend {backend!r}; take 'auto', 'dense' or one of {', '.join(BACKENDS)}")
    if backend in BACKENDS:
        reason = unavailable(backend, query.device)
        if reason is not None:
            there = ", ".join(name for name in BACKENDS if unavailable(name, query.device) is None)
            raise RuntimeError(f"the {backend} backend cannot run here: {reason}; there are {there}")
        return backend
    computed, causal = pair_counts(pattern, query.shape[2], key.shape[2], valid)
    if computed == causal:
        return "dense"
    if backend == "dense":
        raise ValueError(f"'dense' computes all causal pairs, but the pattern holds {computed} of {causal}")
    return best_backend(query)


def best_backend(query: Tensor) -> str:
    """What runs a pattern that leaves pairs out, on the query's device.

    On CPUs ``gather`` was quicker than ``flex`` at every density measured, and it compiles nothing. On GPUs it is for
    what ``triton`` is not made for.
    """
    if not query.is_cuda or unavailable("triton", query.device) is not None:
        return "gather"
    from spatiotoken.attention.kernels.triton import MAX_HEAD_DIM

    return "triton" if query.shape[-1] <= MAX_HEAD_DIM else "gather"


def predicted_time(backend: str, density: float, shared: bool) -> float:
    """Time of sparse attention as a share of dense causal attention, without the estimate of the pattern.

    For ``gather`` rough lines through what ``scripts/benchmark.py --suite attention`` measured on a CPU
    (docs/benchmarks.md), nearer to the methods' patterns, which have scattered keys, than to random blocks. For others
    it is the density alone: no GPU has timed them yet, or they are not for speed.

    Args:
        shared: heads on one key head have one pattern, so that its keys are gathered once for all of them.
    """
    if backend != "gather":
        return density
    return 0.05 + (1.15 if shared else 1.5) * density


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why one of `BACKENDS` cannot run on a device; None where it can."""
    if backend == "triton":
        # It cannot be imported where triton is not, so it cannot be asked.
        if find_spec("triton") is None:
            return "triton is not installed"
        from spatiotoken.attention.kernels.triton import INTERPRETED

        return None if device.type == "cuda" or INTERPRETED else f"it needs CUDA tensors, not {device.type}"
    if backend in ("flex", "flex_flash", "flashinfer"):
        reason: str | None = _module(backend).unavailable(device)
        return reason
    return None


def _kernel(name: str) -> Callable[..., Tensor]:
    kernel: Callable[..., Tensor] = getattr(_module(name), f"{name}_attention")
    return kernel


def _module(backend: str) -> ModuleType:
    """Imported late, since some are slow to load."""
    return import_module(f"spatiotoken.attention.kernels.{backend}")


def _dense(query: Tensor, key: Tensor, value: Tensor, scale: float, valid: Valid | None) -> Tensor:
    """All causal pairs; padded rows one by one, so there is no mask where queries and keys are equally many."""
    if valid is None:
        return _causal(query, key, value, scale)
    output = list(torch.zeros_like(query))
    for row, queries, keys in row_slices(query, key, valid):
        one = slice(row, row + 1)
        attended = _causal(query[one, :, queries], key[one, :, keys], value[one, :, keys], scale)
        output[row] = torch.nn.functional.pad(attended[0], (0, 0, queries.start, query.shape[2] - queries.stop))
    return torch.stack(output)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    mask = None
    if (earlier := key.shape[2] - query.shape[2]) > 0:
        position = torch.arange(key.shape[2], device=query.device)
        mask = position <= position[earlier:, None]
    # Repeated rather than left to torch's `enable_gqa`, which takes Q x K memory for float32 on GPUs.
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)


def _check(query: Tensor, key: Tensor, value: Tensor, pattern: SparsePattern, valid: Valid | None) -> None:
    if query.ndim != 4 or key.ndim != 4 or value.shape != key.shape:
        raise ValueError(
            "query must be [B, heads, Q, d] and key and value [B, kv_heads, K, d], "
            f"got {list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    (batch, heads, num_queries, dim), (kv_batch, kv_heads, num_keys, kv_dim) = query.shape, key.shape
    if batch != kv_batch or dim != kv_dim:
        raise ValueError(f"query {list(query.shape)} and key {list(key.shape)} differ in batch or head size")
    if heads % kv_heads:
        raise ValueError(f"{heads} heads are not a multiple of {kv_heads} key heads")
    if not 1 <= num_queries <= num_keys:
        raise ValueError(f"there must be 1 to K = {num_keys} queries, got {num_queries}")
    if query.dtype not in DTYPES or {key.dtype, value.dtype} != {query.dtype}:
        raise ValueError(
            "query, key and value must be all float32, float16 or bfloat16, "
            f"got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    groups = pattern.blocks.shape[1]
    if groups not in (1, kv_heads, heads):
        raise ValueError(f"a pattern has 1, {kv_heads} (key heads) or {heads} (heads) groups, got {groups}")
    expected = [batch, groups, -(-num_keys // pattern.block_q), -(-num_keys // pattern.block_k)]
    if list(pattern.blocks.shape) != expected:
        raise ValueError(
            f"blocks of {pattern.block_q} x {pattern.block_k} over {num_keys} keys are {expected}, "
            f"got {list(pattern.blocks.shape)}"
        )
    tensors = [key, value, pattern.blocks, *(valid or ())]
    if any(x.device != query.device for x in tensors):
        raise ValueError(f"all tensors must be on one device, got {sorted({str(x.device) for x in [query, *tensors]})}")
    if valid is None:
        return
    for name, bound in zip(("start", "stop"), valid, strict=True):
        if bound.dtype != torch.int64 or list(bound.shape) != [batch]:
            raise ValueError(f"{name} must be int64 [{batch}], got {bound.dtype} {list(bound.shape)}")
    for start, stop in zip(*(bound.tolist() for bound in valid), strict=True):
        if not 0 <= start <= stop <= num_keys:
            raise ValueError(f"valid keys must be 0 <= start <= stop <= {num_keys}, got {start} and {stop}")
