"""Stripes whose logits come near the largest of the sink and the local blocks (arXiv 2505.23520)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.attention.base import Part, PrefillInputs, SparsePrefill
from spatiotoken.attention.blocks import as_columns, num_blocks, pooled
from spatiotoken.attention.kernels import SparsePattern


def anchors(query: Tensor, key: Tensor, scale: float, start: int, step: int, block: int) -> Tensor:
    """``[heads, step]`` float32 mean over each block of queries of the largest logit that each query has among block 0,
    block ``start - 1`` and the blocks from ``start`` to its own.

    Args:
        query: ``[heads, L, d]``.
        key: ``[kv_heads, L, d]``, ``heads`` a multiple of ``kv_heads``.
        start: first block of the group of ``step``, at least 1.
    """
    future = torch.ones(block, block, dtype=torch.bool, device=query.device).triu(1)
    means = []
    for low in range(start * block, (start + step) * block, block):
        near = torch.cat([key[:, :block], key[:, (start - 1) * block : low + block]], dim=1).float()
        # Heads on one key head are more rows of one product.
        rows = (query[:, low : low + block].float() * scale).reshape(key.shape[0], -1, query.shape[2])
        logits = (rows @ near.transpose(1, 2)).view(query.shape[0], block, -1)
        logits[..., -block:].masked_fill_(future, -torch.inf)
        means.append(logits.amax(dim=-1).mean(dim=-1))
    return torch.stack(means, dim=1)


def stripes(query: Tensor, key: Tensor, scale: float, theta: float, start: int, step: int, block: int) -> Tensor:
    """``[heads, start * block]`` bool: the keys between block 0 and block ``start - 1`` whose logit with the mean query
    of some block of the group comes within ``theta`` (in powers of two of the weight) of that block's anchor.

    Arguments as of `anchors`.
    """
    selected = torch.zeros(query.shape[0], start * block, dtype=torch.bool, device=query.device)
    middle = slice(block, max(block, (start - 1) * block))
    means = pooled(query[:, start * block : (start + step) * block], block) * scale
    logits = means.reshape(key.shape[0], -1, query.shape[2]) @ key[:, middle].float().transpose(1, 2)
    least = anchors(query, key, scale, start, step, block) - theta * math.log(2)
    selected[:, middle] = (logits.view(*means.shape[:2], -1) >= least[..., None]).any(dim=1)
    return selected


class AnchorAttention(SparsePrefill, method="anchorattention", paper="2505.23520"):
    """Sparse prefill over stripes that come near the largest logit of sink and local blocks (arXiv 2505.23520).

    Queries go in groups of ``step`` blocks. A group attends to block 0, to the block before it and to its own blocks;
    the largest logits there are its anchor. Of the keys in between it attends to those, as single columns, whose logit
    with the mean query of one of its blocks is less than ``theta`` below the anchor. The anchor of a block is the mean
    over its queries. Queries after the last whole group attend to everything, as those of the first do.

    ``theta`` is in powers of two, since the authors' kernels scale logits by log2 e: 12 is 8.3 in natural logits. How
    many columns there are is asked of the device once for all groups, one wait more. Built on the authors' description
    and on reading their kernels, which need a GPU, without vectors. Their adapter loses the output of prompts that are
    a multiple of the group; ours has all queries of any prompt. They estimate in half precision, we in float32, and
    their later code counts the sink and the local part in whole groups, which we do not.
    """

    kind: ClassVar[str] = "estimated"
    complexity: ClassVar[str] = "O(L^2 d / b + L d b step)"
    fidelity: ClassVar[str] = "paper only"

    theta: float = Field(12.0, ge=0, le=1e6, description="how far below the anchor a logit may be, in powers of two")
    step: int = Field(16, ge=1, description="blocks of queries that share their stripes")
    block: int = Field(128, ge=1, description="tokens of a block of queries or keys")

    def is_dense(self, length: int, layer: int, depth: int) -> bool:
        return length < 2 * self.step * self.block

    def parts(self, inputs: PrefillInputs) -> Sequence[Part]:
        length, size = inputs.length, self.step * self.block
        starts = range(self.step, length // size * self.step, self.step)
        states = inputs.query, inputs.key, inputs.scale
        picked = [stripes(*states, self.theta, start, self.step, self.block) for start in starts]
        widths = torch.stack([x.sum(dim=-1).max() for x in picked]).tolist() if picked else []
        whole = length // size * size
        found = [self._part(inputs, low, high) for low, high in ((0, min(size, whole)), (whole, length)) if low < high]
        for start, selected, width in zip(starts, picked, widths, strict=True):
            columns = as_columns(selected, width)[None] if width else None
            found.append(self._part(inputs, start * self.block, start * self.block + size, columns, start - 1))
        return found

    def _part(self, inputs: PrefillInputs, low: int, high: int, columns: Tensor | None = None, local: int = 0) -> Part:
        """Queries ``low`` to ``high`` over block 0, the blocks from ``local`` on and ``columns``."""
        query, key, value = inputs.query[:, low:high], inputs.key[:, :high], inputs.value[:, :high]
        count, groups = num_blocks(high, self.block), 1 if columns is None else query.shape[0]
        number = torch.arange(count, device=query.device)
        blocks = ((number == 0) | (number >= local)).expand(1, groups, count, count)
        pattern = SparsePattern(blocks, columns, self.block, self.block)
        return Part(query, key, value, pattern, torch.arange(low, high, device=query.device))
