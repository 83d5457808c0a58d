"""Key blocks found by a search that halves chunks of keys (arXiv 2406.09827)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.attention.base import BlockPattern, PrefillInputs
from spatiotoken.attention.blocks import causal_blocks, num_blocks
from spatiotoken.attention.kernels import SparsePattern

MAX_STATES = 2**24
"""Floats that are gathered or scored at once, where one block of queries has no more."""


def chunk_scores(query: Tensor, key: Tensor, low: Tensor, high: Tensor, block_k: int) -> Tensor:
    """``[heads, n, C]`` float32 largest logit (unscaled) of a block of queries with the middle key of each chunk.

    Args:
        query: ``[heads, n, block_q, d]`` float32.
        key: ``[kv_heads, L, d]``.
        low, high: ``[heads, n, C]`` first block of keys of each chunk and the one after its last; an empty chunk scores
            minus infinity.
    """
    heads = query.shape[0]
    head = torch.arange(heads, device=key.device) // (heads // key.shape[0])
    middle = ((low + high) * block_k // 2).clamp(max=key.shape[1] - 1)
    chosen = key[head[:, None, None], middle].float()
    scores = (query @ chosen.transpose(-1, -2)).amax(dim=2)
    return scores.masked_fill(low >= high, -torch.inf)


def search(query: Tensor, key: Tensor, first: int, stop: Tensor, rounds: int, keep: int, block_k: int) -> Tensor:
    """``[heads, n, keep]`` blocks of keys, -1 where there are fewer, of the ``keep`` that the search ends with.

    ``2 keep`` chunks of about the same size; the better half by `chunk_scores` is kept and split, ``rounds`` times.
    Ties go to the earlier chunk.

    Args:
        query, key: as of `chunk_scores`.
        first, stop: searched are the blocks of keys from ``first`` to before ``stop [n]``.
        rounds: enough for chunks of one block.
    """
    number = torch.arange(2 * keep + 1, device=key.device)
    edges = first + number * (stop - first).clamp(min=0)[:, None] // (2 * keep)
    low, high = (x.expand(query.shape[0], -1, -1) for x in (edges[:, :-1], edges[:, 1:]))
    for left in range(rounds, -1, -1):
        order = chunk_scores(query, key, low, high, block_k).argsort(dim=-1, descending=True, stable=True)
        best = order[..., :keep].sort(dim=-1).values
        low, high = low.gather(-1, best), high.gather(-1, best)
        if left:
            middle = (low + high + 1) // 2
            low, high = (torch.stack(x, dim=-1).flatten(-2) for x in ((low, middle), (middle, high)))
    return low.where(low < high, -1)


class HiP(BlockPattern, method="hip", paper="2406.09827"):
    """Sparse prefill over key blocks that a hierarchical search finds for each query block (arXiv 2406.09827).

    Keys that lie together tend to have like logits, so one key, the middle one, stands for a chunk: the keys before the
    window are cut into twice as many chunks as are to be kept, the half whose middle key has the largest logit with any
    query of the block is kept and split in two, until chunks are blocks of keys. The first ``sink`` keys and the
    ``window`` latest of each query are always there, rounded up to blocks.

    From the paper alone, since the licence of the code restricts its use. The search is per head. The authors' blocks
    of 2 keys are too small for our kernels; sink and window are those of the follow-up, InfiniteHiP (arXiv 2502.08910).
    Where there are no more than ``k`` keys between sink and window, all are taken.
    """

    kind: ClassVar[str] = "estimated"
    complexity: ClassVar[str] = "O(L d k / b log(L / k))"
    fidelity: ClassVar[str] = "paper only"

    k: int = Field(512, ge=1, description="keys per query beside sink and window, rounded up to blocks")
    sink: int = Field(256, ge=0, description="first keys that every query sees")
    window: int = Field(1024, ge=1, description="latest keys that each query sees, itself included")
    block_q: int = Field(64, ge=1, description="tokens of a block of queries, which share their keys")
    block_k: int = Field(16, ge=1, description="tokens of a block of keys, where the search ends")

    def is_dense(self, length: int, layer: int, depth: int) -> bool:
        return length <= max(self.window, self.sink + self.k)

    def pattern(self, inputs: PrefillInputs) -> SparsePattern:
        heads, length, dim = inputs.query.shape
        device, sink, keep = inputs.query.device, num_blocks(self.sink, self.block_k), num_blocks(self.k, self.block_k)
        rows, cols = num_blocks(length, self.block_q), num_blocks(length, self.block_k)
        # The first block of the window of each query block, by its first query.
        near = (torch.arange(rows, device=device) * self.block_q - self.window + 1).clamp(min=0) // self.block_k
        number = torch.arange(cols, device=device)
        always = (number < sink) | (number >= near[:, None])
        always &= causal_blocks(length, self.block_q, self.block_k, device)
        # One more column takes what is no block.
        blocks = torch.nn.functional.pad(always, (0, 1)).repeat(heads, 1, 1)
        most = max(0, (rows - 1) * self.block_q - self.window + 1) // self.block_k - sink
        rounds = max(0, num_blocks(most, 2 * keep) - 1).bit_length()
        # A short last block is filled with its last query, which changes no maximum.
        place = torch.arange(rows * self.block_q, device=device).clamp(max=length - 1).view(rows, self.block_q)
        largest = max(2 * keep * dim, 2 * keep * self.block_q, self.block_q * dim)
        together = max(1, MAX_STATES // (heads * largest))
        for first in range(0, rows if most > 0 else 0, together):
            now = slice(first, first + together)
            query = inputs.query[:, place[now]].float()
            found = search(query, inputs.key, sink, near[now], rounds, keep, self.block_k)
            blocks[:, now].scatter_(-1, found.where(found >= 0, cols), True)
        return SparsePattern(blocks[None, ..., :cols], None, self.block_q, self.block_k)
