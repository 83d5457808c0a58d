"""Blocks by their pooled attention, where queries and keys are like their neighbours (arXiv 2502.18137)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.attention.base import BlockPattern, PrefillInputs
from spatiotoken.attention.blocks import causal_blocks, diagonal_blocks, per_head, pooled
from spatiotoken.attention.kernels import SparsePattern


def self_similarity(states: Tensor, block: int) -> Tensor:
    """``[heads, n]`` float32 mean cosine over all pairs in each block of ``states [heads, L, d]``."""
    directions = torch.nn.functional.normalize(states.float(), dim=-1)
    # The mean over pairs is the squared length of the mean direction.
    return pooled(directions, block).square().sum(dim=-1)


def similar_blocks(
    query: Tensor,
    key: Tensor,
    scale: float,
    block_q: int,
    block_k: int,
    similarity: float,
    rule: Literal["top", "cdf"],
    share: float,
) -> Tensor:
    """``[heads, nq, nk]`` bool: the blocks of most pooled attention and all that involve a block unlike itself.

    Args:
        query: ``[heads, L, d]``.
        key: ``[kv_heads, L, d]``, ``heads`` a multiple of ``kv_heads``.
        scale: factor of the logits.
        similarity: blocks whose self-similarity is not above it are computed in full and not ranked.
        rule: "top" keeps ``share`` of all key blocks, rounded down, for each block of queries, those after it counted;
            "cdf" the heaviest whose pooled attention together does not exceed ``share``. Either keeps at least one.
    """
    groups = query.shape[0] // key.shape[0]
    causal = causal_blocks(query.shape[1], block_q, block_k, query.device)
    mixed_query = self_similarity(query, block_q) <= similarity
    mixed_key = per_head(self_similarity(key, block_k) <= similarity, groups)
    logits = pooled(query, block_q) * scale @ per_head(pooled(key, block_k), groups).transpose(1, 2)
    weights = logits.masked_fill(mixed_key[:, None] | ~causal, -torch.inf).softmax(dim=-1)
    # Of a row of mixed blocks alone everything is computed anyway.
    ranked, order = weights.nan_to_num(0).sort(dim=-1, descending=True, stable=True)
    if rule == "cdf":
        taken = ranked.cumsum(dim=-1) <= share
    else:
        count = ranked.shape[-1]
        taken = (torch.arange(count, device=ranked.device) < int(share * count)).expand_as(ranked).clone()
    taken[..., 0] = True
    kept = torch.zeros_like(taken).scatter_(-1, order, taken)
    return (kept | mixed_query[:, :, None] | mixed_key[:, None]) & causal


class SpargeAttn(BlockPattern, method="spargeattn", paper="2502.18137"):
    """Sparse prefill over the blocks that attention between pooled blocks ranks first (arXiv 2502.18137).

    A block's mean stands for it only where its tokens are alike, so rows and columns of blocks whose mean cosine is not
    above ``similarity`` are computed in full. Of the others each block of queries keeps the first ones, by ``rule``.

    The defaults are those that the authors recommend for use without calibration; the paper's own are searched for each
    layer (rule "cdf", for which the code proposes share 0.98 and similarity 0.6). A share of 0.5 of all key blocks is
    about three quarters of the causal work. Unlike the authors' code this computes the diagonal blocks always, takes
    the likeness of a last short block over what there is (theirs computes that block in full), and has float32 scores.
    Of the paper, the int8 products and the skipping of small values in the kernel are not here.
    """

    kind: ClassVar[str] = "estimated"
    complexity: ClassVar[str] = "O(Ld + L^2 d / b^2)"
    fidelity: ClassVar[str] = "authors' vectors, in part"

    rule: Literal["top", "cdf"] = Field("top", description="keep a number of key blocks, or a mass of pooled attention")
    share: float = Field(0.5, gt=0, le=1, description="of all key blocks or of the mass that each query block keeps")
    similarity: float = Field(-0.1, ge=-1, le=1, description="mean cosine up to which a block is computed in full")
    smooth_keys: bool = Field(True, description="take the mean key off before the likeness of keys is measured")
    block_q: int = Field(128, ge=1, description="tokens of a block of queries")
    block_k: int = Field(64, ge=1, description="tokens of a block of keys")

    def is_dense(self, length: int, layer: int, depth: int) -> bool:
        return self.share == 1 or self.similarity == 1 or length <= self.block_k

    def pattern(self, inputs: PrefillInputs) -> SparsePattern:
        key = inputs.key.float()
        if self.smooth_keys:
            key = key - key.mean(dim=1, keepdim=True)
        blocks = similar_blocks(
            inputs.query, key, inputs.scale, self.block_q, self.block_k, self.similarity, self.rule, self.share
        )
        diagonal = diagonal_blocks(inputs.length, self.block_q, self.block_k, key.device)
        return SparsePattern((blocks | diagonal)[None], None, self.block_q, self.block_k)
