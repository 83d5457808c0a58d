"""Methods of the `frames` stage, one file each."""

from spatiotoken.frames.base import FrameSelector, ScoredSelector
from spatiotoken.frames.scorer import Scorer

__all__ = ["FrameSelector", "ScoredSelector", "Scorer"]
