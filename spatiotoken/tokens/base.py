"""The contract of the ``tokens`` stage: prune or merge projected visual tokens before the language model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from spatiotoken.registry import Method
from spatiotoken.structures import ReducedTokens, VideoFeatures

Attention = Literal["auto", "cls", "head", "received"]
"""Whose attention in the vision tower makes a token salient: the CLS token's, the pooling head's, that of all tokens
(the mean that a token receives), or the first of these three that the tower has."""

Positions = Literal["keep", "compact", "ppe"]
"""Position ids of the tokens that are left: their own; numbered anew without gaps, as many authors do (models with 1-D
positions); or those of several members of each merged token, each on its share of the rotary channels (Positional
Preservation Embedding, arXiv 2510.22936; models with M-RoPE)."""


class TokenReducer(Method):
    """Reduces the tokens of one video at a time, independent of what else is in the batch.

    The class variables are what the catalogue of methods tells.
    """

    stage: ClassVar[str] = "tokens"
    kind: ClassVar[str]
    """"temporal redundancy", "segmentation and merging", "importance and diversity" or "baseline"."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Optional fields of ``VideoFeatures`` that ``reduce`` reads."""
    merges: ClassVar[bool] = False
    """Survivors absorb other tokens, instead of these being dropped."""
    complexity: ClassVar[str]
    """Arithmetic in ``T`` frames, ``N`` tokens per frame and ``D`` channels."""
    fidelity: ClassVar[str]
    """What the results were compared with."""

    positions: Positions = Field("keep", description="what becomes of the position ids of the tokens that are left")

    @abstractmethod
    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        """The survivors; all of them, unchanged, where the method's budget is everything."""

    def reduce_views(self, views: Sequence[VideoFeatures]) -> list[ReducedTokens]:
        """The survivors of each view of one picture: as a whole, then tile by tile at a higher resolution.

        Overridden by methods whose budget is shared between the views.
        """
        return [self.reduce(view) for view in views]

    def saliency_layers(self, depth: int) -> tuple[int, ...]:
        """Layers of the tower, of the ``depth`` up to the one that the projector reads, whose attention is wanted."""
        return (depth - 1,)


class SaliencyReducer(TokenReducer):
    """A method that ranks tokens by the attention that they receive in the vision tower."""

    needs: ClassVar[frozenset[str]] = frozenset({"saliency"})

    attention: Attention = Field("auto", description="whose attention in the vision tower makes a token salient")
