"""Methods of the `tokens` stage, one file each."""

from spatiotoken.tokens.base import TokenReducer

__all__ = ["TokenReducer"]
