"""Blocks at distances that are powers of two, a local window and sinks (arXiv 2503.03588)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.attention.base import BlockPattern, PrefillInputs
from spatiotoken.attention.blocks import num_blocks
from spatiotoken.attention.kernels import SparsePattern


def power_blocks(count: int, window: int, sink: int, device: torch.device) -> Tensor:
    """``[count, count]`` True at the first ``sink`` blocks, the ``window`` latest, and those 1, 2, 4, 8 ... back."""
    number = torch.arange(count, device=device)
    back = number[:, None] - number
    power = (back > 0) & (back & (back - 1) == 0)
    return (back >= 0) & (power | (back < window) | (number < sink))


class PowerAttention(BlockPattern, method="powerattention", paper="2503.03588"):
    """Sparse prefill over blocks at distances of powers of two, so that reach doubles per layer (arXiv 2503.03588).

    A fixed pattern for all heads and layers: any block is reached from any later one within as many layers as the
    distance has binary digits, at a cost that grows with the logarithm of the length.

    From the paper alone. Its models are trained on with this pattern and may keep some layers dense; here it is put on
    a model as it is, in every layer. Lengths that fill no whole block are allowed.
    """

    kind: ClassVar[str] = "static"
    complexity: ClassVar[str] = "none"
    fidelity: ClassVar[str] = "paper only"

    window: int = Field(5, ge=1, description="latest blocks that each query sees, its own included")
    sink: int = Field(1, ge=0, description="first blocks that every query sees")
    block: int = Field(256, ge=1, description="tokens of a block of queries or keys")

    def is_dense(self, length: int, layer: int, depth: int) -> bool:
        # Three steps back is the first that is no power of two.
        return num_blocks(length, self.block) <= max(3, self.window) + self.sink

    def pattern(self, inputs: PrefillInputs) -> SparsePattern:
        blocks = power_blocks(num_blocks(inputs.length, self.block), self.window, self.sink, inputs.query.device)
        return SparsePattern(blocks[None, None], None, self.block, self.block)
