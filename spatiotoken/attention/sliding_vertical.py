"""Sink, local window and the columns that matter to the last queries."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.attention.base import BlockPattern, PrefillInputs
from spatiotoken.attention.blocks import num_blocks, window_blocks
from spatiotoken.attention.kernels import SparsePattern
from spatiotoken.attention.weights import last_rows_weights


def heaviest_columns(mass: Tensor, sink: int, columns: int) -> Tensor:
    """``[heads, min(sink + columns, L)]`` rising keys: the first ``sink`` and those of the most mass ``[heads, L]``.

    Ties go to the earlier key.
    """
    score = mass.clone()
    score[:, :sink] = torch.inf
    return score.argsort(dim=-1, descending=True, stable=True)[:, : sink + columns].sort(dim=-1).values


class SlidingVertical(BlockPattern, method="sliding_vertical"):
    """Sparse prefill over attention sinks, a local window and the columns that the last queries weigh most.

    Per head, the ``columns`` keys with the largest softmax mass over the last ``last_queries`` queries are kept for
    all queries, beside the first ``sink`` keys and the ``window`` latest keys of each query, rounded up to blocks (the
    vertical part of MInference, arXiv 2407.02490, with a sliding window in place of its slashes).
    """

    kind: ClassVar[str] = "estimated"
    complexity: ClassVar[str] = "O(Ld)"
    fidelity: ClassVar[str] = "our own method"

    sink: int = Field(64, ge=1, description="first keys that every query sees")
    window: int = Field(1024, ge=1, description="latest keys that each query sees, itself included")
    columns: int = Field(1024, ge=0, description="further keys per head that every query sees")
    last_queries: int = Field(64, ge=1, description="queries whose attention ranks the columns")
    block: int = Field(64, ge=1, description="tokens of a block of queries or keys")

    def is_dense(self, length: int, layer: int, depth: int) -> bool:
        return length <= self.window or length <= self.sink + self.columns

    def pattern(self, inputs: PrefillInputs) -> SparsePattern:
        count = num_blocks(inputs.length, self.block)
        near = window_blocks(count, self.window, self.block, inputs.query.device)
        mass = last_rows_weights(inputs, self.last_queries).sum(dim=1)
        chosen = heaviest_columns(mass, self.sink, self.columns)
        return SparsePattern(near.expand(1, mass.shape[0], -1, -1), chosen[None], self.block, self.block)
