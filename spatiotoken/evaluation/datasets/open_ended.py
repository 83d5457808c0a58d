"""Datasets that are answered in few words, ActivityNet-QA, MSVD-QA and MSRVTT-QA, and how such answers count."""

from __future__ import annotations

import importlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator

from spatiotoken.evaluation.annotations import Row, find_video, load_rows
from spatiotoken.evaluation.base import DatasetError, Json, Question, VideoQA
from spatiotoken.evaluation.metrics import contained_match, exact_match, normalised_match

_ID = "question_id"
_OF_ANSWERS = frozenset({"answer", "type"})
_ACTIVITYNET_TYPES = (
    "motion",
    "spatial relationship",
    "temporal relationship",
    "yes/no",
    "colour",
    "object",
    "location",
    "number",
    "other",
)

Judge = Callable[[str, str, str], float]
"""Takes question, reference answer and prediction; says how right the prediction is."""


def load_judge(name: str) -> Judge:
    """The callable that ``package.module:function`` names.

    Raises:
        ValueError: it names none.
    """
    module, _, function = name.partition(":")
    try:
        judge = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"no judge at {name!r} ({error}); expected package.module:function") from error
    if not callable(judge):
        raise ValueError(f"{name!r} cannot be called; expected a function of question, answer and prediction")
    return judge


class OpenEnded(VideoQA):
    """Base of the datasets whose answers are words. ``Question.answer`` lists the reference answers, the best counts;
    ``Question.extra["question"]`` is what a judge is told was asked.

    Attributes:
        judge: where there is one, ``score`` has a further metric ``judge``. Empty predictions are not shown to it: 0.
    """

    metrics: ClassVar[tuple[str, ...]] = ("normalised_match", "exact_match", "contained_match")

    judge: str | None = Field(None, description="package.module:function of (question, answer, prediction) -> float")

    @field_validator("judge")
    @classmethod
    def _names_a_function(cls, name: str | None) -> str | None:
        if name is not None:
            load_judge(name)
        return name

    def parse(self, text: str, question: Question) -> Json | None:
        return text.strip() or None

    def score(self, parsed: Json | None, question: Question) -> dict[str, float]:
        """
        Raises:
            ValueError: the judge's verdict is no finite number.
        """
        said = parsed or ""
        scores = {
            "normalised_match": float(normalised_match(said, question.answer)),
            "exact_match": float(exact_match(said, question.answer)),
            "contained_match": float(contained_match(said, question.answer)),
        }
        if self.judge is not None:
            scores["judge"] = self._judged(self.judge, said, question) if said else 0.0
        return scores

    @staticmethod
    def _judged(name: str, said: str, question: Question) -> float:
        judge = load_judge(name)
        verdicts = [float(judge(question.extra["question"], answer, said)) for answer in question.answer]
        if not all(map(math.isfinite, verdicts)):
            raise ValueError(f"judge {name!r} said {verdicts} of question {question.id}; expected finite numbers")
        return max(verdicts)


def one_word_prompt(sentence: str) -> str:
    """As lmms-eval's ``activitynetqa`` asks."""
    return f"{sentence} Answer the question using a single word or phrase."


def published_rows(annotations: Path | None, hub: str | None, needs: Sequence[str]) -> list[Row]:
    """Rows with those columns, of a table or of a directory of ``test_q.json`` and ``test_a.json``, which are joined.

    Raises:
        DatasetError: as ``load_rows``; or a question has no answer.
    """
    if annotations is None or not annotations.is_dir():
        return load_rows(annotations, hub, needs=needs)
    asked = load_rows(annotations / "test_q.json", None, needs=[name for name in needs if name not in _OF_ANSWERS])
    told = load_rows(annotations / "test_a.json", None, needs=[name for name in needs if name in _OF_ANSWERS | {_ID}])
    answers = {row[_ID]: row for row in told}
    lacking = [row[_ID] for row in asked if row[_ID] not in answers]
    if lacking:
        raise DatasetError(
            f"{annotations / 'test_a.json'} has no answer to {len(lacking)} questions, such as {lacking[0]}"
        )
    return [{**answers[row[_ID]], **row} for row in asked]


