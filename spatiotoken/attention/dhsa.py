"""DHSA: chunks of similar keys, scored by query blocks; the best keys within a budget."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.attention.base import BlockPattern, PrefillInputs
from spatiotoken.attention.blocks import causal_blocks, diagonal_blocks, largest, num_blocks, pooled
from spatiotoken.attention.kernels import SparsePattern


def chunk_starts(key: Tensor, chunks: int, nms_window: int) -> Tensor:
    """``[min(chunks, L + 1)]`` rising int64 first tokens of the chunks of ``key [kv_heads, L, d]``, the first 0.

    A chunk starts where the cosine similarity of a key (all heads as one vector) to the one before is lower than
    anywhere within ``nms_window`` tokens; the ``chunks - 1`` deepest such drops count, ties go to the first. Where
    there are fewer, the rest are ``L``: empty chunks.
    """
    length = key.shape[1]
    unit = torch.nn.functional.normalize(key.float().transpose(0, 1).flatten(1), dim=-1)
    drop = torch.nn.functional.pad(1 - (unit[1:] * unit[:-1]).sum(dim=-1), (1, 0), value=-torch.inf)
    near = torch.nn.functional.pad(drop, (nms_window, nms_window), value=-torch.inf).unfold(0, 2 * nms_window + 1, 1)
    peak = (drop > near[:, :nms_window].amax(dim=1)) & (drop >= near[:, nms_window + 1 :].amax(dim=1))
    peak &= drop > 0
    depth = drop.where(peak, -torch.inf)
    order = depth.argsort(descending=True, stable=True)[: chunks - 1]
    starts = order.where(peak[order], length).sort().values
    return torch.nn.functional.pad(starts, (1, 0))


def chunk_states(key: Tensor, starts: Tensor) -> Tensor:
    """``[chunks, d]`` float32 mean over heads and tokens of each chunk of ``key``, times the root of its length."""
    # Differences of running sums: double precision, or long prompts would leave little of a short chunk.
    running = torch.nn.functional.pad(key.double().mean(dim=0).cumsum(dim=0), (0, 0, 1, 0))
    ends = torch.nn.functional.pad(starts[1:], (0, 1), value=key.shape[1])
    return ((running[ends] - running[starts]) / (ends - starts).clamp(min=1).sqrt()[:, None]).float()


def key_block_scores(query: Tensor, key: Tensor, starts: Tensor, block_q: int, block_k: int) -> Tensor:
    """``[nq, nk]`` float32: what a block of queries, in the mean over heads, gives the best chunk among keys."""
    length = key.shape[1]
    queries = pooled(query.float().mean(dim=0, keepdim=True), block_q)[0]
    score = queries @ chunk_states(key, starts).T
    chunk = torch.searchsorted(starts, torch.arange(length, device=key.device), right=True) - 1
    missing = num_blocks(length, block_k) * block_k - length
    tokens = torch.nn.functional.pad(score[:, chunk], (0, missing), value=-torch.inf)
    return tokens.view(len(score), -1, block_k).amax(dim=-1)


class Dhsa(BlockPattern, method="dhsa", paper="2510.24606"):
    """DHSA: the keys in the best chunks of similar keys, per query block within a budget (arXiv 2510.24606).

    The prompt is cut into at most ``chunk_beta`` chunks per query block. A chunk is the mean of its keys times the root
    of its length, a query block the mean of its queries, both over all heads. Their products are given to the tokens of
    the chunk, and each query block takes the best tokens, after the first and the latest ones, up to ``budget``. The
    last ``instruction_tokens`` queries see everything. One pattern for all heads of a layer.

    From the paper and the code (xiongsiheng/DHSA, the release of the first version): all of the above, and the
    defaults. Ours: chunks start where consecutive keys differ most, since the authors' trained predictor of boundaries
    is for two text models; non-maximum suppression by local maxima, not greedy; whole blocks of ``block_k`` keys, each
    at the score of its best token, in place of single tokens; the diagonal blocks are always seen; and the first tokens
    count in the budget, where the authors' write them over other picks, which can see a key twice.
    """

    kind: ClassVar[str] = "estimated"
    complexity: ClassVar[str] = "O(L^2 d / b^2)"
    fidelity: ClassVar[str] = "paper only"

    budget: int = Field(2048, ge=1, description="keys that each block of queries sees, the first and latest included")
    chunk_beta: int = Field(8, ge=1, description="chunks per block of queries, at most")
    nms_window: int = Field(8, ge=1, description="tokens to either side in which there is one start of a chunk")
    global_tokens: int = Field(128, ge=0, description="first keys that every query sees")
    local_tokens: int = Field(128, ge=0, description="latest keys that a block of queries sees, its own included")
    instruction_tokens: int = Field(64, ge=0, description="last queries of the prompt, which see every key")
    block_q: int = Field(64, ge=1, description="tokens of a block of queries")
    block_k: int = Field(16, ge=1, description="tokens of a block of keys, the unit of what is seen")

    def is_dense(self, length: int, layer: int, depth: int) -> bool:
        return length <= max(self.budget, self.instruction_tokens)

    def pattern(self, inputs: PrefillInputs) -> SparsePattern:
        length, device = inputs.length, inputs.query.device
        starts = chunk_starts(inputs.key, length // self.block_q * self.chunk_beta + 1, self.nms_window)
        score = key_block_scores(inputs.query, inputs.key, starts, self.block_q, self.block_k)
        causal = causal_blocks(length, self.block_q, self.block_k, device)
        end = ((torch.arange(len(score), device=device) + 1) * self.block_q).clamp(max=length)[:, None]
        first = torch.arange(score.shape[1], device=device) * self.block_k
        always = (first < self.global_tokens) | (first + self.block_k > end - self.local_tokens)
        always = (always & causal) | diagonal_blocks(length, self.block_q, self.block_k, device)
        score = score.masked_fill(~causal, -torch.inf).masked_fill(always, torch.inf)
        chosen = (largest(score, num_blocks(self.budget, self.block_k)) & causal) | always
        chosen |= causal & (end > length - self.instruction_tokens)
        return SparsePattern(chosen[None, None], None, self.block_q, self.block_k)
