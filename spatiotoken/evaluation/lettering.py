"""Options and answers as annotations letter them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from spatiotoken.evaluation.annotations import Row
from spatiotoken.evaluation.base import DatasetError, Json
from spatiotoken.evaluation.multiple_choice import LETTERS

_LETTERED = re.compile(r"\s*\(?([A-Z])[.)]\s*(.*?)\s*", re.DOTALL)


def texts(row: Row, column: str) -> list[str]:
    """A column that holds a list.

    Raises:
        DatasetError: it holds none, as in a .csv file, where lists become one text.
    """
    value = row[column]
    if not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        raise DatasetError(f"column {column} must hold lists of texts, not {value!r}; a .csv file cannot")
    return value


def unlettered(options: Sequence[str]) -> tuple[str, ...]:
    """The options without their letters, such as ``A. `` or ``(A) ``; those that have none stay as they are."""
    found = (_LETTERED.fullmatch(option) for option in options)
    return tuple(
        match[2] if match and match[1] == letter else option
        for letter, match, option in zip(LETTERS, found, options, strict=False)
    )


def listed_options(question: str) -> tuple[str, ...]:
    """Options that a question's text lists, a line each: the lines that begin with A, B, C, ... in this order."""
    options: list[str] = []
    for line in question.splitlines():
        match = _LETTERED.fullmatch(line)
        if match and match[1] == LETTERS[len(options)]:
            options.append(match[2])
    return tuple(options)


def answer_letter(answer: Json, options: Sequence[str], question: str) -> str:
    """Letter of an answer that is given as a letter, or as an index that counts from 0.

    Args:
        question: what the error calls it.

    Raises:
        DatasetError: it is none of the options.
    """
    letters = LETTERS[: len(options)]
    said = str(answer).strip()
    if said.isdecimal() and int(said) < len(letters):
        return letters[int(said)]
    if len(said) == 1 and said in letters:
        return said
    raise DatasetError(f"question {question}: its answer is {answer!r}, but it has {len(letters)} options")
