"""Methods of the `attention` stage, one file each."""

from spatiotoken.attention.base import Attended, BlockPattern, Part, PrefillInputs, SparsePrefill
from spatiotoken.attention.kernels import SparsePattern

__all__ = ["Attended", "BlockPattern", "Part", "PrefillInputs", "SparsePattern", "SparsePrefill"]
