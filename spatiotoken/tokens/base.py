"""The contract of the ``tokens`` stage: prune or merge projected visual tokens before the language model."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from spatiotoken.registry import Method
from spatiotoken.structures import ReducedTokens, VideoFeatures


class TokenReducer(Method):
    """Reduces the tokens of one video at a time, independent of what else is in the batch."""

    stage: ClassVar[str] = "tokens"

    @abstractmethod
    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        """The survivors; all of them, unchanged, where the method's budget is everything."""
