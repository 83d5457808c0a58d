"""Methods of the `tokens` stage, one file each, and what several of them share."""

from spatiotoken.tokens.base import SaliencyReducer, TokenReducer

__all__ = ["SaliencyReducer", "TokenReducer"]
