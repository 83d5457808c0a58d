"""Blocks of keys pooled the more the less they matter, in place of leaving them out (arXiv 2512.04025)."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from spatiotoken.attention.base import Part, PrefillInputs, SparsePrefill
from spatiotoken.attention.blocks import num_blocks, per_head, pooled
from spatiotoken.attention.kernels import SparsePattern
from spatiotoken.attention.xattention import antidiagonal_mass


def block_levels(mass: Tensor, levels: Sequence[int], shares: Sequence[float], by: str, text: Tensor) -> Tensor:
    """``[heads, n, n]`` int64 tokens that are pooled into one in each block, 0 where it is left out.

    Ties go to the first block. Block 0, the diagonal and the rows and columns of ``text`` are 1.

    Args:
        mass: ``[heads, n, n]``, zeros after the diagonal.
        levels, shares: rising; blocks that come before ``shares[i]`` of their row get ``levels[i]``, the first that
            fits, those after all of them 0.
        by: what a share is of: "rank" (of the causal blocks, heaviest first, rounded down), or "mass" (cumulated from
            the heaviest on; a block belongs where its end lies).
        text: bool ``[n]``.
    """
    count = mass.shape[-1]
    number = torch.arange(count, device=mass.device)
    bounds = torch.tensor(shares, dtype=torch.float32, device=mass.device)
    ranked, order = mass.sort(dim=-1, descending=True, stable=True)
    if by == "rank":
        edges = ((number + 1)[:, None] * bounds).long()
        step = torch.searchsorted(edges, number.expand(count, -1).contiguous(), right=True).expand_as(order)
    else:
        step = torch.bucketize(ranked.cumsum(dim=-1) / mass.sum(dim=-1, keepdim=True).clamp(min=1e-10), bounds)
    level = torch.zeros_like(order).scatter_(-1, order, torch.tensor([*levels, 0], device=mass.device)[step])
    full = text | text[:, None] | (number == 0) | (number == number[:, None])
    return level.masked_fill(full, 1).tril()


def largest_levels(key: Tensor, block: int, levels: Sequence[int], similarity: Sequence[float]) -> Tensor:
    """``[kv_heads, n]`` int64 the largest of ``levels`` whose groups have first and last keys alike, 1 where none has.

    Args:
        key: ``[kv_heads, n * block, d]``.
        similarity: what the mean cosine over a block's groups must exceed, for each level.
    """
    blocks = key.float().unflatten(1, (-1, block))
    best = torch.ones(blocks.shape[:2], dtype=torch.int64, device=key.device)
    for level, least in zip(levels, similarity, strict=True):
        alike = cosine_similarity(blocks[:, :, ::level], blocks[:, :, level - 1 :: level], dim=-1).mean(dim=-1)
        best = best.masked_fill(alike > least, level)
    return best


def text_blocks(coordinates: Tensor, block: int) -> Tensor:
    """Bool ``[n]``: the blocks with a token that is neither of a grid nor between two tokens of one (a newline)."""
    grid, length = coordinates[:, 0], len(coordinates)
    place = torch.arange(length, device=grid.device)
    before = place.where(grid >= 0, -1).cummax(dim=0).values
    after = place.where(grid >= 0, length).flip(0).cummin(dim=0).values.flip(0)
    same = grid[before.clamp(min=0)] == grid[after.clamp(max=length - 1)]
    text = (before < 0) | (after == length) | ~same
    return pad(text, (0, -length % block)).view(-1, block).any(dim=-1)


class PSA(SparsePrefill, method="psa", paper="2512.04025"):
    """Sparse prefill that pools lighter blocks of keys and values more coarsely (arXiv 2512.04025).

    Each block of queries ranks its key blocks by the antidiagonals of a strided map (XAttention). The heaviest are
    computed as they are, the following ones as means of 2, 4 and 8 keys and values with the log of that number added to
    the logits, the rest not at all; blocks whose keys differ within a group are pooled less. Block 0, the diagonal and
    the rows and columns of blocks with text are computed as they are.

    The authors take the last 512 tokens for text, here coordinates tell: it is what is neither of a picture nor
    between two tokens of one, so newlines and time stamps count as pictures. Pool sizes are any that divide one
    another, not 1, 2, 4 and 8 alone. The authors' vectors are of the levels; what is done with them follows their
    kernel. It needs a channel more than the model's heads have, in multiples of 8.
    """

    kind: ClassVar[str] = "approximate"
    complexity: ClassVar[str] = "O(L^2 d / stride)"
    fidelity: ClassVar[str] = "authors' vectors, in part"
    needs: ClassVar[frozenset[str]] = frozenset({"coordinates"})

    levels: tuple[int, ...] = Field((1, 2, 4, 8), min_length=1, description="tokens pooled into one, each times more")
    shares: tuple[float, ...] = Field((0.05, 0.15, 0.25, 0.5), description="share of a row that ends each level")
    by: Literal["rank", "mass"] = Field("rank", description="shares of the causal blocks, or of their mass")
    similarity: tuple[float, ...] = Field((0.75, 0.7, 0.7), description="least cosine within groups, from level 2 on")
    stride: int = Field(16, ge=1, description="tokens of a group that is scored as one")
    block: int = Field(128, ge=1, description="tokens of a block, a multiple of the stride and of the last level")

    @model_validator(mode="after")
    def _fits(self) -> PSA:
        steps = zip(self.levels, [*self.levels[1:], self.block], strict=True)
        if self.levels[0] != 1 or list(self.levels) != sorted(set(self.levels)) or any(b % a for a, b in steps):
            raise ValueError(
                f"levels must rise from 1 to a divisor of block, each dividing the next, got {self.levels}"
            )
        if len(self.shares) != len(self.levels) or len(self.similarity) != len(self.levels) - 1:
            raise ValueError("there must be a share for each level and a similarity for each but the first")
        if list(self.shares) != sorted(self.shares) or not 0 <= self.shares[0] <= self.shares[-1] <= 1:
            raise ValueError(f"shares must rise from 0 to 1, got {self.shares}")
        if not all(-1 <= least <= 1 for least in self.similarity):
            raise ValueError(f"similarities are cosines, got {self.similarity}")
        if self.block % self.stride:
            raise ValueError(f"block must be a multiple of stride, got {self.block} and {self.stride}")
        return self

    def is_dense(self, length: int, layer: int, depth: int) -> bool:
        return self.shares[0] == 1 or length <= 2 * self.block

    def parts(self, inputs: PrefillInputs) -> Sequence[Part]:
        query, key, value, length = inputs.query, inputs.key, inputs.value, inputs.length
        mass = antidiagonal_mass(query, key, inputs.scale, self.stride, self.block)
        text = text_blocks(inputs.needed("coordinates"), self.block)
        level = block_levels(mass, self.levels, self.shares, self.by, text)
        # All blocks but the last can be pooled: they are whole, and stand before some block of queries.
        count, dim, finest = mass.shape[-1], key.shape[-1], self.levels[-1]
        whole = (count - 1) * self.block
        most = pad(largest_levels(key[:, :whole], self.block, self.levels[1:], self.similarity), (0, 1), value=1)
        level = level.minimum(per_head(most, inputs.groups)[:, None])

        # Pooled keys in front, coarsest first, then all as they are, in blocks as large as a pooled block of the
        # coarsest. The log of the pool size is the product of one more channel.
        unit, keys, values, chosen = self.block // finest, [], [], []
        for size in reversed(self.levels):
            stop = length if size == 1 else whole
            keys.append(pad(pooled(key[:, :stop], size), (0, 1), value=log(size) / inputs.scale))
            values.append(pooled(value[:, :stop], size))
            picked = (level[..., : num_blocks(stop, self.block)] == size).repeat_interleave(finest // size, dim=-1)
            chosen.append(picked[..., : num_blocks(stop // size, unit)])
        # Channels in multiples of 8; keys that nothing sees, where else the queries would begin inside a block.
        fill, front = -(dim + 1) % 8, sum(states.shape[1] for states in values) - length
        gap = -front % self.block
        blocks = pad(torch.cat(chosen, dim=-1), (gap // unit, 0, (gap + front) // self.block, 0))
        return [
            Part(
                pad(pad(query, (0, 1), value=1.0), (0, fill)),
                pad(torch.cat(keys, dim=1), (0, fill, gap, 0)).to(key.dtype),
                pad(torch.cat(values, dim=1), (0, fill + 1, gap, 0)).to(value.dtype),
                SparsePattern(blocks[None], None, self.block, unit),
            )
        ]
