"""Options that a model answers in their own words, and not by their letters."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

from spatiotoken.evaluation.wording import plain, refuses, telling_words

_LETTERED = re.compile(r"\(*[A-Za-z]\)* ?[).:,]")
_DENIALS = frozenset({"not", "no", "neither", "nor", "never", "without", "isnt", "arent", "wasnt", "cannot", "cant"})


def by_letter(options: Sequence[str]) -> dict[str, str]:
    """The options' plain texts by their letters, with which they may begin."""
    pairs = zip(string.ascii_uppercase, map(plain, options), strict=False)
    return {letter: re.sub(rf"^\(?{letter}[.):]\s+", "", text).rstrip(". ") for letter, text in pairs}


def said_alone(said: str, options: Mapping[str, str]) -> set[str]:
    """Options that are said and nothing else: "A blue bus."; but "B" is a letter, and "A. bus" begins with one."""
    if said.strip("(). -!").upper() in options:
        return set()
    same = {letter for letter, text in options.items() if text and text.casefold() == said.rstrip(".").casefold()}
    if same or _LETTERED.match(said):
        return same
    words = telling_words(said)
    return {letter for letter, text in options.items() if words and telling_words(text) == words}


def refused(said: str, options: Mapping[str, str]) -> bool:
    """Whether it is said that there is no answer: "I cannot tell"; never where an option says so."""
    return refuses(said) and not any(map(refuses, options.values()))


def mentioned(said: str, options: Mapping[str, str]) -> set[str]:
    """Options whose words are said: "It is a blue bus"; not denied ("no bus"), nor part of another ("black cat")."""
    words = telling_words(said)
    parts = {letter: telling_words(text) for letter, text in options.items()}
    found = [
        (letter, start, start + len(part))
        for letter, part in parts.items()
        for start in range(len(words))
        if part and words[start : start + len(part)] == part
    ]
    return {
        letter
        for letter, start, end in found
        if (start == 0 or words[start - 1] not in _DENIALS)
        and not any(first <= start and end <= last and last - first > end - start for _, first, last in found)
    }
