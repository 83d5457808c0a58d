"""Blocks of earlier keys that are reordered to gather what the last queries see (arXiv 2510.21270)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import pad

from spatiotoken.attention.base import Part, PrefillInputs, SparsePrefill
from spatiotoken.attention.blocks import by_mass, num_blocks, per_head, pooled
from spatiotoken.attention.kernels import SparsePattern
from spatiotoken.attention.weights import row_weights


def key_order(query: Tensor, key: Tensor, scale: float, segment: int) -> Tensor:
    """``[kv_heads, n]`` int64 places of ``key`` by falling mean weight within each segment; ties go to the earlier.

    Args:
        query: ``[heads, r, d]``, whose weights are meaned over the rows and over the heads on one key head.
        key: ``[kv_heads, n, d]``, whole segments, all of which every query sees.
    """
    visible = torch.ones(1, query.shape[1], key.shape[1], dtype=torch.bool, device=key.device)
    weights = row_weights(query[None], key[None], visible, scale)[0].mean(dim=1)
    mean = weights.unflatten(0, (key.shape[0], -1)).mean(dim=1).unflatten(1, (-1, segment))
    order = mean.argsort(dim=-1, descending=True, stable=True)
    start = torch.arange(mean.shape[1], device=key.device) * segment
    return (order + start[:, None]).flatten(1)


def earlier_blocks(query: Tensor, key: Tensor, scale: float, block: int, segment: int, threshold: float) -> Tensor:
    """Bool ``[heads, nq, nk]``: of the key blocks in segments before the queries' own, the fewest that reach
    ``threshold`` of the softmax over their mean-pooled scores.

    A last block of queries that is short is meaned as if filled with zeros, as the authors do.

    Args:
        query: ``[heads, L, d]``.
        key: ``[kv_heads, n, d]`` in their new order, whole segments.
    """
    rows = pooled(pad(query, (0, 0, 0, -query.shape[1] % block)), block)
    score = rows @ per_head(pooled(key, block), len(query) // len(key)).transpose(1, 2) * scale
    count = torch.arange(max(score.shape[1:]), device=query.device) * block // segment
    earlier = count[: score.shape[2]] < count[: score.shape[1], None]
    # Queries of the first segment have nothing before them: their rows are NaN until they are zeros.
    mass = score.masked_fill(~earlier, -torch.inf).softmax(dim=-1).masked_fill(~earlier, 0)
    return by_mass(mass, threshold)


class PBSAttn(SparsePrefill, method="pbs_attn", paper="2510.21270"):
    """Block-sparse prefill over keys permuted within segments, so heavy keys share blocks (arXiv 2510.21270).

    Within each whole segment of ``segment`` tokens, keys and values are put in the order of the mean weight that the
    last ``block`` queries give them. A query sees its own segment densely; of the earlier ones, each block of queries
    takes the fewest blocks of reordered keys whose share of the softmax over mean-pooled scores reaches ``threshold``,
    and the block that the first token has come to lie in.

    As in the authors' code, the weights behind the order are a softmax over whole segments only and without causality:
    where the prompt is a multiple of ``segment``, the last queries also weigh later ones of their own segment. This
    moves the order a little and lets nothing be seen too early. Theirs was compared with as many key heads as heads;
    heads that share a key head also share the order here, by the mean over them, so that keys are not multiplied.
    """

    kind: ClassVar[str] = "estimated"
    complexity: ClassVar[str] = "O(L b d + L^2 d / b^2)"
    fidelity: ClassVar[str] = "authors' vectors"

    threshold: float = Field(0.9, gt=0, le=1, description="share of the pooled softmax that the earlier blocks keep")
    segment: int = Field(256, ge=1, description="tokens within which keys are reordered, a multiple of the block")
    block: int = Field(128, ge=1, description="tokens of a block of queries or keys")

    @model_validator(mode="after")
    def _whole_blocks(self) -> PBSAttn:
        if self.segment % self.block:
            raise ValueError(f"segment must be a multiple of block, got {self.segment} and {self.block}")
        return self

    def is_dense(self, length: int, layer: int, depth: int) -> bool:
        return self.threshold == 1 or length <= self.segment

    def parts(self, inputs: PrefillInputs) -> Sequence[Part]:
        query, key, value, length = inputs.query, inputs.key, inputs.value, inputs.length
        whole = length // self.segment * self.segment
        front = (length - 1) // self.segment * self.segment
        order = key_order(query[:, -self.block :], key[:, :whole], inputs.scale, self.segment)[:, :front]
        # The earlier segments in their new order, then all keys as they are, for each query's own segment.
        place = order[..., None].expand(-1, -1, key.shape[-1])
        earlier_key, earlier_value = (states.gather(1, place) for states in (key, value))
        chosen = earlier_blocks(query, earlier_key, inputs.scale, self.block, self.segment, self.threshold)
        with_first = per_head((order == 0).unflatten(1, (-1, self.block)).any(dim=-1), inputs.groups)
        number = torch.arange(num_blocks(length, self.block), device=query.device) * self.block // self.segment
        chosen |= with_first[:, None] & (number > 0)[:, None]
        own = (number == number[:, None]).expand(len(query), -1, -1)
        blocks = pad(torch.cat([chosen, own], dim=-1), (0, 0, front // self.block, 0))
        pattern = SparsePattern(blocks[None], None, self.block, self.block)
        return [Part(query, torch.cat([earlier_key, key], dim=1), torch.cat([earlier_value, value], dim=1), pattern)]
