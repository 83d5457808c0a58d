"""Attention among the tokens that the last queries see, another subset for each head (arXiv 2602.03216)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import avg_pool1d

from spatiotoken.attention.base import Part, PrefillInputs, SparsePrefill
from spatiotoken.attention.blocks import num_blocks, per_head
from spatiotoken.attention.kernels import SparsePattern
from spatiotoken.attention.weights import last_rows_weights

BLOCK = 128
"""Tokens of a block for the kernels; all causal pairs of what is kept are computed, so it changes no result."""


def relevance(inputs: PrefillInputs, window: int, kernel: int) -> Tensor:
    """``[heads, L - window]`` float32 mean weight that the last ``window`` queries give each token before them.

    Smoothed over ``kernel`` neighbours, an odd number; beyond the ends there are zeros. ``L`` must exceed ``window``.
    """
    weights = last_rows_weights(inputs, window)[..., : inputs.length - window]
    return avg_pool1d(weights.mean(dim=1), kernel, stride=1, padding=kernel // 2)


def dropped_count(relevance: Tensor, coverage: float) -> Tensor:
    """Int64 scalar: how many tokens each head drops of ``relevance [heads, n]``.

    0 where the mean over heads of the least token alone reaches ``coverage`` of the whole; else one more than the
    number of least tokens that together stay below it.
    """
    mean = relevance.mean(dim=0)
    share = (mean / (mean.sum() + 1e-8)).sort().values
    below = (share.cumsum(dim=0) < coverage).sum()
    return below + (below > 0)


def kept_tokens(relevance: Tensor, keep: int, window: int) -> Tensor:
    """``[heads, keep + window]`` int64 rising: the ``keep`` most relevant of ``[heads, n]`` and the ``window`` tokens
    after those; ties go to the earlier."""
    heads, prefix = relevance.shape
    best = relevance.argsort(dim=-1, descending=True, stable=True)[:, :keep]
    last = torch.arange(prefix, prefix + window, device=relevance.device)
    return torch.cat([best.sort(dim=-1).values, last.expand(heads, -1)], dim=-1)


class TokenSparse(SparsePrefill, method="token_sparse", paper="2602.03216"):
    """Attention among each head's own most relevant tokens only, in the deeper layers (arXiv 2602.03216).

    The mean weight that the last ``window`` queries give the tokens before them, smoothed over ``kernel`` neighbours,
    says how many tokens are dropped (those whose share, averaged over heads, adds up to ``coverage``) and, head by
    head, which. The rest attend to each other causally. A head gives zeros at tokens that it drops: the residual
    stream carries them, and another head or layer may keep them. How many are kept is one wait for the device.

    As in the authors' code, one token more is dropped than stays below ``coverage``. Their list of layers, profiled
    model by model, is a share of the depth here: the upper half, as they take it for models that they have not
    profiled. Weights and shares are float32 also for models in half precision, where theirs are rounded.
    """

    kind: ClassVar[str] = "approximate"
    complexity: ClassVar[str] = "O(L d)"
    fidelity: ClassVar[str] = "authors' vectors"

    coverage: float = Field(0.005, ge=0, le=1, description="share of the relevance that may be dropped")
    min_tokens: int = Field(1024, ge=0, description="tokens before the window that each head keeps at least")
    window: int = Field(128, ge=1, description="last tokens, which all heads keep and whose queries rank the others")
    kernel: int = Field(7, ge=1, description="neighbours over which the relevance is smoothed, an odd number")
    start: float = Field(0.5, ge=0, le=1, description="share of the depth below which layers stay dense")

    @field_validator("kernel")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"kernel must be odd, got {value}")
        return value

    def is_dense(self, length: int, layer: int, depth: int) -> bool:
        return self.coverage == 0 or layer < int(self.start * depth) or length <= self.min_tokens + self.window

    def parts(self, inputs: PrefillInputs) -> Sequence[Part]:
        score = relevance(inputs, self.window, self.kernel)
        keep = max(self.min_tokens, score.shape[1] - int(dropped_count(score, self.coverage)))
        rows = kept_tokens(score, keep, self.window)
        query, key, value = (
            per_head(states, len(rows) // len(states)).gather(1, rows[..., None].expand(-1, -1, states.shape[-1]))
            for states in (inputs.query, inputs.key, inputs.value)
        )
        count = num_blocks(rows.shape[1], BLOCK)
        blocks = torch.ones(1, 1, count, count, dtype=torch.bool, device=rows.device)
        return [Part(query, key, value, SparsePattern(blocks, None, BLOCK, BLOCK), rows)]
