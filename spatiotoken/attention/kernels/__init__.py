"""Block-sparse causal attention: one pattern, several backends."""

from spatiotoken.attention.kernels.engine import BACKENDS, block_sparse_attention, choose, unavailable
from spatiotoken.attention.kernels.pattern import SparsePattern, Valid, density
from spatiotoken.attention.kernels.reference import reference_attention

__all__ = [
    "BACKENDS",
    "SparsePattern",
    "Valid",
    "block_sparse_attention",
    "choose",
    "density",
    "reference_attention",
    "unavailable",
]
