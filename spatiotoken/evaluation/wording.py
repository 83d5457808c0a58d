"""Words as they are compared, and what models say around an answer: reasoning, markup, refusals."""

from __future__ import annotations

import re
import unicodedata

_REASONING = re.compile(r"\A.*</think(?:ing)?>|<think(?:ing)?>.*", re.DOTALL | re.IGNORECASE)
"""Reasoning that was cut off was followed by nothing."""
_MARKED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}|<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_MARKUP = re.compile(r"</?(?:b|i|u|p|s|em|strong|br)\s*/?>|<\|[^|]*\|>|\\[a-z]+")
_PLAIN = str.maketrans(
    dict.fromkeys("[{<【〔「『", "(")
    | dict.fromkeys("]}>】〕」』", ")")
    | dict.fromkeys('*`_#$•"“”', " ")
    | dict.fromkeys("‘’", "'")
    | dict.fromkeys("–—", " - ")
    | {"。": ".", "、": ","}
)
_QUOTES = re.compile(r"(?<!\w)'|'(?!\w)")
_WORD = re.compile(r"(?:(?<![\w.])-)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:[.:]\d+)*(?!\w)|\w+(?:'\w+)*")
_ARTICLES = frozenset({"a", "an", "the"})
_REFUSAL = re.compile(
    r"\b(?:i|we)\b[^.!?\n]{0,30}?\b(?:can ?not|can't|could not|couldn't|unable|not able|(?:don't|do not) (?:know|have)"
    r"|no idea|apologi[sz]e)\b|\bsorry\b|\b(?:can ?not|can't|could not) be \w+|\bunclear\b|\bas an ai\b"
    r"|\bnot (?:sure|certain)\b|\b(?:impossible|not possible) to\b|(?:\bnot |n't |\bin)(?:enough|sufficient) \w+",
    re.IGNORECASE,
)


def plain(text: str) -> str:
    """What is answered: without reasoning, quotes and markup, all brackets round, and all dashes hyphens.

    Where parts of it are in ``\\boxed{}`` or ``<answer>``, the last of them.
    """
    said = _REASONING.sub("", unicodedata.normalize("NFKC", text))
    for marked in _MARKED.finditer(said):
        said = marked[marked.lastindex or 0]
    said = _QUOTES.sub(" ", _MARKUP.sub(" ", said).translate(_PLAIN))
    return re.sub(r"[^\S\n]+", " ", said).strip()


def words(said: str) -> list[str]:
    """In lower case, without punctuation: ``man's`` is ``mans``, but numbers keep sign, point and colon."""
    return [re.sub("[',]", "", word) for word in _WORD.findall(said.casefold())]


def telling_words(said: str) -> list[str]:
    """The words but for articles, unless there is nothing else."""
    return [word for word in words(said) if word not in _ARTICLES] or words(said)


def refuses(said: str) -> bool:
    """Whether no answer is given: "I cannot tell", "There is not enough information"."""
    return _REFUSAL.search(said) is not None
