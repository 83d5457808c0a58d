"""SeerAttention: learned gates on pooled queries and keys pick the blocks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.attention.base import BlockPattern, PrefillInputs
from spatiotoken.attention.blocks import causal_blocks, largest, num_blocks, per_head, pooled
from spatiotoken.attention.kernels import SparsePattern
from spatiotoken.gates import gate_tensors

Gate = tuple[Tensor, Tensor | None]
"""Linear maps of one layer: of keys ``[kv_heads or heads, 3 d, hidden]``, of queries ``[heads, d, hidden]`` or none."""


def layer_gate(path: Path, inputs: PrefillInputs) -> Gate:
    """The gate of a layer, named ``...layers.N.self_attn.attn_gate.mask_linear_{q,k}.weight`` as the authors save it.

    Raises:
        ValueError: the file has none for the layer, or one of another shape.
    """
    (heads, _, dim), kv_heads = inputs.query.shape, len(inputs.key)
    prefix = f"layers.{inputs.layer}.self_attn.attn_gate.mask_linear_"
    found = gate_tensors("seerattention", path, prefix, inputs.query.device)
    key, query = found.get("k.weight"), found.get("q.weight")
    if key is None:
        raise ValueError(f"seerattention: {path} has no tensor {prefix}k.weight")
    sizes = [list(x.shape) for x in (key, query) if x is not None]
    hidden = key.shape[-1] if query is not None else dim
    keys = [[count, 3 * dim, hidden] for count in sorted({heads, kv_heads if query is not None else heads})]
    if sizes[0] not in keys or sizes[1:] not in ([], [[heads, dim, hidden]]):
        raise ValueError(
            f"seerattention: the gate of layer {inputs.layer} in {path} does not fit the model: expected mask_linear_k "
            f"of {' or '.join(map(str, keys))}, and mask_linear_q, if any, of {[heads, dim, hidden]}; found {sizes}"
        )
    return key, query


def rotated(states: Tensor, position: Tensor, theta: float) -> Tensor:
    """``states [..., n, d]`` with the rotary embedding of ``position [n]`` put on, in halves."""
    half = states.shape[-1] // 2
    angle = position[:, None] * theta ** (-torch.arange(half, device=states.device) / half)
    low, high = states[..., :half], states[..., half:]
    return torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], dim=-1)


def max_min_mean(states: Tensor, block: int) -> Tensor:
    """``[heads, n, 3 d]`` float32 of ``states [heads, L, d]``, pooled by blocks."""
    missing = num_blocks(states.shape[1], block) * block - states.shape[1]
    high = torch.nn.functional.pad(states.float(), (0, 0, 0, missing), value=-torch.inf).unflatten(1, (-1, block))
    low = torch.nn.functional.pad(states.float(), (0, 0, 0, missing), value=torch.inf).unflatten(1, (-1, block))
    return torch.cat([high.amax(dim=2), low.amin(dim=2), pooled(states, block)], dim=-1)


def gate_logits(inputs: PrefillInputs, gate: Gate | None, block: int, rope_theta: float | None) -> Tensor:
    """``[heads, n, n]`` float32, -inf where no key of the block is seen. See `SeerAttention`."""
    query, key, scale = inputs.query.float(), inputs.key.float(), inputs.scale
    position = torch.arange(inputs.length, dtype=torch.float32, device=query.device)
    if rope_theta is not None:
        query, key = rotated(query, -position, rope_theta), rotated(key, -position, rope_theta)
    query = pooled(query, block)
    if gate is None:
        key = pooled(key, block)
    else:
        key_map, query_map = gate
        key = max_min_mean(key, block)
        key = per_head(key, key_map.shape[0] // key.shape[0]) @ key_map.float()
        query = query if query_map is None else query @ query_map.float()
        scale = key.shape[-1] ** -0.5
    if rope_theta is not None:
        query, key = rotated(query, position[::block], rope_theta), rotated(key, position[::block], rope_theta)
    logits = (query * scale) @ per_head(key, query.shape[0] // key.shape[0]).transpose(1, 2)
    return logits.masked_fill(~causal_blocks(inputs.length, block, block, logits.device), -torch.inf)


class SeerAttention(BlockPattern, method="seerattention", paper="2410.13276"):
    """SeerAttention: blocks picked by gates trained on pooled queries and keys (arXiv 2410.13276).

    Per head, the mean of each block of queries and the maximum, minimum and mean of each block of keys go through
    linear maps; the softmax of their products is the gate of a block, which is computed above ``threshold`` or within
    a share of the best. ``weights`` is a safetensors file with the tensors of the authors' ``attn_gate_weights.pth``
    (gate type ``Qavg_Kmaxminavg``), by the same names.

    WITHOUT ``weights`` THE GATES ARE UNTRAINED: identities on mean-pooled queries and keys, a plain block estimate and
    not SeerAttention.

    The authors pool before the rotary embedding and put it on the pooled states, at the position of a block's first
    token. Here states carry it already: ``rope_theta`` takes it off first, which holds only for the plain embedding
    (no scaling, all channels, in halves) at positions 0 to L - 1, so not for multi-axis positions. Without it the gates
    read states as they are and their weights must have been trained on such states. Ours otherwise: the diagonal blocks
    are always computed, gates are float32, and ties go to the first block.
    """

    kind: ClassVar[str] = "estimated"
    complexity: ClassVar[str] = "O(Ld + L^2 d / b^2)"
    fidelity: ClassVar[str] = "paper only"

    weights: Path | None = Field(None, description="safetensors file of trained gates; None for untrained ones")
    sparsity_method: Literal["threshold", "nz_ratio"] = Field("threshold", description="how gates pick blocks")
    threshold: float = Field(5e-4, ge=0.0, le=1.0, description="gate above which a block is computed; for threshold")
    nz_ratio: float = Field(1.0, gt=0.0, le=1.0, description="share of the causal blocks computed; for nz_ratio")
    last_block_dense: bool = Field(True, description="the last two blocks of queries see everything")
    rope_theta: float | None = Field(None, gt=0.0, description="base of the rotary embedding; None leaves it on")
    block: int = Field(64, ge=1, description="tokens of a block of queries or keys")

    def is_dense(self, length: int, layer: int, depth: int) -> bool:
        dense = self.block * (2 if self.last_block_dense else 1)
        return length <= dense or (self.sparsity_method == "nz_ratio" and self.nz_ratio == 1)

    def pattern(self, inputs: PrefillInputs) -> SparsePattern:
        gate = None if self.weights is None else layer_gate(self.weights, inputs)
        logits = gate_logits(inputs, gate, self.block, self.rope_theta)
        count = logits.shape[-1]
        if self.sparsity_method == "threshold":
            chosen = logits.softmax(dim=-1) > self.threshold
        else:
            # The best t of n keep 1 - (1 - t / n)^2 of the pairs, since early queries have fewer to pick from.
            chosen = largest(logits, max(1, int((1 - math.sqrt(1 - self.nz_ratio)) * count)))
        chosen |= torch.eye(count, dtype=torch.bool, device=logits.device)
        if self.last_block_dense:
            chosen[:, -2:] = True
        chosen &= causal_blocks(inputs.length, self.block, self.block, logits.device)
        return SparsePattern(chosen[None], None, self.block, self.block)
