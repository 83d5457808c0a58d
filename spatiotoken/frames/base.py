"""The contract of the ``frames`` stage: which frames are seen at all."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from spatiotoken.registry import Method
from spatiotoken.structures import FrameChoice, Frames


class FrameSelector(Method):
    """Chooses frames, while a file is decoded or before the vision tower of a patched model."""

    stage: ClassVar[str] = "frames"

    @abstractmethod
    def select(self, frames: Frames) -> FrameChoice:
        """The frames that are kept, of the ``frames.num_frames`` candidates."""
