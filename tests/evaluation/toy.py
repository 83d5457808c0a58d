"""A dataset of real clips for the tests of the runner, quick to ask and with every kind of trouble."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spatiotoken.evaluation.base import Json, Question, VideoQA
from tests.conftest import DATA

CLIPS = ("flipping_a_pancake.mkv", "nasa_13013_rotated.mp4", "testsrc2_vp9.webm")


class Toy(VideoQA, dataset="toy"):
    """Asks for a word; right is what begins with a letter of the answer."""

    max_new_tokens = 3
    metrics = ("accuracy", "length")

    count: int = 5
    trouble: tuple[str, ...] = ()

    def questions(self) -> Iterator[Question]:
        for number in range(self.count):
            names = [*CLIPS, *self.trouble]
            name = names[number % len(names)]
            yield Question(
                id=f"q{number}",
                video=DATA / name if name != "missing" else Path("/no/such/video.mp4"),
                prompt=f"Question {number}: what is on screen?",
                answer="abcdefghijklm",
                groups={"parity": "even" if number % 2 == 0 else "odd"},
            )

    def parse(self, text: str, question: Question) -> Json | None:
        return text[:1].lower() or None

    def score(self, parsed: Json | None, question: Question) -> dict[str, float]:
        right = parsed is not None and parsed in question.answer
        return {"accuracy": float(right), "length": float(len(question.prompt))}


class NoAnswers(Toy, dataset="toy_without_answers"):
    """The same where the answers are not public."""

    def score(self, parsed: Json | None, question: Question) -> dict[str, float]:
        return {}


class Twice(Toy, dataset="toy_twice"):
    """Two questions of one id."""

    def questions(self) -> Iterator[Question]:
        yield from super().questions()
        yield from super().questions()


class Constrained(Toy, dataset="toy_constrained"):
    """Says how answers are generated."""

    def limits(self, tokenizer: Any, questions: Sequence[Question], prompt_tokens: int) -> dict[str, Any]:
        word = tokenizer("abc", add_special_tokens=False)["input_ids"][:1]
        return {"max_new_tokens": 1, "prefix_allowed_tokens_fn": lambda row, ids: word}


class ByParity(Toy, dataset="toy_by_parity"):
    """Three even questions for each odd one, the even ones first; both count alike."""

    macro = "parity"

    def questions(self) -> Iterator[Question]:
        for number, question in enumerate(super().questions()):
            yield replace(question, groups={"parity": "odd" if number in (6, 7) else "even"})
