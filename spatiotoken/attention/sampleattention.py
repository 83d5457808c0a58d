"""Local window and the columns that hold most of the mass of evenly sampled queries (arXiv 2406.15486)."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field

from spatiotoken.attention.base import BlockPattern, PrefillInputs
from spatiotoken.attention.blocks import as_columns, by_mass, num_blocks, window_blocks
from spatiotoken.attention.kernels import SparsePattern
from spatiotoken.attention.weights import sampled_mass


class SampleAttention(BlockPattern, method="sampleattention", paper="2406.15486"):
    """Sparse prefill over a local window and the columns that sampled queries give most weight (arXiv 2406.15486).

    Per head, ``rows`` of the queries attend to everything; the fewest keys that together hold ``alpha`` of their
    weights are columns for all queries, beside the first ``sink`` keys and a window of a fixed share of the prompt,
    rounded up to blocks. Each head has as many columns as it needs; asking the device for the largest number is one
    wait more.

    From the paper alone, since there is no public code. The weights inside the window count for the columns too. The
    queries are sampled at equal distances, the last one included. The paper has no sink of its own (the columns find
    it); ours makes it certain.
    """

    kind: ClassVar[str] = "estimated"
    complexity: ClassVar[str] = "O(L^2 d rows)"
    fidelity: ClassVar[str] = "paper only"

    alpha: float = Field(0.95, gt=0, le=1, description="share of the sampled weights that the columns hold")
    rows: float = Field(0.05, gt=0, le=1, description="share of the queries that is sampled")
    window: float = Field(0.08, gt=0, le=1, description="share of the prompt that is each query's local window")
    sink: int = Field(4, ge=0, description="first keys that every query sees")
    block: int = Field(64, ge=1, description="tokens of a block of queries or keys")

    def is_dense(self, length: int, layer: int, depth: int) -> bool:
        return self.alpha == 1 or self.window == 1 or length <= max(self.block, self.sink)

    def pattern(self, inputs: PrefillInputs) -> SparsePattern:
        length, heads = inputs.length, inputs.query.shape[0]
        window = math.ceil(self.window * length)
        near = window_blocks(num_blocks(length, self.block), window, self.block, inputs.query.device)
        selected = by_mass(sampled_mass(inputs, math.ceil(self.rows * length), length), self.alpha)
        selected[:, : self.sink] = True
        columns = as_columns(selected, int(selected.sum(dim=-1).max()))
        return SparsePattern(near.expand(1, heads, -1, -1), columns[None], self.block, self.block)
