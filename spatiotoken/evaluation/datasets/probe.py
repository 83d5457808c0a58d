"""The project's own made videos, as a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from transformers import PreTrainedConfig

from spatiotoken.evaluation.base import Clip, Json, Question, VideoQA
from spatiotoken.probe.dataset import examples
from spatiotoken.probe.evaluate import PROBE_MARK, among_options, instruction, parse_answer
from spatiotoken.probe.scenes import FPS


class Probe(VideoQA, dataset="probe"):
    """The probe's test split: made videos of coloured shapes, and what small models are asked of them.

    Nothing is downloaded. Models get the very inputs that the command ``spatiotoken probe`` gives them (24 questions at
    a time), and are restricted in the same way. Videos have ``num_frames`` frames, whatever a run asks for. Groups:
    ``family``. Accuracy is the mean over questions.

    Probe models get the bare question, and can answer nothing but one of its options. For all other models ``plain``
    must be set, by which the options are in the prompt and any answer is possible.
    """

    makes_clips: ClassVar[bool] = True

    size: int = Field(1176, ge=1, description="how many questions; the families take turns")
    num_frames: int = Field(16, ge=8, description="frames of each video")
    plain: bool = Field(False, description="the model was not trained on the probe")

    def questions(self) -> Iterator[Question]:
        for example in examples("test", self.size, num_frames=self.num_frames):
            yield Question(
                id=f"{example.sample:06d}",
                video=Path("probe", "test", f"{example.sample:06d}"),
                prompt=instruction(example) if self.plain else example.question,
                answer=example.answer,
                options=example.options,
                groups={"family": example.family},
                extra={"sample": example.sample},
            )

    def check(self, config: PreTrainedConfig) -> None:
        if hasattr(config, PROBE_MARK) == self.plain:
            kind = "a" if self.plain else "no"
            raise ValueError(f"this is {kind} probe model: --option probe.plain={str(not self.plain).lower()}")

    def clip(self, question: Question, num_frames: int) -> Clip:
        # With all families, the number of a question is that of its scene.
        (example,) = examples("test", 1, num_frames=self.num_frames, first=question.extra["sample"])
        shown = range(self.num_frames)
        return Clip(example.frames, tuple(at / FPS for at in shown), tuple(shown), self.num_frames / FPS)

    def limits(self, tokenizer: Any, questions: Sequence[Question], prompt_tokens: int) -> dict[str, Any]:
        if self.plain:
            return super().limits(tokenizer, questions, prompt_tokens)
        return among_options(tokenizer, [question.options for question in questions], prompt_tokens)

    def parse(self, text: str, question: Question) -> Json | None:
        return parse_answer(text, question.options)

    def score(self, parsed: Json | None, question: Question) -> dict[str, float]:
        return {"accuracy": float(parsed == question.answer)}
