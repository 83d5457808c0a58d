"""The contract of the ``frames`` stage: which frames are seen at all."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from spatiotoken.frames.scorer import Scorer
from spatiotoken.registry import Method
from spatiotoken.structures import FrameChoice, Frames


class FrameSelector(Method):
    """Chooses frames, while a file is decoded or before the vision tower of a patched model.

    Inside a patched model a "frame" is what the vision tower makes one token grid of: two video frames in the Qwen-VL
    families, one in the LLaVA families. The class variables are what the catalogue of methods tells.
    """

    stage: ClassVar[str] = "frames"
    kind: ClassVar[str]
    """"equal distances", "question-agnostic", "question-aware" or "several sizes"."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Optional fields of ``Frames`` that ``select`` reads."""
    complexity: ClassVar[str]
    """Arithmetic in ``T`` candidates, ``K`` chosen ones and ``F`` features, without the scorer's."""
    fidelity: ClassVar[str]
    """What the results were compared with."""

    num_frames: int = Field(32, ge=1, description="how many frames are kept at most")
    positions: Literal["keep", "compact"] = Field(
        "keep", description="position ids of what is left, inside a model: kept, or as if there were no other frames"
    )

    @property
    def selects_while_decoding(self) -> bool:
        """Whether it can be used on files; frames of several sizes are made inside the model only."""
        return self.kind != "several sizes"

    @abstractmethod
    def select(self, frames: Frames) -> FrameChoice:
        """The frames that are kept: ``num_frames`` at most, and all if there are no more than that."""


class ScoredSelector(FrameSelector):
    """A selector that looks at the frames, through a scorer.

    Raises:
        ValueError: the scorer cannot tell what the method needs.
    """

    scorer: Scorer = Field(Scorer(), description="by what frames are described, and compared with the question")

    @property
    def selects_while_decoding(self) -> bool:
        """Not where the model's own tower describes the frames."""
        return super().selects_while_decoding and self.scorer.kind != "tower"

    @field_validator("scorer", mode="before")
    @classmethod
    def _completed(cls, value: Any) -> Any:
        """Without a kind it is the method's own."""
        if isinstance(value, Mapping) and "kind" not in value:
            return cls.model_fields["scorer"].get_default().model_dump() | value
        return value

    @model_validator(mode="after")
    def _scorer_reads(self) -> ScoredSelector:
        if self.needs & {"relevance", "score"} and not self.scorer.reads_text:
            raise ValueError(
                f"frames.scorer: {self.name} compares frames with the question, which {self.scorer.kind!r} cannot; "
                "supported: clip, siglip2, tower"
            )
        return self
