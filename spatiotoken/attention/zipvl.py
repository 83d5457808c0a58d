"""Important tokens, as many as a layer's attention asks for, seen by all queries (arXiv 2410.08584)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.attention.base import BlockPattern, PrefillInputs
from spatiotoken.attention.blocks import as_columns, by_mass, diagonal_blocks
from spatiotoken.attention.kernels import SparsePattern
from spatiotoken.attention.weights import last_rows_weights, sampled_mass, spread_rows


def probe_mass(inputs: PrefillInputs, recent: int, spread: int) -> tuple[Tensor, Tensor]:
    """``[L]`` float32 weight that each key gets from the probes over all heads, and ``[L]`` probes that see it.

    Args:
        recent: how many of the last queries are probes.
        spread: how many of those before, at equal distances.
    """
    length = inputs.length
    recent = min(recent, length)
    before = length - recent
    spread = min(spread, before)
    mass = sampled_mass(inputs, spread, before) + last_rows_weights(inputs, recent).sum(dim=1)
    position = torch.arange(length, device=mass.device)
    probes = torch.cat([spread_rows(spread, before, mass.device), position[before:]])
    return mass.sum(dim=0), (probes[:, None] >= position).sum(dim=0)


def important_tokens(mass: Tensor, probes: Tensor, tau: float) -> Tensor:
    """``[L]`` bool: of the highest ``mass / probes`` as many as reach ``tau`` of all ``mass`` when taken by ``mass``.

    Early keys are seen by more probes, so the sum decides how many tokens matter and the mean which. Ties go to the
    earlier token.
    """
    order = (mass / probes).argsort(descending=True, stable=True)
    taken = torch.arange(len(mass), device=mass.device) < by_mass(mass, tau).sum()
    return torch.zeros_like(taken).scatter_(0, order, taken)


class ZipVL(BlockPattern, method="zipvl", paper="2410.08584"):
    """Sparse prefill over a layer's important tokens, their number set by its attention (arXiv 2410.08584).

    The weights that a few probe queries give all keys, summed over the heads, say how many tokens are needed to hold
    ``tau`` of them; so many, of the highest mean weight, are columns for every query and head of the layer, beside
    each query's own block. Their number is asked of the device, which is one wait more.

    From the paper alone, since there is no public code. The paper's probes are the latest queries and random ones; ours
    lie at equal distances, so that runs can be repeated. There only the important tokens attend at all, and the others
    leave the cache; here every query attends to the important tokens and to its own block, and the cache is whole.
    Dropping tokens for good is the work of the ``layers`` stage.
    """

    kind: ClassVar[str] = "estimated"
    complexity: ClassVar[str] = "O(Ld)"
    fidelity: ClassVar[str] = "paper only"

    tau: float = Field(0.975, gt=0, le=1, description="share of the probes' weights that decides how many tokens stay")
    recent: int = Field(64, ge=1, description="last queries that are probes")
    spread: int = Field(64, ge=0, description="further probes, at equal distances before those")
    block: int = Field(64, ge=1, description="tokens of a block of queries or keys")

    def is_dense(self, length: int, layer: int, depth: int) -> bool:
        return self.tau == 1 or length <= self.block

    def pattern(self, inputs: PrefillInputs) -> SparsePattern:
        own = diagonal_blocks(inputs.length, self.block, self.block, inputs.query.device)
        important = important_tokens(*probe_mass(inputs, self.recent, self.spread), self.tau)
        columns = as_columns(important[None], int(important.sum()))
        return SparsePattern(own[None, None], columns[None], self.block, self.block)
