"""What a video-QA dataset is to the evaluation: questions about videos, how they are asked, and how answers count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedConfig

from spatiotoken.registry import Registry

Json = Any
"""What ``json.dumps`` takes and ``json.loads`` gives back unchanged: no tuples, no NaN."""


@dataclass(frozen=True)
class Question:
    """One question about one video.

    Attributes:
        id: unique in its dataset, and the same on every machine.
        video: file, or directory of numbered frames; what is generated has the name of what it is generated from.
        prompt: what is said after the video.
        answer: what ``score`` compares with, in the dataset's own form.
        options: texts of a multiple-choice question's options, in the order of their letters.
        groups: categories by kind, such as ``{"duration": "short", "domain": "Sports"}``: accuracy is told of each.
        span: the part of the video that is asked about, in seconds.
        fps: frames per second of a directory of frames.
        extra: what else of the dataset's row its prompt or its score need.
    """

    id: str
    video: Path
    prompt: str
    answer: Json
    options: tuple[str, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict)
    span: tuple[float, float] | None = None
    fps: float | None = None
    extra: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Clip:
    """The frames that a question is asked about.

    Attributes:
        frames: uint8 ``[T, 3, H, W]``.
        seconds: of each frame, since the video's beginning (not the span's).
        indices: of each frame in the video.
        duration: of the whole video, in seconds.
    """

    frames: Tensor
    seconds: tuple[float, ...]
    indices: tuple[int, ...]
    duration: float

    def metadata(self) -> dict[str, Any]:
        """As processors take it; see ``answer.video_metadata``."""
        return {
            "fps": 1000.0,
            "frames_indices": [round(1000 * second) for second in self.seconds],
            "total_num_frames": max(1, round(1000 * self.duration)),
        }


class VideoQA(BaseModel, ABC):
    """Base of every dataset. Its fields are its options; a subclass with ``dataset=``, its name, registers itself::

        class NextQA(VideoQA, dataset="nextqa"): ...

    Attributes:
        hub: id on the Hugging Face hub, where ``annotations`` says nothing else.
        metrics: by name what ``score`` gives, the one that stands for the dataset first. Each is a mean over questions.
        macro: kind of group over whose means the headline is averaged; None for the mean over questions.
        max_new_tokens: length of an answer at most.
        makes_clips: videos are made up by ``clip``, and there are no files.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    hub: ClassVar[str | None] = None
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    macro: ClassVar[str | None] = None
    max_new_tokens: ClassVar[int] = 16
    makes_clips: ClassVar[bool] = False

    annotations: Path | None = Field(None, description="file or directory of annotations; by default the hub's")
    video_dir: Path | None = Field(None, description="directory of the videos")

    def __init_subclass__(cls, dataset: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

    @classmethod
    def __pydantic_init_subclass__(cls, dataset: str | None = None, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if dataset is not None:
            cls.name = dataset
            DATASETS.register(dataset, cls)

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().split("\n", 1)[0]

    @abstractmethod
    def questions(self) -> Iterable[Question]:
        """All questions in the order of the annotations.

        Raises:
            DatasetError: the annotations are not there, or not what the dataset's authors publish.
        """

    def check(self, config: PreTrainedConfig) -> None:
        """
        Raises:
            ValueError: the questions are not for models of that configuration.
        """

    def clip(self, question: Question, num_frames: int) -> Clip:
        """The frames of a question whose video is made up."""
        raise NotImplementedError(f"{self.name} has files")

    def prompt(self, question: Question, clip: Clip) -> str:
        """What is said after the video; for datasets whose prompt depends on the frames, such as subtitles."""
        return question.prompt

    def limits(self, tokenizer: Any, questions: Sequence[Question], prompt_tokens: int) -> dict[str, Any]:
        """Arguments of ``generate`` for a batch; ``prompt_tokens`` is its length before the answers."""
        return {"max_new_tokens": self.max_new_tokens}

    @abstractmethod
    def parse(self, text: str, question: Question) -> Json | None:
        """What a model's words say in the form of ``Question.answer``; None where they say nothing that counts."""

    @abstractmethod
    def score(self, parsed: Json | None, question: Question) -> dict[str, float]:
        """Each of ``metrics``; an answer that could not be parsed is a wrong one."""


class DatasetError(ValueError):
    """Annotations that cannot be read; the message says what was looked for, and where."""


DATASETS: Registry[type[VideoQA]] = Registry(
    "dataset", ("spatiotoken.evaluation.datasets",), "spatiotoken.evaluation_datasets"
)
