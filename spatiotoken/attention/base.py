"""The contract of the ``attention`` stage: compute prefill attention sparsely."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.attention.kernels import SparsePattern, block_sparse_attention
from spatiotoken.attention.kernels.engine import best_backend, predicted_time
from spatiotoken.attention.kernels.pattern import computed_pairs
from spatiotoken.registry import Method
from spatiotoken.structures import Asked

WORTH_IT = 0.95
"""Share of the dense time up to which sparse attention is run: a smaller gain would be lost in the estimate."""


@dataclass(frozen=True, eq=False)
class PrefillInputs(Asked):
    """What one decoder layer attends with: all of one prompt, without padding.

    Attributes:
        query: ``[heads, L, d]``, rotary embedding included.
        key, value: ``[kv_heads, L, d]``, ``heads`` a multiple of ``kv_heads``.
        scale: factor of the logits.
        layer: index of the decoder layer, of ``depth``.
        coordinates: ``[L, 4]`` int64 of each visual token the grid that it belongs to, and its frame, row and column
            there; negative at text and at newlines. There only if the method asks (``SparsePrefill.needs``).
    """

    noun: ClassVar[str] = "inputs"

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    layer: int = 0
    depth: int = 1
    coordinates: Tensor | None = None

    @property
    def length(self) -> int:
        return self.query.shape[1]

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.query.shape[0] // self.key.shape[0]


@dataclass(frozen=True, eq=False)
class Part:
    """Some of the queries, and what they attend to; every query is in exactly one part.

    Attributes:
        query: ``[heads, q, d]``.
        key, value: ``[kv_heads, k, d]``, ``k >= q``; the queries are aligned to the last keys. Not the prompt's own
            keys only: they may be reordered, pooled, or stand there twice, as long as ``pattern`` picks each pair once.
        pattern: of one row (``B = 1``).
        rows: ``[q]`` or ``[heads, q]`` int64 places of these queries in the prompt; None where they are all of it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    pattern: SparsePattern
    rows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Attended:
    """What became of one prompt at one layer.

    Attributes:
        output: ``[heads, L, d]``, often laid out token by token; None where the model's own attention is to run.
        density: computed (query, key) pairs by causal ones, the mean over heads.
        backend: which kernel ran, "dense" for the model's own attention.
    """

    output: Tensor | None
    density: float
    backend: str


class SparsePrefill(Method):
    """Replaces causal attention where a whole prompt is prefilled at once; decoding stays with the model's own."""

    stage: ClassVar[str] = "attention"
    needs: ClassVar[frozenset[str]] = frozenset()
    """Optional fields of ``PrefillInputs`` that the method reads."""
    kind: ClassVar[str]
    """How it knows what to compute: "static", "estimated" or "approximate"."""
    complexity: ClassVar[str]
    """Arithmetic of the estimate: ``L`` tokens, ``d`` channels, ``b`` tokens a block."""
    fidelity: ClassVar[str]
    """As of ``TokenReducer``."""

    backend: Literal["auto", "reference", "gather", "flex", "triton", "flashinfer", "flex_flash"] = Field(
        "auto", description="kernel; auto also goes dense where less than 5 % would be gained"
    )

    def is_dense(self, length: int, layer: int, depth: int) -> bool:
        """True where it is known without a look that everything would be computed."""
        return False

    @abstractmethod
    def parts(self, inputs: PrefillInputs) -> Sequence[Part]:
        """What is computed. Queries that are in no part come out as zeros."""

    def attend(self, inputs: PrefillInputs) -> Attended:
        """Attention over ``parts``, or none at all where dense attention would be as quick."""
        if self.is_dense(inputs.length, inputs.layer, inputs.depth):
            return _DENSE
        parts = self.parts(inputs)
        heads, length = inputs.query.shape[:2]
        causal = heads * length * (length + 1) // 2
        # The one wait for the device.
        counted: list[int] = torch.stack([_pairs(part) for part in parts]).tolist()
        density = sum(counted) / causal
        if density >= 1:
            return _DENSE
        backend = best_backend(parts[0].query) if self.backend == "auto" else self.backend
        shared = all(part.pattern.blocks.shape[1] * inputs.groups <= heads for part in parts)
        if self.backend == "auto" and predicted_time(backend, density, shared) > WORTH_IT:
            return _DENSE
        output: Tensor | None = None
        for part in parts:
            attended = block_sparse_attention(
                part.query[None], part.key[None], part.value[None], part.pattern, scale=inputs.scale, backend=backend
            )[0, ..., : inputs.query.shape[-1]]
            if part.rows is None:
                return Attended(attended, density, backend)
            if output is None:  # token by token in memory, as models go on with it
                output = inputs.query.new_zeros(length, heads, inputs.query.shape[-1]).transpose(0, 1)
            if part.rows.ndim == 1:
                output.index_copy_(1, part.rows, attended)
            else:
                output.scatter_(1, part.rows[..., None].expand_as(attended), attended)
        return Attended(output, density, backend)


class BlockPattern(SparsePrefill):
    """Sparse prefill whose pattern lies on the prompt as it is."""

    @abstractmethod
    def pattern(self, inputs: PrefillInputs) -> SparsePattern:
        """Of one row (``B = 1``), in groups of 1, kv_heads or heads; the diagonal blocks must be in it."""

    def parts(self, inputs: PrefillInputs) -> Sequence[Part]:
        return [Part(inputs.query, inputs.key, inputs.value, self.pattern(inputs))]


_DENSE = Attended(None, 1.0, "dense")


def _pairs(part: Part) -> Tensor:
    """Computed pairs over all heads, each group counted for its heads."""
    pairs = computed_pairs(part.pattern, part.query.shape[1], part.key.shape[1])
    return pairs * (part.query.shape[0] // part.pattern.blocks.shape[1])
