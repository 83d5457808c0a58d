"""Blocks by the mass on the antidiagonals of a strided attention map (arXiv 2503.16428)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from spatiotoken.attention.base import BlockPattern, PrefillInputs
from spatiotoken.attention.blocks import num_blocks
from spatiotoken.attention.kernels import SparsePattern

MAX_WEIGHTS = 2**25
"""Floats of the strided map that are held at once, where one block of queries has no more."""


def antidiagonal_mass(query: Tensor, key: Tensor, scale: float, stride: int, block: int) -> Tensor:
    """``[heads, nq, nk]`` float32 mass of each block of the causal softmax over the strided map.

    A cell of the strided map is the mean logit on the antidiagonal of ``stride`` queries by ``stride`` keys: the first
    query with the last key, and so on. The rows of a block of queries sum to its groups of ``stride`` queries. A last
    group that is short is filled with zeros, as the authors fill it; groups without any token count for nothing.

    Args:
        query: ``[heads, L, d]``.
        key: ``[kv_heads, L, d]``, ``heads`` a multiple of ``kv_heads``.
        scale: factor of the logits.
        stride: tokens of a group; divides ``block``.

    Raises:
        ValueError: if ``stride`` does not divide ``block``.
    """
    if block % stride:
        raise ValueError(f"the block must be a multiple of the stride, got {block} and {stride}")
    heads, length, _ = query.shape
    count, rows, real = num_blocks(length, block), block // stride, num_blocks(length, stride)
    fill = (0, 0, 0, count * block - length)
    # Half-precision products can overflow before they are scaled.
    folded_key, folded_query = (
        torch.nn.functional.pad(states.float(), fill).unflatten(1, (-1, stride)) for states in (key, query)
    )
    folded_key = folded_key.flatten(2).transpose(1, 2)
    folded_query = (folded_query.flip(2).flatten(2) * (scale / stride)).unflatten(0, (key.shape[0], -1))
    position = torch.arange(count * rows, device=query.device)
    mass = torch.zeros(heads, count, count, device=query.device)
    step = max(1, MAX_WEIGHTS // (heads * rows * rows * count))
    for start in range(0, count, step):
        stop = min(start + step, count)
        now = slice(start * rows, stop * rows)
        # Heads on one key head are more rows of one product.
        logits = folded_query[:, :, now].flatten(1, 2) @ folded_key[..., : stop * rows]
        logits = logits.view(heads, -1, stop * rows)
        logits.masked_fill_(position[: stop * rows] > position[now, None], -torch.inf)
        weights = logits.softmax(dim=-1).mul_((position[now] < real)[:, None])
        mass[:, start:stop, :stop] = weights.view(heads, stop - start, rows, stop, rows).sum(dim=(2, 4))
    return mass


def covering_blocks(mass: Tensor, threshold: float, loose: int = 0) -> Tensor:
    """Bool like ``mass [heads, n, n]``: block 0, the diagonal, then the largest until ``threshold`` of each row's mass
    is reached, with the one that crosses it; ties go to the first.

    Args:
        loose: first rows that get block 0 on top of the others, and of the others one more than they need.
    """
    count = mass.shape[-1]
    always = torch.eye(count, dtype=torch.bool, device=mass.device)
    always[loose:, 0] = True  # a block that is not forced is counted where it ranks
    # Sums as the authors take them, in double precision.
    exact = mass.double()
    others = exact.masked_fill(always, 0)
    order = others.argsort(dim=-1, descending=True, stable=True)
    ranked = others.gather(-1, order)
    before = ranked.cumsum(dim=-1) - ranked + (exact * always).sum(dim=-1, keepdim=True)
    before[:, :loose] = torch.nn.functional.pad(before[:, :loose, :-1], (1, 0))
    taken = (before < threshold * exact.sum(dim=-1, keepdim=True)) & (ranked > 0)
    kept = torch.zeros_like(taken).scatter_(-1, order, taken) | always
    kept[..., 0] = True
    return kept


def first_chunk(length: int) -> int:
    """Tokens of the first chunk that the authors' code takes a prompt of ``length`` tokens in."""
    whole = 1 << (length - 1).bit_length()
    return max(min(max(2048, whole), 2**28 // whole), 2048)


class XAttention(BlockPattern, method="xattention", paper="2503.16428"):
    """Sparse prefill over the blocks that the antidiagonals of a strided map score highest (arXiv 2503.16428).

    Every antidiagonal crosses all stripes and slashes of its block, so ``stride`` queries by ``stride`` keys are scored
    in one product. Each block of queries keeps block 0, itself, and then the heaviest blocks until ``threshold`` of its
    mass is reached.

    In the rows of its first chunk (all of a prompt of up to 16384 tokens) the authors' code does not count block 0 as
    kept, and takes one block more than the threshold asks for; ``reference`` does the same, for their numbers.

    The logits take the model's own scale instead of one by the square root of the channels. A prompt is filled up to
    whole blocks, not to the authors' chunks, which gives the same; chunks here only bound the memory. The scores are
    float32 also for models in half precision.
    """

    kind: ClassVar[str] = "estimated"
    complexity: ClassVar[str] = "O(L^2 d / stride)"
    fidelity: ClassVar[str] = "authors' vectors"

    threshold: float = Field(0.9, gt=0, le=1, description="share of the strided map's mass that the blocks keep")
    stride: int = Field(16, ge=1, description="tokens of a group that is scored as one; the authors offer 8 and 16")
    block: int = Field(128, ge=1, description="tokens of a block of queries or keys, a multiple of the stride")

    reference: bool = Field(False, description="the first chunk's rows as in the authors' code, one block heavier")

    @model_validator(mode="after")
    def _whole_groups(self) -> XAttention:
        if self.block % self.stride:
            raise ValueError(f"block must be a multiple of stride, got {self.block} and {self.stride}")
        return self

    def is_dense(self, length: int, layer: int, depth: int) -> bool:
        return self.threshold == 1 or length <= 2 * self.block

    def pattern(self, inputs: PrefillInputs) -> SparsePattern:
        mass = antidiagonal_mass(inputs.query, inputs.key, inputs.scale, self.stride, self.block)
        loose = first_chunk(inputs.length) // self.block if self.reference else 0
        return SparsePattern(covering_blocks(mass, self.threshold, loose)[None], None, self.block, self.block)
