"""The contract of the ``attention`` stage: compute prefill attention sparsely."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from spatiotoken.registry import Method


class SparsePrefill(Method):
    """Replaces causal attention over many queries; decoding stays with the model's own attention."""

    stage: ClassVar[str] = "attention"

    @abstractmethod
    def is_dense(self, num_queries: int, num_keys: int) -> bool:
        """True where the method would compute everything anyway, so the model's own attention runs instead."""

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, key_valid: Tensor | None, scale: float) -> Tensor:
        """Causal attention with the queries aligned to the last keys.

        Args:
            query: ``[B, heads, queries, d]``.
            key, value: ``[B, kv_heads, keys, d]``, ``keys >= queries``, ``heads`` a multiple of ``kv_heads``.
            key_valid: ``[B, keys]`` bool, False at padding; None where there is none.
            scale: factor of the logits.

        Returns:
            ``[B, heads, queries, d]``; rows of padding queries are finite and mean nothing.
        """
