"""TempCompass: actions, their direction, speed and order, and changes, that no single frame tells."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from spatiotoken.evaluation.annotations import Row, find_video, load_rows
from spatiotoken.evaluation.base import DatasetError, Json, Question
from spatiotoken.evaluation.multiple_choice import LETTERS, MultipleChoice
from spatiotoken.evaluation.parsing import parse_option, parse_yes_no

TASKS = {
    "multi-choice": "\nPlease directly give the best option:",
    "yes_no": "\nPlease answer yes or no:",
    "caption_matching": "\nPlease directly give the best option:",
}
"""By name of each task what its prompt ends with."""
_OPTION = {
    "multi-choice": re.compile(r"([A-D])\. ?(.+)"),
    "caption_matching": re.compile(r"(?:Caption|Sentence|Option) ([AB12]): (.+)"),
}
# An answer that cites a caption, with a colon, may go on to say what is wrong with the other.
_NAMED = [re.compile(rf"\b(?:caption|sentence|option)\s*([AB12])\b{end}", re.IGNORECASE) for end in (":", "")]
_NUMBERED = re.compile(r"\W*([12])\W*(?:$|[.:)])")


def labelled_options(task: str, question: str) -> tuple[list[str], tuple[str, ...]]:
    """Labels (``A`` to ``D``, or ``1`` and ``2``) and texts of the options, which are a question's lines but the first.

    Raises:
        DatasetError: one of them has no label.
    """
    found = [(line, _OPTION[task].fullmatch(line.strip())) for line in question.split("\n")[1:]]
    unlabelled = [line for line, match in found if match is None]
    if unlabelled or not found:
        raise DatasetError(f"TempCompass {task}: no options in {question!r}")
    labels, texts = zip(*(match.groups() for _, match in found if match is not None), strict=True)
    return list(labels), texts


def chosen_caption(text: str, labels: Sequence[str], captions: Sequence[str]) -> str | None:
    """The letter of the caption that an answer names: by its label with the word before it (``Option 2``), by a bare
    number where captions are numbered, or in one of the ways in which options are chosen elsewhere."""
    for pattern in _NAMED:
        named = {label.upper() for label in pattern.findall(text)} & set(labels)
        if named:
            return LETTERS[labels.index(named.pop())] if len(named) == 1 else None
    numbered = _NUMBERED.match(text.strip())
    if numbered is not None and numbered[1] in labels:
        return LETTERS[labels.index(numbered[1])]
    return parse_option(text, captions)


class TempCompass(MultipleChoice, dataset="tempcompass"):
    """TempCompass (arXiv 2403.00476): 1,580 multiple-choice and 2,453 yes/no questions, 1,503 pairs of captions to
    choose from, about 410 videos; of its fourth task, captioning, see below.

    From the hub, or ``annotations`` is the directory of the authors' ``multi-choice.json``, ``yes_no.json`` and
    ``caption_matching.json`` (repository ``llyx97/TempCompass``, CC BY-NC 4.0). Videos are ``<video_id>.mp4``. Groups:
    ``task``, ``aspect`` (action, direction, speed, order, attribute_change), and both.

    Prompts are those of lmms-eval 0.7.2's ``tempcompass_multi_choice``, ``_yes_no`` and ``_caption_matching``, whose
    accuracies are those of the group ``task``; the headline is their mean, for which neither lmms-eval nor the authors
    have a number. Where no rule reads an answer, lmms-eval asks a GPT model, and the authors' scripts may count it as
    wrong (``--disable_llm``), as is done here. Captioning can only be scored by such a judge and is left out.
    """

    hub: ClassVar[str | None] = "lmms-eval/TempCompass"
    macro: ClassVar[str | None] = "task"
    max_new_tokens: ClassVar[int] = 128

    def questions(self) -> Iterator[Question]:
        for task in TASKS:
            asked: Counter[str] = Counter()
            for row in self._rows(task):
                place = f"{task}_{row['video_id']}_{row['dim']}"
                yield self._question(task, row, f"{place}_{asked[place]}")
                asked[place] += 1

    def _question(self, task: str, row: Row, name: str) -> Question:
        text, answer = row["question"], row["answer"].strip()
        labels: list[str] = []
        options: tuple[str, ...] = ()
        if task != "yes_no":
            labels, options = labelled_options(task, text)
            lines = [line.strip() for line in text.split("\n")[1:]]
            if answer not in lines:
                raise DatasetError(f"TempCompass {task}: answer {answer!r} is no option of {text!r}")
            answer = LETTERS[lines.index(answer)]
        aspect = row["dim"]
        return Question(
            id=name,
            video=find_video(self.video_dir, str(row["video_id"])),
            prompt=f"{text}{TASKS[task]}",
            answer=answer,
            options=options,
            groups={"task": task, "aspect": aspect, "task and aspect": f"{task}, {aspect}"},
            extra={"task": task, "labels": labels},
        )

    def _rows(self, task: str) -> list[Row]:
        if self.annotations is not None:
            return read_questions(self.annotations / f"{task}.json")
        return load_rows(None, self.hub, config=task, needs=("video_id", "question", "answer", "dim"))

    def parse(self, text: str, question: Question) -> Json | None:
        task = question.extra["task"]
        if task == "yes_no":
            return parse_yes_no(text)
        if task == "caption_matching":
            return chosen_caption(text, question.extra["labels"], question.options)
        return super().parse(text, question)


def read_questions(path: Path) -> list[Row]:
    """Rows of one of the authors' files, which list questions by video and aspect, like those of the hub's tables.

    Raises:
        DatasetError: there is no such file, or it is none of the authors'.
    """
    if not path.is_file():
        raise DatasetError(
            f"no {path}; annotations must be the directory of {', '.join(f'{task}.json' for task in TASKS)}"
        )
    try:
        videos = json.loads(path.read_text(encoding="utf-8"))
        return [
            {"video_id": video, "dim": aspect, "question": one["question"], "answer": one["answer"]}
            for video, aspects in videos.items()
            for aspect, asked in aspects.items()
            for one in asked
        ]
    except KeyError as error:
        raise DatasetError(f"{path}: a question has no {error}") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise DatasetError(f"{path} does not list questions by video and aspect: {error}") from error
