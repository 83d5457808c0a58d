"""Letters of options in a model's words: which single letters are some, and how they are said."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

from spatiotoken.evaluation.wording import words

_CONTEXT = 200
"""Characters around a letter that are looked at, lest endless repetitions take long."""
_LETTER = re.compile(
    r"(?<![A-Za-z0-9À-ɏ])(?<![A-Za-z]['-])(?<!\b[A-Za-z]\.)[A-Za-z]"
    r"(?![A-Za-z0-9À-ɏ]|['-][A-Za-z]|\.[A-Za-z]\.)"
)
"""One that stands alone, unlike those of "X-ray", "C's", "vitamin-C" and "U.S."."""
_JOINS = re.compile(
    r"[).]*\s*(?:,?\s*(?:or|nor)\b|(?:,?\s*and(?:/or)?|vs\.?)(?!\w)|[,/&+])\s*"
    r"(?:(?:both|either|neither|options?|choices?|letters?)\s*)?\(*"
)
_NO_NOUNS = frozenset(
    "a an the this that these those it he she they there because since as for so which where who when and or but if in "
    "on at from with to of while based by both".split()
)
"""An "A" before one of them is no article, and a name is seldom followed by one."""
_VERBS = frozenset("is was are were has would should must shows describes depicts matches fits".split())


_OPENS = re.compile(r"\(\s*$")
_CLOSES = re.compile(r"\s*(?:[).:,]|$)")
_LINE_BEGINS = re.compile(r"(?:^|\n)[\s()-]*$")
_LINE_ENDS = re.compile(r"[).:! ]*(?:\n|$)")
_LISTED = re.compile(r" ?[.):]")
_DELIMITED = re.compile(r" ?(?:$|[\n.):,;/|=-])")
_CLAUSE_BEGINS = re.compile(
    r"(?:^|[.!?:;,\n(]|\b(?:think|believe|that|option|choice|letter|because|but|say|and|while|whereas)\b)[\s(]*$"
)
_GAP = r"[\s:=,(是为은는は-]*"
_FILLERS = (
    r"(?:\b(?:is|was|be|are|would|should|must|will|can|only|to|the|this|that|it|your|question|options?|choices?|letters?|"
    r"answer|correct|right|best|most|likely|probably|definitely|clearly|indeed|in|case|here|for|of|above|given|"
    rf"following|therefore|thus|hence)\b(?:'s)?{_GAP})*"
)


def _cue(cue: str) -> re.Pattern[str]:
    """Something said before a letter, with nothing but fillers between them."""
    return re.compile(rf"(?:{cue}){_GAP}{_FILLERS}$")


_FINAL = _cue(r"\bfinal (?:answer|choice|decision)\b")
_ANSWER = _cue(
    r"\b(?:ans(?:wers?)?|(?:correct|right|best|appropriate|suitable|accurate|likely|matching) (?:option|choice)"
    r"|my (?:choice|guess|pick)|i(?:'d|'ll| would| will)? (?:choose|chose|select|pick|go (?:with|for)|say|guess|think"
    r"|believe)|therefore|thus|hence|so)\b|(?:^|\n)a:|答[案え]|选择?|選択|정?답"
)
_OPTION = re.compile(rf"(?:\b(?:option|choice|letter)\b|选项){_GAP}$")
_SAID_TO_BE = _cue(r"\b(?:is|be|it's|that's|but|maybe|perhaps|probably|namely|means)\b")
_IS_RIGHT = re.compile(
    r"\)*\s*(?:is|was|would be|seems|looks|appears)(?: to be)? (?:\w+ly |the |most )*"
    r"(?:correct|right|best|answer|true|accurate|appropriate|likely|suitable|only|one|option|choice)\b"
)
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|never|neither|nor|except|unlike|cannot|can't|whether|(?:tell|sure|know) if|rather than|instead of|"
    r"rul\w+ out|eliminat\w+|exclud\w+)\b|n't\b)"
    r"(?:(?!\b(?:but|so|therefore|thus|hence|because|since|however|although|though|and|which)\b)[^.!?;,:\n])*$"
)
_DENIED_AFTER = re.compile(
    r"\)*\s*(?:(?:both|all) )?(?:(?:is|are|was|were|seems?|looks?|would be|can be) (?:\w+ly |also |both )?"
    r"(?:not|wrong|incorrect|false|out|ruled|eliminated|excluded|unlikely|inaccurate)\b"
    r"|(?:isn't|aren't|wasn't|cannot|can't|can not|couldn't|does not|doesn't|do not|don't)(?!\w))"
)


@dataclass(frozen=True)
class Mention:
    """A letter, or several as in "A or B", between what is said before and after in lower case.

    Attributes:
        known: they are options'.
        certain: none of them might be an article, a pronoun or a name.
    """

    letters: frozenset[str]
    before: str
    after: str
    known: bool
    certain: bool

    def is_final(self) -> bool:
        """Final answer: B."""
        return bool(_FINAL.search(self.before))

    def is_answer(self) -> bool:
        """The answer is B. I choose B. So, B."""
        return bool(_ANSWER.search(self.before))

    def begins_text(self) -> bool:
        """B because it moves. It turns left.\\n\\nB"""
        alone = self.begins_line() and bool(_LINE_ENDS.match(self.after))
        return alone or not self.before.strip("()- \n")

    def begins_line(self) -> bool:
        """Looking at it:\\nB. a blue bus"""
        return bool(_LINE_BEGINS.search(self.before) and (self.bracketed or _DELIMITED.match(self.after)))

    def is_pointed_at(self) -> bool:
        """Option B. I see (B). B is correct. It is B."""
        if _OPTION.search(self.before):
            return True
        clause = bool(_CLAUSE_BEGINS.search(self.before))
        if self.bracketed or (clause and _IS_RIGHT.match(self.after)):
            return self.known
        return self.known and self.certain and (clause or bool(_SAID_TO_BE.search(self.before)))

    @property
    def bracketed(self) -> bool:
        return bool(_OPENS.search(self.before) and _CLOSES.match(self.after))

    @property
    def listed(self) -> bool:
        return bool(re.search(r"(?:^|[\s(])$", self.before) and _LISTED.match(self.after))

    @property
    def denied(self) -> bool:
        """It is not B. B is wrong."""
        return bool(_DENIED_BEFORE.search(self.before) or _DENIED_AFTER.match(self.after))


def said_letters(mentions: Sequence[Mention], way: Callable[[Mention], bool]) -> set[str]:
    """Letters that are said in a way; a list of the options from A on chooses none of them."""
    listed = dict.fromkeys(letter for mention in mentions if mention.listed for letter in sorted(mention.letters))
    told = list(listed)[:2] == ["A", "B"] and way not in (Mention.is_final, Mention.is_answer)
    return {letter for mention in mentions if way(mention) and not (told and mention.listed) for letter in mention.letters}


def mentions_of(options: Mapping[str, str], said: str) -> list[Mention]:
    """The letters in a text that are not denied, nor words or names in it.

    Args:
        options: texts by their letters.
    """
    names = {match[0].upper() for text in options.values() for match in _LETTER.finditer(text)} - {"A", "I"}
    mentions: list[Mention] = []
    end = 0
    for match in _LETTER.finditer(said):
        mention = _mention(match, options, names)
        if mention is None:
            continue
        if mentions and _JOINS.fullmatch(said, end, match.start()):
            mention = _joined(mentions.pop(), mention)
        mentions.append(mention)
        end = match.end()
    return [mention for mention in mentions if not mention.denied]


def _joined(one: Mention, other: Mention) -> Mention:
    return Mention(
        one.letters | other.letters, one.before, other.after, one.known and other.known, one.certain and other.certain
    )


def _mention(match: re.Match[str], options: Mapping[str, str], names: Set[str]) -> Mention | None:
    said, at, letter = match.string, match.start(), match[0].upper()
    before, after = said[max(0, at - _CONTEXT) : at].lower(), said[at + 1 : at + _CONTEXT].lower()
    known, small, name = letter in options, match[0].islower(), letter in names
    if not known and (small or name):
        return None
    noun = _takes_noun(letter, after, options.get(letter, ""), name=name)
    mention = Mention(frozenset(letter), before, after, known, certain=not (noun or name or match[0] in "ai"))
    wary = small or name or letter in "AI"
    clear = not (wary and noun) or mention.bracketed
    return mention if clear or (not small and (_IS_RIGHT.match(after) or _OPTION.search(before))) else None


def _takes_noun(letter: str, after: str, text: str, *, name: bool) -> bool:
    """Whether a word follows that makes a letter an article, a pronoun or a name, and is not its option's text."""
    word = re.match(r"[ ,]+([a-z0-9]+)" if name or letter == "I" else r" ([a-z0-9]+)", after)
    if word is None:
        return False
    if letter != "I" and (word[1] in _NO_NOUNS or (word[1] in _VERBS and not name)):
        return False
    # With articles, or an option "A man" would follow the first word of "A man".
    own, following = " ".join(words(text)), " ".join(words(after))
    return letter == "I" or not own or not (
        f"{following} ".startswith(f"{own} ") or (following.count(" ") > 1 and own.startswith(following))
    )
