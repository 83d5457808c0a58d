"""DeltaLLM: outside a local window, a key that has hardly changed is taken as the one stored before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import pad

from spatiotoken.attention.base import Part, PrefillInputs, SparsePrefill
from spatiotoken.attention.blocks import causal_blocks, num_blocks
from spatiotoken.attention.kernels import SparsePattern

NEVER = -3e4
"""Key bias of a slot that holds nothing; finite in float16."""


def stored_keys(key: Tensor, threshold: float) -> Tensor:
    """``[kv_heads, segments, b]`` bool: the keys of ``key [kv_heads, segments, b, d]`` that are stored.

    The first of each segment is, and each whose distance to the last stored one exceeds ``threshold`` of its norm.
    """
    states = key.float()
    reference = states[:, :, 0]
    stored = [torch.ones_like(reference[..., 0], dtype=torch.bool)]
    for place in range(1, states.shape[2]):
        current = states[:, :, place]
        stored.append((current - reference).norm(dim=-1) > threshold * reference.norm(dim=-1))
        reference = torch.where(stored[-1][..., None], current, reference)
    return torch.stack(stored, dim=-1)


def compacted(key: Tensor, value: Tensor, stored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The stored keys at the front of their segments, the mean of the values that each stands for, and their number.

    Args:
        key, value: ``[kv_heads, segments, b, d]``.
        stored: ``[kv_heads, segments, b]`` as `stored_keys` gives it.

    Returns:
        Keys and float32 values ``[kv_heads, segments, b, d]``, sizes ``[kv_heads, segments, b]``; size 0 where a slot
        holds nothing.
    """
    block = key.shape[2]
    order = (~stored).byte().argsort(dim=-1, stable=True)
    live = torch.arange(block, device=key.device) < stored.sum(dim=-1, keepdim=True)
    start = order.where(live, block)
    end = pad(start[..., 1:], (0, 1), value=block)
    running = pad(value.float().cumsum(dim=2), (0, 0, 1, 0))
    first, last = (place[..., None].expand_as(value) for place in (start, end))
    size = end - start
    mean = (running.gather(2, last) - running.gather(2, first)) / size.clamp(min=1)[..., None]
    return key.gather(2, order[..., None].expand_as(key)), mean, size


class DeltaLLM(SparsePrefill, method="deltallm", paper="2507.19608"):
    """DeltaLLM: hardly changed keys outside a local window count as the key stored before (arXiv 2507.19608).

    Within each segment of ``block_q`` tokens, keys are compared to the last stored one, per key head. A query sees the
    keys of its local window as they are, and all segments wholly before it by their stored keys: once each, with the
    mean of the values and the logarithm of the number of keys that it stands for. That is exactly attention with
    these keys replaced by stored ones.

    From the paper (its abstract; no code was found): full attention in a local context window, and outside it keys by
    their differences from the ones before, of which small ones count as none. Ours: the difference is that of the
    whole key, relative to the norm of the stored one, where hardware for sparse deltas can skip single channels;
    segments, whose first key is always stored; ``threshold`` and the sizes. Keys carry the rotary embedding here, so
    equal content at another position is a changed key. Time is saved only where a segment stores fewer keys
    than fit its last block of ``block_k``: expect less than the share of unchanged keys, and nothing in prompts without
    repetition. Finding the stored keys takes ``block_q`` steps one after the other.

    Raises:
        ValueError: ``block_q`` is no multiple of ``block_k``.
    """

    kind: ClassVar[str] = "approximate"
    complexity: ClassVar[str] = "O(Ld)"
    fidelity: ClassVar[str] = "paper only"

    threshold: float = Field(0.5, ge=0.0, description="change up to which a key counts as the stored one, by its norm")
    window: int = Field(1024, ge=1, description="latest keys that each query sees as they are, itself included")
    block_q: int = Field(128, ge=1, description="tokens of a block of queries and of a segment of keys")
    block_k: int = Field(16, ge=1, description="tokens of a block of keys")

    @model_validator(mode="after")
    def _blocks_fit(self) -> DeltaLLM:
        if self.block_q % self.block_k:
            raise ValueError(f"block_q must be a multiple of block_k, got {self.block_q} and {self.block_k}")
        return self

    def is_dense(self, length: int, layer: int, depth: int) -> bool:
        return (length - 1) // self.block_q * self.block_q - self.window + 1 < self.block_q

    def parts(self, inputs: PrefillInputs) -> Sequence[Part]:
        length, device, block = inputs.length, inputs.query.device, self.block_q
        dim, segments = inputs.query.shape[-1], (length - 1) // block
        before, carried = (x[:, : segments * block].unflatten(1, (segments, block)) for x in (inputs.key, inputs.value))
        keys, values, size = compacted(before, carried, stored_keys(before, self.threshold))

        # One more channel is the bias of the logit; the width stays a multiple of 8.
        spare = -(dim + 1) % 8
        bias = (size.float().log() / inputs.scale).where(size > 0, NEVER).to(keys.dtype)
        keys = torch.cat([keys, bias[..., None]], dim=-1).flatten(1, 2)
        key = pad(torch.cat([keys, pad(inputs.key, (0, 1))], dim=1), (0, spare))
        value = pad(torch.cat([values.flatten(1, 2).to(inputs.value.dtype), inputs.value], dim=1), (0, 1 + spare))
        query = pad(pad(inputs.query, (0, 1), value=1.0), (0, spare))

        # Segments before this one are seen by their stored keys, the others as they are.
        number = torch.arange(num_blocks(length, block), device=device)[:, None]
        limit = (number * block - self.window + 1).clamp(min=0) // block
        per = block // self.block_k
        live = torch.arange(per, device=device) * self.block_k < (size > 0).sum(dim=-1, keepdim=True)
        far = torch.arange(segments, device=device) < limit
        near = torch.arange(num_blocks(length, self.block_k), device=device) // per >= limit
        near &= causal_blocks(length, block, self.block_k, device)
        stored = (live[:, None] & far[:, :, None]).flatten(2)
        # Query blocks count from the first stored key; no query stands there.
        blocks = pad(torch.cat([stored, near.expand(len(stored), -1, -1)], dim=-1), (0, 0, segments, 0))
        return [Part(query, key, value, SparsePattern(blocks[None], None, block, self.block_k))]
