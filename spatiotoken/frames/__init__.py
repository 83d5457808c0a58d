"""Methods of the `frames` stage, one file each."""

from spatiotoken.frames.base import FrameSelector

__all__ = ["FrameSelector"]