class ActivityNetQA(OpenEnded, dataset="activitynet_qa"):
    """ActivityNet-QA: 8,000 test questions about 800 videos of human activities.

    From the hub, or ``annotations`` is the directory of the authors' ``test_q.json`` and ``test_a.json`` (repository
    ``MILVLG/activitynet-qa``; for non-commercial use, see there). Videos are ``v_<video_name>.mp4``. Groups: ``type``,
    in the authors' words.

    The prompt is that of lmms-eval 0.7.2's ``activitynetqa``. That is scored by a GPT model, as in most papers, whose
    figures cannot be compared with these unless ``judge`` asks the same one; the authors' own script is
    ``exact_match``.
    """

    hub: ClassVar[str | None] = "lmms-eval/ActivityNetQA"
    max_new_tokens: ClassVar[int] = 64

    def questions(self) -> Iterator[Question]:
        for row in published_rows(self.annotations, self.hub, ("video_name", "question", _ID, "answer", "type")):
            yield Question(
                id=str(row[_ID]),
                video=find_video(self.video_dir, f"v_{row['video_name']}"),
                prompt=one_word_prompt(f"{row['question'].capitalize()}?"),
                answer=[str(row["answer"])],
                groups={"type": activitynet_type(row["type"])},
                extra={"question": row["question"]},
            )


def activitynet_type(number: int | str) -> str:
    """What the authors call a type that they number.

    Raises:
        DatasetError: there is none of that number.
    """
    names = [str(at) for at in range(len(_ACTIVITYNET_TYPES))]
    if str(number) not in names:
        raise DatasetError(f"unknown ActivityNet-QA question type {number!r}; types are {', '.join(names)}")
    return _ACTIVITYNET_TYPES[int(number)]


class DescriptionQA(OpenEnded):
    """What MSVD-QA and MSRVTT-QA share: questions that one tool made of descriptions, and begin with a question word.

    ``annotations`` is the authors' ``test_qa.json``; or a directory of ``test_q.json`` and ``test_a.json``, in which
    videos have names, as evaluations of LLMs (Video-LLaVA's and others) read them. Groups: ``type``, the question word.
    """

    max_new_tokens: ClassVar[int] = 64

    def questions(self) -> Iterator[Question]:
        have_names = self.annotations is not None and self.annotations.is_dir()
        number, name = (_ID, "video_name") if have_names else ("id", "video_id")
        rows = published_rows(self.annotations, self.hub, (number, name, "question", "answer"))
        told = [row[name] for row in rows]
        for row, video in zip(rows, told if have_names else self._names(told), strict=True):
            asked = str(row["question"])
            yield Question(
                id=str(row[number]),
                video=find_video(self.video_dir, str(video)),
                prompt=one_word_prompt(f"{asked.rstrip(' ?').capitalize()}?"),
                answer=[str(row["answer"])],
                groups={"type": question_word(asked)},
                extra={"question": asked},
            )

    @abstractmethod
    def _names(self, numbers: Iterable[int]) -> list[str]:
        """Of the videos, without suffix, that ``test_qa.json`` numbers."""


def question_word(question: str) -> str:
    """The first word, if it is one that asks."""
    first = question.split(maxsplit=1)[0].lower() if question.strip() else ""
    return first if first in ("what", "who", "how", "when", "where") else "other"


class MSVDQA(DescriptionQA, dataset="msvd_qa"):
    """MSVD-QA: 13,157 test questions about 520 short clips.

    Published at data.mendeley.com/datasets/h5j7cpwnvn (licence: see its page), not on the hub. The numbers of videos in
    ``test_qa.json`` become names by ``youtube_mapping.txt``, which must lie beside it. Videos are ``<name>.avi``.

    lmms-eval has no such task: the prompt is that of its ``activitynetqa`` (0.7.2). Papers on LLMs have GPT models for
    judges; the authors' metric is ``exact_match``.
    """

    def _names(self, numbers: Iterable[int]) -> list[str]:
        assert self.annotations is not None  # or there would be no numbers
        path = self.annotations.parent / "youtube_mapping.txt"
        if not path.is_file():
            raise DatasetError(f"no {path}, which tells the names of the videos that {self.annotations.name} numbers")
        lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
        names = {number: name for name, number in filter(None, lines)}
        numbered = [f"vid{number}" for number in numbers]
        unknown = next((number for number in numbered if number not in names), None)
        if unknown is not None:
            raise DatasetError(f"{path} has no {unknown}")
        return [names[number] for number in numbered]


class MSRVTTQA(DescriptionQA, dataset="msrvtt_qa"):
    """MSRVTT-QA: 72,821 test questions about 2,990 clips.

    Published at data.mendeley.com/datasets/bvxhs33bw6 (licence: see its page), not on the hub. Videos are
    ``video<number>.mp4``.

    lmms-eval has no such task: the prompt is that of its ``activitynetqa`` (0.7.2). Papers on LLMs have GPT models for
    judges; the authors' metric is ``exact_match``.
    """

    def _names(self, numbers: Iterable[int]) -> list[str]:
        return [f"video{number}" for number in numbers]
