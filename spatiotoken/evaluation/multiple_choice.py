"""Datasets whose answers are letters of options."""

from __future__ import annotations

from collections.abc import Sequence

from spatiotoken.evaluation.base import Json, Question, VideoQA
from spatiotoken.evaluation.parsing import parse_option

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def lettered(options: Sequence[str], style: str = "{letter}. {option}") -> str:
    """The options, a line each, as prompts list them."""
    return "\n".join(style.format(letter=LETTERS[at], option=option) for at, option in enumerate(options))


class MultipleChoice(VideoQA):
    """Base of the datasets whose ``Question.answer`` is a letter."""

    def parse(self, text: str, question: Question) -> Json | None:
        return parse_option(text, question.options)

    def score(self, parsed: Json | None, question: Question) -> dict[str, float]:
        return {"accuracy": float(parsed == question.answer)}
