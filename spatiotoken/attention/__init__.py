"""Methods of the `attention` stage, one file each."""

from spatiotoken.attention.base import SparsePrefill

__all__ = ["SparsePrefill"]
