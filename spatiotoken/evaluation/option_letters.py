"""Letters in a model's words that may be those of options."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from spatiotoken.evaluation.letter_cues import BRACKETED, DENIED_AFTER, DENIED_BEFORE, LABEL, OPTION, RIGHT, Cue
from spatiotoken.evaluation.wording import words

_CONTEXT = 200
"""Characters around a letter that are looked at, lest endless repetitions take long."""
_LETTER = re.compile(
    r"(?<![A-Za-z0-9À-ɏ])(?<![A-Za-z]['-])(?<!\b[A-Za-z]\.)[A-Za-z]"
    r"(?![A-Za-z0-9À-ɏ]|['-][A-Za-z]|\.[A-Za-z]\.)"
)
"""One that stands alone, unlike those of "X-ray", "C's", "vitamin-C" and "U.S."."""
_JOINS = re.compile(
    r"[). ]*(?:,?\s*(?:and/or|or|nor)\b|,?\s*and\b(?! \(*[A-Z]\)* (?:is|was)\b)|vs\b\.?|[,/&+])\s*"
    r"(?:(?:both|either|neither|options?|choices?|letters?)\b\s*)?\(*(?=[A-Z](?![A-Z]))",
    re.IGNORECASE,
)
"""What is between "A" and "B" where they are said as one, but not in "A, and B is wrong"."""
_NO_NOUNS = frozenset(
    "a an the this that these those it he she they there because since as for so which where who when and or but if in "
    "on at from with to of while based by both".split()
)
"""An "A" before one of them is no article, and a name is seldom followed by one."""
_VERBS = frozenset("is was are were has would should must shows describes depicts matches fits".split())


@dataclass(frozen=True)
class Mention:
    """A letter, or several as in "A or B", between what is said before and after in lower case.

    Attributes:
        certain: no letter might be an article, a pronoun or a name.
    """

    letters: frozenset[str]
    before: str
    after: str
    certain: bool

    def is_said(self, *cues: Cue) -> bool:
        return any(
            (self.certain or not cue.certain) and re.search(cue.before, self.before) and re.match(cue.after, self.after)
            for cue in cues
        )


def mentions_of(options: Mapping[str, str], said: str) -> list[Mention]:
    """Letters in a text that are neither denied, nor words or names in it."""
    names = {match[0].upper() for text in options.values() for match in _LETTER.finditer(text)} - {"A", "I"}
    mentions: list[Mention] = []
    end = 0
    for match in _LETTER.finditer(said):
        new = _mention(match, options, names)
        if new is None:
            continue
        joins = _JOINS.match(said, end) if mentions else None
        if joins and joins.end() == match.start():
            old = mentions.pop()
            new = Mention(old.letters | new.letters, old.before, new.after, old.certain and new.certain)
        mentions.append(new)
        end = match.end()
    return [mention for mention in mentions if not mention.is_said(DENIED_BEFORE, DENIED_AFTER)]


def without_lists(mentions: Sequence[Mention]) -> list[Mention]:
    """Without "A. a car B. a bus ...", where options are told once more and none is chosen."""
    labels = [mention for mention in mentions if mention.is_said(LABEL)]
    told = list(dict.fromkeys(min(label.letters) for label in labels))[:2] == ["A", "B"]
    return [mention for mention in mentions if not (told and mention.is_said(LABEL))]


def letters_said(mentions: Sequence[Mention], *cues: Cue) -> set[str]:
    return {letter for mention in mentions if mention.is_said(*cues) for letter in mention.letters}


def _mention(match: re.Match[str], options: Mapping[str, str], names: Set[str]) -> Mention | None:
    start, end, letter = match.start(), match.end(), match[0].upper()
    before = match.string[max(0, start - _CONTEXT) : start].lower()
    after = match.string[end : end + _CONTEXT].lower()
    small, name = match[0].islower(), letter in names
    if letter not in options and (small or name):
        return None
    noun = _noun_follows(match[0], after, name=name) and (small or not _text_follows(options.get(letter, ""), after))
    mention = Mention(frozenset(letter), before, after, certain=not (noun or name or match[0] in "ai"))
    wary = small or name or letter in "AI"
    clear = mention.is_said(BRACKETED) or (not small and (mention.is_said(OPTION) or re.match(RIGHT.after, after)))
    return mention if clear or not (noun and wary) else None


def _noun_follows(letter: str, after: str, *, name: bool) -> bool:
    """Whether a word follows that makes a letter an article, a pronoun or a name: "A man", "I see", "C, cooking"."""
    comma = ",?" if name or letter in "Ii" else ""
    bracket = r"\(?" if letter in "Iai" else ""
    word = re.match(rf"{comma} {bracket}([a-z0-9]+)", after)
    if word is None or letter in "Ii":
        return word is not None
    return word[1] not in _NO_NOUNS and (name or word[1] not in _VERBS)


def _text_follows(text: str, after: str) -> bool:
    """Whether an option's text follows, or its beginning and no more: "A opens the door and"."""
    # With articles, or an option "A man" would follow the first word of "A man".
    own, following = " ".join(words(text)), " ".join(words(after))
    whole = bool(own) and f"{following} ".startswith(f"{own} ")
    return whole or (following.count(" ") > 1 and own.startswith(following))
