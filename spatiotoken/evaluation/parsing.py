"""What a model's words say: the letter of an option, yes or no, a span of time, a short answer.

Words that say nothing count as nothing (None). lmms-eval's parsers (``egoschema``, ``nextqa``, ``longvideobench``,
``mvbench``, and ``mcq_extract``, by which ``videomme`` and ``mlvu`` read) take letters from anywhere, also the first
ones of "A man walks", "Cannot tell" and "A or B", or draw one at random where there is none. These read what those read
rightly, and more shapes; but no article or pronoun, no letter among others, and none that is denied ("not B").
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set

from spatiotoken.evaluation import letter_cues as cues
from spatiotoken.evaluation.option_letters import letters_said, mentions_of, without_lists
from spatiotoken.evaluation.option_texts import by_letter, mentioned, refused, said_alone
from spatiotoken.evaluation.time_spans import parse_span
from spatiotoken.evaluation.wording import plain, refuses, telling_words

__all__ = ["normalised", "parse_option", "parse_span", "parse_yes_no"]

_YES_NO = re.compile(r"\b(?:yes|no)\b(?! (?:doubt|idea|information)\b)", re.IGNORECASE)
_YES_OR_NO = re.compile(r"\b(?:yes|no)\W{0,3}(?:/|or|and)\W{0,3}(?:yes|no)\b", re.IGNORECASE)


def parse_option(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a model's words choose, or None.

    The first kind of evidence that there is decides. Two letters that are said in the same way count as nothing, and so
    does one beyond the options. Where letter and text disagree ("B. <text of C>") the letter is taken, as in lmms-eval.
    Single letters that are mentioned in options ("C picks up a card", as in EgoSchema) may be names, and must be said
    clearly.

    Args:
        options: texts in the order of their letters, 1 to 26. They may begin with their letters.

    Raises:
        ValueError: there are none, or more than there are letters.
    """
    if not 1 <= len(options) <= 26:
        raise ValueError(f"expected 1 to 26 options, got {len(options)}")
    said, texts = plain(text), by_letter(options)
    letters = mentions_of(texts, said)
    unlisted = without_lists(letters)
    found = (
        said_alone(said, texts)  # "A blue bus."
        or letters_said(letters, cues.FINAL)  # "Final answer: B"
        or letters_said(letters, cues.ANSWER)  # "The answer is B", "I choose B", "So, B"
        or letters_said(unlisted, cues.TEXT_BEGINS)  # "B", "B because it moves", "B. a blue bus"
        or letters_said(unlisted, cues.LINE_BEGINS)  # "It turns left.\n\nB"
    )
    if not found and not refused(said, texts):  # "I cannot tell"
        found = (
            letters_said(unlisted, cues.OPTION, cues.BRACKETED, cues.RIGHT, cues.STATED)  # "It shows (B)", "It is B"
            or _decided(said, texts)  # "Yes, there is no car", where yes and no are options
            or mentioned(said, texts)  # "There is a blue bus in it"
        )
    letter = _only(found)
    return letter if letter in texts else None


def parse_yes_no(text: str) -> str | None:
    """``yes`` or ``no``: the one that is said, or with which the text begins; else None, as for "yes or no".

    Refusals count only where the text begins with neither.
    """
    said = plain(text)
    found = list(_YES_NO.finditer(said))
    if not found or _YES_OR_NO.search(said):
        return None
    if not re.search(r"\w", said[: found[0].start()]):
        return found[0][0].lower()
    return None if refuses(said) else _only({match[0].lower() for match in found})


def normalised(text: str) -> str:
    """Lower-case words with single spaces, without articles (unless there is nothing else) and punctuation.

    ``man's`` becomes ``mans``; numbers keep sign, point and colon (``-1.5``), and number words stay words. Reasoning
    and markup are left out, and what is around ``\\boxed{}`` or ``<answer>``.

    lmms-eval has nothing to be equal to: a GPT model judges its ``activitynetqa``, and its open-ended ``nextqa``
    compares lemmas without stop words by WordNet; both are downloaded.
    """
    return " ".join(telling_words(plain(text)))


def _decided(said: str, options: Mapping[str, str]) -> set[str]:
    decisions = {normalised(text): letter for letter, text in options.items()}
    decision = parse_yes_no(said)
    return {decisions[decision]} if decision and {"yes", "no"} <= decisions.keys() else set()


def _only(found: Set[str]) -> str | None:
    return next(iter(found)) if len(found) == 1 else None
