"""A sparse pattern per head: vertical and slash lines, sink and window, or blocks; kinds and sizes found offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field, field_validator

from spatiotoken.attention.base import BlockPattern, PrefillInputs
from spatiotoken.attention.head_patterns import KINDS, Head, head_pattern, parse_head
from spatiotoken.attention.kernels import SparsePattern


class MInference(BlockPattern, method="minference", paper="2407.02490"):
    """Sparse prefill with a pattern per head: vertical-slash, A-shape or block-sparse (arXiv 2407.02490).

    ``vertical_slash:v:s``: of the softmax mass of the last queries, the ``v`` keys with the most (the first ``sink``
    before all others) are seen by all queries, and the ``s`` distances with the most (the nearest ``local`` first) at
    all queries, rounded up to the blocks that they cross. ``a_shape:sink:window``: the first keys and the latest ones.
    ``block_sparse:n``: per block of queries the ``n`` blocks of keys with the largest product of the means. Which head
    has which is searched offline (``spatiotoken calibrate``, ``attention.head_search``); without ``heads`` all are
    vertical-slash, as in the authors' code for models that they did not search.

    Of the authors' constants 64 rows, 30 keys, 100 distances and blocks of 64 are fields. Theirs takes 50 of the 100
    forced distances where ``s`` is smaller (which ones torch leaves open), ours all; slashes lie on the grid of key
    blocks here, where theirs start at any key; block-sparse rows always have their own block here, and a short last
    block is the mean of what there is. Tri-shape is left out.

    Raises:
        ValueError: ``heads`` has another number of layers or heads than the model.
    """

    kind: ClassVar[str] = "estimated"
    complexity: ClassVar[str] = "O(Ld)"
    fidelity: ClassVar[str] = "authors' vectors, in part"
    kinds: ClassVar[Mapping[str, tuple[str, ...]]] = KINDS

    heads: tuple[tuple[str, ...], ...] = Field(
        (), description="per layer, per query head its pattern, as vertical_slash:1000:6096; empty: all vertical-slash"
    )
    vertical: int = Field(1000, ge=1, description="columns of each head where heads is empty")
    slash: int = Field(6096, ge=1, description="diagonals of each head where heads is empty")
    sink: int = Field(30, ge=1, description="first keys that are columns of every vertical-slash head")
    local: int = Field(100, ge=1, description="nearest distances that are diagonals of every vertical-slash head")
    last_queries: int = Field(64, ge=1, description="queries whose attention ranks columns and diagonals")
    block: int = Field(64, ge=1, description="tokens of a block of queries or keys")

    @field_validator("heads")
    @classmethod
    def _known(cls, heads: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        for text in {text for layer in heads for text in layer}:
            parse_head(text, cls.kinds)
        return heads

    def layer_heads(self, layer: int, depth: int) -> list[Head]:
        """What ``heads`` says of one layer; the one pattern of all where it is empty."""
        if not self.heads:
            return [("vertical_slash", (self.vertical, self.slash))]
        if len(self.heads) != depth:
            raise ValueError(f"heads describes {len(self.heads)} layers, the model has {depth}")
        return [parse_head(text, self.kinds) for text in self.heads[layer]]

    def head_list(self, inputs: PrefillInputs) -> list[Head]:
        """One per query head of the model."""
        heads, count = self.layer_heads(inputs.layer, inputs.depth), inputs.query.shape[0]
        if self.heads and len(heads) != count:
            raise ValueError(f"heads describes {len(heads)} heads at layer {inputs.layer}, the model has {count}")
        return heads if self.heads else heads * count

    def pattern_of(self, inputs: PrefillInputs, heads: Sequence[Head]) -> SparsePattern:
        sizes = {name: getattr(self, name) for name in ("sink", "local", "last_queries", "block")}
        return head_pattern(inputs, heads, **sizes)

    def is_dense(self, length: int, layer: int, depth: int) -> bool:
        return all(
            max(sizes) * (self.block if kind == "block_sparse" else 1) >= length
            for kind, sizes in self.layer_heads(layer, depth)
        )

    def pattern(self, inputs: PrefillInputs) -> SparsePattern:
        return self.pattern_of(inputs, self.head_list(inputs))
