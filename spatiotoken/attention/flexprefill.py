"""Per head vertical and slash lines or single blocks, as many as its mass needs (arXiv 2502.20766)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.attention.base import BlockPattern, PrefillInputs
from spatiotoken.attention.blocks import causal_blocks, num_blocks, per_head, pooled
from spatiotoken.attention.kernels import SparsePattern
from spatiotoken.attention.weights import row_weights


def line_mass(query: Tensor, key: Tensor, scale: float, rows: int) -> tuple[Tensor, Tensor]:
    """``[heads, L]`` each: mean mass of the last ``rows`` queries on each key, and on each distance from it.

    Distances count down: the last entry is the query's own key. Arguments as of ``active_blocks``.
    """
    length, groups = query.shape[1], query.shape[0] // key.shape[0]
    position = torch.arange(length, device=query.device)
    visible = (position <= position[length - rows :, None])[None]
    vertical, slash = [], []
    # One key head at a time: the weights of all heads together would be large.
    for heads, states in zip(query.split(groups), key, strict=True):
        weights = row_weights(heads[None, :, length - rows :], states[None, None], visible, scale)[0]
        vertical.append(weights.mean(dim=1))
        # Entry (i, j + i) of the widened rows is query i at the j-th distance.
        wide = torch.nn.functional.pad(weights, (rows - 1, 0)).contiguous()
        shape, steps = (groups, length, rows), (rows * wide.shape[-1], 1, wide.shape[-1] + 1)
        slash.append(wide.as_strided(shape, steps).mean(dim=-1))
    return torch.cat(vertical), torch.cat(slash)


def tokens_needed(mass: Tensor, gamma: float) -> Tensor:
    """``[heads]`` how many of the largest of ``mass [heads, n]`` exceed ``gamma``; n + 1 if all do not."""
    ranked = mass.sort(dim=-1, descending=True).values
    return (ranked.cumsum(dim=-1) <= gamma).sum(dim=-1) + 1


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence (natural logarithm) along the last dimension."""
    middle = ((first + second) / 2).clamp(min=torch.finfo(first.dtype).tiny)
    halves = torch.xlogy(first, first / middle) + torch.xlogy(second, second / middle)
    return (halves.sum(dim=-1) / 2).clamp(min=0).sqrt()


def active_blocks(
    query: Tensor, key: Tensor, scale: float, block: int, gamma: float, tau: float, least: int, unit: int
) -> Tensor:
    """``[heads, n, n]`` bool: the blocks that each head computes.

    Args:
        query: ``[heads, L, d]``.
        key: ``[kv_heads, L, d]``, ``heads`` a multiple of ``kv_heads``.
        scale: factor of the logits.
        block: tokens of a block.
        gamma: share of the mass to be covered.
        tau: divergence below which a head takes single blocks by pooled queries and keys.
        least: vertical and slash blocks that each head has at least.
        unit: tokens that add a block to the budget of lines.
    """
    heads, length, _ = query.shape
    count, rows = num_blocks(length, block), min(block, length)
    vertical, slash = line_mass(query, key, scale, rows)
    pooled_key = per_head(pooled(key, block), heads // key.shape[0]).transpose(1, 2)

    columns, diagonals = _block_sums(vertical, block), _block_sums(slash, block).flip(-1)
    guess = (query[:, length - rows :].float().mean(dim=1, keepdim=True) * scale @ pooled_key).softmax(dim=-1)[:, 0]
    single = divergence(guess, columns) < tau
    lines = []
    for mass, sums in ((vertical, columns), (slash, diagonals)):
        budget = (tokens_needed(mass, gamma) // unit + 1).masked_fill(single, 0).clamp(min=least, max=count)
        sums[:, 0] = torch.inf  # the first key block, the main diagonal
        taken = torch.arange(count, device=mass.device) < budget[:, None]
        order = sums.argsort(dim=-1, descending=True, stable=True)
        lines.append(torch.zeros_like(taken).scatter_(-1, order, taken))
    causal = causal_blocks(length, block, block, query.device)
    number = torch.arange(count, device=query.device)
    kept = lines[0][:, None] | lines[1][:, (number[:, None] - number).clamp(min=0)]

    logits = (pooled(query, block) * scale @ pooled_key).masked_fill(~causal, -torch.inf)
    share, order = logits.softmax(dim=-1).flatten(1).sort(dim=-1, descending=True, stable=True)
    covered = share.cumsum(dim=-1) <= gamma * count
    blocks = torch.zeros_like(covered).scatter_(-1, order, covered & single[:, None])
    return (kept | blocks.view_as(kept)) & causal


class FlexPrefill(BlockPattern, method="flexprefill", paper="2502.20766"):
    """Sparse prefill that gives each head its own pattern and as many blocks as its mass needs (arXiv 2502.20766).

    The attention of the last block of queries is looked at. Where the pooled keys foretell its mass per block (root of
    the Jensen-Shannon divergence below ``tau``), the head takes the heaviest blocks of the pooled attention map up to a
    share ``gamma`` of all of it. Otherwise it takes as many vertical and slash lines of blocks as there are tokens
    needed for ``gamma`` of the mass. The first keys and the main diagonal are always in.

    The authors count a line of blocks for every 128 tokens whatever the block size; here one for every ``block``
    tokens, the same at their size. Their causal mask, kept from the first call, is made anew. A mass of exactly zero
    does not make a head's divergence undefined. There is no upper budget.
    """

    kind: ClassVar[str] = "estimated"
    complexity: ClassVar[str] = "O(L b d + L^2 d / b^2)"
    fidelity: ClassVar[str] = "authors' vectors"

    gamma: float = Field(0.9, gt=0, le=1, description="share of the attention mass that is to be covered")
    tau: float = Field(0.1, ge=0, le=1, description="divergence below which a head takes single blocks, not lines")
    min_budget: int = Field(512, ge=1, description="tokens of vertical and of slash lines that each head has at least")
    block: int = Field(128, ge=1, description="tokens of a block of queries or keys")

    def is_dense(self, length: int, layer: int, depth: int) -> bool:
        return self.gamma == 1 or num_blocks(length, self.block) <= max(2, num_blocks(self.min_budget, self.block))

    def pattern(self, inputs: PrefillInputs) -> SparsePattern:
        least = num_blocks(self.min_budget, self.block)
        blocks = active_blocks(
            inputs.query, inputs.key, inputs.scale, self.block, self.gamma, self.tau, least, unit=self.block
        )
        return SparsePattern(blocks[None], None, self.block, self.block)


def _block_sums(mass: Tensor, block: int) -> Tensor:
    """``[heads, n]`` sums of ``mass [heads, L]`` over blocks."""
    heads, length = mass.shape
    count = num_blocks(length, block)
    return torch.nn.functional.pad(mass, (0, count * block - length)).view(heads, count, block).sum(dim=-1)
