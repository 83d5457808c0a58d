"""What a model's words say: the letter of an option, yes or no, a span of time, a short answer.

Words that say nothing count as nothing (None). lmms-eval's parsers (``egoschema``, ``nextqa``, ``longvideobench``,
``mvbench``, and ``mcq_extract``, by which ``videomme`` and ``mlvu`` read) take letters from anywhere, also the first
ones of "A man walks", "Cannot tell" and "A or B", or draw one at random where there is none. These read what those read
rightly, and more shapes; but no article or pronoun, no letter among others, and none that is denied ("not B").
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

# Reasoning and marks.
_REASONING = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_REASONING_ENDS = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_REASONING_BEGINS = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_MARKED = re.compile(
    r"\\boxed\s*\{(?P<boxed>(?:[^{}]|\{[^{}]*\})*)\}|<answer>(?P<tagged>.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE
)
_MARKUP = re.compile(r"\*+|`+|</?(?:b|i|u|p|em|strong|s)>|<br\s*/?>|<\|[^|]*\|>|\\(?:text|math)[a-z]*\b")
_PLAIN = str.maketrans("【】〔〕「」『』“”‘’_", "[][][][]\"\"'' ")

# Words.
_TOKEN = re.compile(r"(?:(?<![\w.])-)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:[.:]\d+)*(?!\w)|\w+(?:'\w+)*")
_ARTICLES = frozenset({"a", "an", "the"})
_REFUSAL = re.compile(
    r"\b(?:i|we)\b[^.!?\n]{0,30}?\b(?:can ?not|can't|could not|couldn't|unable|not able|(?:don't|do not) (?:know|have)"
    r"|not (?:sure|certain)|no idea|apologi[sz]e)\b|\bsorry\b|\b(?:can ?not|can't|could not) be \w+|\bunclear\b"
    r"|\b(?:impossible|not possible) to\b|(?:\bnot |n't |\bin)(?:enough|sufficient) (?:information|context)"
    r"|\bas an ai\b",
    re.IGNORECASE,
)
_YES_NO = re.compile(r"\b(?:yes|no)\b(?! (?:doubt|idea|information)\b)", re.IGNORECASE)
_YES_OR_NO = re.compile(r"\byes\W{0,3}(?:/|or|and)\W{0,3}no\b|\bno\W{0,3}(?:/|or|and)\W{0,3}yes\b", re.IGNORECASE)
_DENIALS = frozenset({"not", "no", "neither", "nor", "never", "without", "isnt", "arent", "wasnt", "cannot", "cant"})

# Letters. One stands alone if it is not part of "X-ray", "C's", "vitamin-C" or "U.S.".
_LETTER = re.compile(
    r"(?<![A-Za-z0-9À-ɏ])(?<![A-Za-z]['-])(?<!\b[A-Za-z]\.)[A-Za-z]"
    r"(?![A-Za-z0-9À-ɏ]|['-][A-Za-z]|\.[A-Za-z]\.)"
)
_CONTEXT = 200
"""Characters around a letter that are looked at, lest endless repetitions take long."""
_OPENS = re.compile(r"[(\[{<]\s*[\"']?$")
_CLOSES = re.compile(r"\s*[\"']?\s*(?:[)\]}>.:,]|$)")
_JOINS = re.compile(
    r"[)\]}>\"'.]*\s*(?P<by>[,/&+]\s*(?:(?:and|or|nor)\b)?|(?:and/or|and|or|nor|vs\.?)(?!\w))\s*"
    r"(?:(?:both|either|neither|options?|choices?|letters?)\s*)?[(\[{<\"']*"
)
_SINGULAR = re.compile(
    r"[)\]}>\"']*\s+(?:is|was|has|does|isn't|wasn't|doesn't|cannot|can't|shows|would)\b", re.IGNORECASE
)
_NEXT_WORD = re.compile(r"[ \t]+[\"']?([A-Za-z0-9]+)")
_NEXT_WORD_OF_NAME = re.compile(r"[ \t,]+[\"']?([A-Za-z0-9]+)")
_NO_NOUNS = frozenset(
    "a an the this that these those it he she they there because since as for so which where who when and or but if in "
    "on at from with to of while based by both".split()
)
"""An "A" before one of them is no article, and a name is seldom followed by one."""
_VERBS = frozenset("is was are were has would should must shows describes depicts matches fits".split())
_DELIMITED = re.compile(r"[)\]}>\"'$]*[ \t]*(?:$|\n|[.):,;/|=>\u2013\u2014\u3001\u3002-])")
_DELIMITED_SMALL = re.compile(r"[)\]}>\"']*[ \t]*(?:$|\n|[.):])")
_LETTERED = re.compile(r"[\"'(\[{<]*[A-Za-z][\"')\]}>]*\s?[)\]}>.:,]")
_LISTED = re.compile(r"[ \t]*[.):]")
_LINE_BEGINS = re.compile(r"(?:^|\n)[\s>#\u2022\"'(\[{<$-]*$")
_LINE_ENDS = re.compile(r"[)\]}>\"'$.:!]*[ \t]*(?:$|\n)")
_CLAUSE_BEGINS = re.compile(r"(?:^|[.!?:;,\n])[\s\"'(\[{<]*$")
_GAP = r"[\s:=,\"'(\[{<>$#是为為은는は\u2013\u2014-]*"
_FILLERS = (
    r"(?:\b(?:is|was|be|are|would|should|must|will|can|only|to|the|this|that|it|it's|that's|your|question|options?|"
    r"choices?|letters?|answer|correct|right|best|most|likely|probably|definitely|clearly|indeed|in|case|here|for|of|"
    rf"above|given|following|number|therefore|thus|hence)\b{_GAP})*"
)


def _cue(words: str) -> re.Pattern[str]:
    return re.compile(rf"(?:{words}){_GAP}{_FILLERS}$", re.IGNORECASE)


_FINAL = _cue(r"\bfinal (?:answer|choice|decision)\b")
_ANSWER = _cue(
    r"\b(?:answers?|ans\.?|(?:correct|right|best|appropriate|suitable|accurate|likely|matching) (?:option|choice)"
    r"|my (?:choice|guess|pick)|i(?:'d|'ll| would| will)? (?:choose|chose|select|pick|go (?:with|for)|say|guess|think"
    r"|believe)|therefore|thus|hence|so)\b|(?:^|\n)\s*a:|答案|选择?|選択|答え|정?답"
)
_OPTION = re.compile(rf"(?:\b(?:option|choice|letter)\b|选项|옵션){_GAP}$", re.IGNORECASE)
_SAID_TO_BE = _cue(r"\b(?:is|be|it's|that's|but|maybe|perhaps|probably|namely|means)\b")
_IS_RIGHT = re.compile(
    r"[)\]}>\"']*\s*(?:is|was|would be|seems|looks|appears)(?: to be)?\s+(?:\w+ly\s+|the\s+|most\s+)*"
    r"(?:correct|right|best|answer|true|accurate|appropriate|likely|suitable|only|one|option|choice)\b",
    re.IGNORECASE,
)
_STANDS_FOR_OPTION = re.compile(
    r"(?:^|[.!?,;:\n(]|\b(?:think|believe|that|option|choice|letter|so|therefore|because|hence|thus|but|say|and|while|"
    r"whereas)\b)[\s\"'(\[]*$",
    re.IGNORECASE,
)
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|never|neither|nor|except|unlike|cannot|can't|whether|(?:tell|sure|know) if|rather than|instead of|"
    r"rul\w+ out|eliminat\w+|exclud\w+)\b|n't\b)"
    r"(?:(?!\b(?:but|so|therefore|thus|hence|because|since|however|although|though|and|which)\b)[^.!?;,:\n])*$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"[)\]}>\"']*\s*(?:(?:both|all)\s+)?"
    r"(?:(?:is|are|was|were|seems?|looks?|would be|can be)\s+(?:\w+ly\s+|also\s+|both\s+)?"
    r"(?:not|wrong|incorrect|false|out|ruled|eliminated|excluded|unlikely|inaccurate)\b"
    r"|(?:isn't|aren't|wasn't|cannot|can't|can not|couldn't|does not|doesn't|do not|don't)(?!\w))",
    re.IGNORECASE,
)

# Times.
_CLOCK = r"\d+:\d{2}(?::\d{2})?(?:\.\d+)?"
_NUMBER = r"\d+(?:\.\d+)?"
_UNIT = r"\s*s(?:e\w*)?\b"  # misspelt too: lmms-eval's prompt says "seonds"
_MINUTES = rf"\d+\s*m(?:in(?:ute)?s?)?\s*(?:and\s*)?{_NUMBER}{_UNIT}|\d+\s*min(?:ute)?s?\b"
_CERTAIN = re.compile(rf"(?<![\w.:])(?:{_CLOCK}|{_MINUTES}|{_NUMBER}{_UNIT})(?![\d:])")
_TIME = rf"(?:{_CLOCK}|{_MINUTES}|{_NUMBER}(?:{_UNIT})?)(?![\d:])"
_FIRST = rf"(?<![\w.:])({_TIME})"
_SPANS = (
    re.compile(rf"{_FIRST}\s*(?:[-–—~]|to|until|till?|through)\s*({_TIME})|between\s+({_TIME})\s*and\s*({_TIME})"),
    re.compile(rf"\b(?:start|begin)\D{{0,200}}{_FIRST}.{{0,200}}?\b(?:end|finish|stop)\D{{0,200}}({_TIME})", re.DOTALL),
    re.compile(rf"^\D*?{_FIRST}(?:[\s,;()<>[\]]+|\s*and\s*)({_TIME})\D*$"),
)
_HAPPENS = re.compile("start|end|happen")
_EXAMPLE = re.compile(r"\bexample\b[^\d]*$")


def parse_option(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a model's words choose, or None.

    What counts is, in this order: an option's text and nothing else; the letter in ``\\boxed{}`` or ``<answer>``; after
    "final answer"; after "the answer is", "I choose", "so" and the like; at the beginning of the text or alone on a
    line, then of other lines; elsewhere in brackets or as in "option B", "it is B", "B is correct"; the only option
    whose text is mentioned. Two letters that are said in the same way count as nothing, and so does one beyond the
    options. Where letter and text disagree ("B. <text of C>") the letter is taken, as in lmms-eval. Single letters that
    are mentioned in options ("C picks up a card", as in EgoSchema) may be names, and must be said clearly. Options may
    begin with their letters.

    Args:
        options: texts in the order of their letters, 1 to 26.

    Raises:
        ValueError: there are none, or more than there are letters.
    """
    if not 1 <= len(options) <= len(string.ascii_uppercase):
        raise ValueError(f"expected 1 to 26 options, got {len(options)}")
    said = _said(text)
    choice = _Choice.of(options)
    marked = list(_MARKED.finditer(said))
    if marked:
        said = marked[-1]["boxed"] or marked[-1]["tagged"] or ""
    said = _unmarked(said)
    whole = choice.whole(said)
    if whole is not None:
        return whole
    letters = choice.letters_in(said)
    if letters:
        return _only(letters & choice.options.keys()) if len(letters) == 1 else None
    return None if choice.refused(said) else _only(choice.named(said))


def parse_yes_no(text: str) -> str | None:
    """``yes`` or ``no``: the one that is said, or with which the text begins; else None, as for "yes or no".

    Refusals count only where the text begins with one of the words.
    """
    said = _unmarked(_said(text))
    words = [word.lower() for word in _YES_NO.findall(said)]
    if not words or _YES_OR_NO.search(said):
        return None
    if re.match(rf"\W*{words[0]}\b", said, re.IGNORECASE):
        return words[0]
    return None if _REFUSAL.search(said) else _only(set(words))


def normalised(text: str) -> str:
    """Lower-case words with single spaces, without articles (unless there is nothing else) and punctuation.

    ``man's`` becomes ``mans``; numbers keep sign, point and colon (``-1.5``), and number words stay words. Reasoning
    and markup are left out.

    lmms-eval has nothing to be equal to: a GPT model judges its ``activitynetqa``, and its open-ended ``nextqa``
    compares lemmas without stop words by WordNet; both are downloaded.
    """
    return " ".join(_tokens(_unmarked(_said(text))))


def parse_span(text: str) -> tuple[float, float] | None:
    """The seconds from which to which something happens, or None.

    Times are seconds (``12.5``, ``3s``), ``m:ss``, ``h:mm:ss`` or ``1 min 5 s``. What counts is, in this order: the
    first two that are joined by a dash, "to" or the like, or by "and" after "between"; what is said to start and to end
    it; two with nothing but a comma or "and" between them; the only two that are certainly times. Lines with "start",
    "end" or "happen" come first, as in lmms-eval's ``charades_sta``. A pair that follows "example" is the prompt's. A
    span that does not end after its start is none (lmms-eval swaps the two).
    """
    said = _unmarked(_said(text)).lower()
    lines = sorted(re.split(r"[!?\n]", said), key=lambda line: not _HAPPENS.search(line))
    for pattern in _SPANS:
        for match in (match for part in (*lines, said) for match in pattern.finditer(part)):
            if not _EXAMPLE.search(match.string[: match.start()]):
                start, end = filter(None, match.groups())
                return _span(start, end)
    times = _CERTAIN.findall(said)
    return _span(*times) if len(times) == 2 else None


@dataclass(frozen=True)
class _Mention:
    """A letter, or several as in "A or B", between what is said before and after."""

    letters: frozenset[str]
    before: str
    after: str
    small: bool
    clear: bool
    """No word follows that would make it an article or a name."""

    @property
    def bracketed(self) -> bool:
        return bool(_OPENS.search(self.before) and _CLOSES.match(self.after))

    @property
    def leads(self) -> bool:
        if not _LINE_BEGINS.search(self.before):
            return False
        return self.bracketed or bool((_DELIMITED_SMALL if self.small else _DELIMITED).match(self.after))

    @property
    def begins(self) -> bool:
        """Is the text's first word, or alone on its line."""
        first = not self.before.strip("\"'([{<$#>- \t\n")
        return first or (self.leads and bool(_LINE_ENDS.match(self.after)))

    @property
    def listed(self) -> bool:
        return bool(re.search(r"(?:^|\s)[\"'(\[]?$", self.before) and _LISTED.match(self.after))


@dataclass(frozen=True)
class _Choice:
    """Options by their letters.

    Attributes:
        options: the words of each.
        plain: the text of each in lower case, for those that have no words.
        names: letters that options mention.
    """

    options: dict[str, list[str]]
    plain: dict[str, str]
    names: frozenset[str]

    @classmethod
    def of(cls, options: Sequence[str]) -> _Choice:
        letters = string.ascii_uppercase[: len(options)]
        texts = {
            letter: re.sub(rf"^\(?{letter}[.):]\s+", "", _unmarked(_said(option)))
            for letter, option in zip(letters, options, strict=True)
        }
        named = {match[0].upper() for text in texts.values() for match in _LETTER.finditer(text)}
        return cls(
            options={letter: _tokens(text) for letter, text in texts.items()},
            plain={letter: text.casefold().rstrip(". ") for letter, text in texts.items()},
            names=frozenset(named - {"A", "I"}),
        )

    def whole(self, said: str) -> str | None:
        """The option that is said, and nothing else; none where a letter might be one of an option."""
        alone = re.fullmatch(r"\W*([A-Za-z])\W*", said)
        if alone and alone[1].upper() in self.options:
            return None
        # "A. red" begins with no article.
        plain, tokens = said.casefold().rstrip(". "), [] if _LETTERED.match(said) else _tokens(said)
        same = {letter for letter, text in self.plain.items() if plain and text == plain}
        return _only(same or {letter for letter, words in self.options.items() if tokens and words == tokens})

    def letters_in(self, said: str) -> frozenset[str]:
        """What is said by letters, the clearest way in which any is said; they may be none of the options'."""
        mentions = [mention for mention in self._mentions(said) if not self._denied(mention)]
        in_order = [mention for mention in mentions if mention.listed]
        different = list(dict.fromkeys(letter for mention in in_order for letter in mention.letters))
        # The options are told once more, not one of them chosen.
        unlisted = [m for m in mentions if not m.listed] if different[:2] == ["A", "B"] else mentions
        ways = [
            [mention for mention in mentions if _FINAL.search(mention.before)],
            [mention for mention in mentions if _ANSWER.search(mention.before)],
            [mention for mention in unlisted if mention.begins and (mention.leads or self._known(mention))],
            [mention for mention in unlisted if mention.leads],
            [] if self.refused(said) else [mention for mention in unlisted if self._said_elsewhere(mention)],
        ]
        clearest = next((way for way in ways if way), [])
        return frozenset(letter for mention in clearest for letter in mention.letters)

    def refused(self, said: str) -> bool:
        """Whether no answer is given, in words that are not an option's."""
        match = _REFUSAL.search(said)
        if match is None or any(_REFUSAL.search(text) for text in self.plain.values()):
            return False
        return not any(_places(words, _tokens(match[0])) for words in self.options.values())

    def named(self, said: str) -> set[str]:
        """Options whose text is mentioned and not denied; not "cat" in "black cat" where that is an option too."""
        tokens = _tokens(said)
        places = [
            (letter, at, at + len(words)) for letter, words in self.options.items() for at in _places(words, tokens)
        ]
        found = {
            letter
            for letter, start, end in places
            if (start == 0 or tokens[start - 1] not in _DENIALS)
            and not any(first <= start and end <= last and last - first > end - start for _, first, last in places)
        }
        decisions = {words[0]: letter for letter, words in self.options.items() if words in (["yes"], ["no"])}
        if len(decisions) == 2 and found <= set(decisions.values()):
            # "Yes, there is no car" says yes.
            answer = parse_yes_no(said)
            return {decisions[answer]} if answer else set()
        return found

    def _mentions(self, said: str) -> Iterator[_Mention]:
        matches = [match for match in _LETTER.finditer(said) if self._is_letter(match[0], said, match.start())]
        while matches:
            group = [matches.pop(0)]
            while matches and self._joined(said, group[-1].end(), matches[0]):
                group.append(matches.pop(0))
            yield _Mention(
                letters=frozenset(match[0].upper() for match in group),
                before=_before(said, group[0].start()),
                after=said[group[-1].end() :],
                small=any(match[0].islower() for match in group),
                clear=self._is_clear(group[-1][0], said[group[-1].end() :], wary=True),
            )

    def _joined(self, said: str, end: int, other: re.Match[str]) -> bool:
        by = _JOINS.fullmatch(said, end, other.start())
        # "B, and A is wrong" are two clauses.
        return by is not None and ("or" in by["by"] or not _SINGULAR.match(said, other.end()))

    def _is_letter(self, letter: str, said: str, at: int) -> bool:
        before, after = _before(said, at), said[at + 1 :]
        known = letter.upper() in self.options
        if not known and (letter.islower() or letter in self.names):
            return False
        if _OPENS.search(before) and _CLOSES.match(after):
            return True
        if letter.isupper() and (_IS_RIGHT.match(after) or _OPTION.search(before)):
            return True
        return self._is_clear(letter, after, wary=letter in "AIai" or letter.islower() or letter in self.names)

    def _is_clear(self, letter: str, after: str, *, wary: bool) -> bool:
        name = letter.upper() in self.names
        word = (_NEXT_WORD_OF_NAME if name or letter in "Ii" else _NEXT_WORD).match(after)
        if word is None:
            # Not: the answer is a "red car".
            return letter not in "ai" or bool(_DELIMITED_SMALL.match(after)) or after.lstrip()[:1] in tuple(",;!?")
        if not wary:
            return True
        if letter in "Ii":
            return False
        following = word[1].lower()
        return following in _NO_NOUNS or (following in _VERBS and not name) or self._own_text(letter, after)

    def _own_text(self, letter: str, after: str) -> bool:
        """Whether the text of the letter's own option follows, or its beginning and no more."""
        # With articles, or an option "A man" would follow the first word of "A man".
        text = self.plain.get(letter, "")
        own, words = _words(text), _words(after[: 2 * len(text) + _CONTEXT])
        return bool(own) and (words[: len(own)] == own or (len(words) >= 3 and own[: len(words)] == words))

    def _denied(self, mention: _Mention) -> bool:
        if _DENIED_BEFORE.search(mention.before):
            return True
        if not _DENIED_AFTER.match(mention.after):
            return False
        return not any(self._own_text(letter, mention.after) for letter in mention.letters)

    def _known(self, mention: _Mention) -> bool:
        return mention.letters <= self.options.keys()

    def _said_elsewhere(self, mention: _Mention) -> bool:
        if _OPTION.search(mention.before):
            return True
        if not self._known(mention):
            return False
        right = _IS_RIGHT.match(mention.after) and _STANDS_FOR_OPTION.search(mention.before)
        if mention.bracketed or right:
            return True
        if mention.letters & self.names or (mention.small and mention.letters & {"A", "I"}) or not mention.clear:
            return False
        return bool(_CLAUSE_BEGINS.search(mention.before) or _SAID_TO_BE.search(mention.before))


def _span(start: str, end: str) -> tuple[float, float] | None:
    first, last = _seconds(start), _seconds(end)
    return (first, last) if first < last else None


def _seconds(time: str) -> float:
    numbers = [float(number) for number in re.findall(_NUMBER, time)]
    if re.match(r"\d+\s*m", time):
        return 60 * numbers[0] + sum(numbers[1:])
    seconds = 0.0
    for number in numbers:
        seconds = 60 * seconds + number
    return seconds


def _said(text: str) -> str:
    """Without reasoning, in plain characters. Reasoning that was cut off was followed by nothing."""
    plain = unicodedata.normalize("NFKC", text).translate(_PLAIN)
    answered = _REASONING_ENDS.split(_REASONING.sub(" ", plain))[-1]
    return _REASONING_BEGINS.split(answered)[0]


def _tokens(said: str) -> list[str]:
    words = _words(said)
    return [word for word in words if word not in _ARTICLES] or words


def _words(said: str) -> list[str]:
    return [re.sub("[',]", "", word) for word in _TOKEN.findall(said.casefold())]


def _places(words: Sequence[str], among: Sequence[str]) -> list[int]:
    """Where in a text these words begin."""
    return [at for at in range(len(among) - len(words) + 1) if words and among[at : at + len(words)] == words]


def _before(said: str, at: int) -> str:
    return said[max(0, at - _CONTEXT) : at]


def _unmarked(said: str) -> str:
    return _MARKUP.sub(" ", said).strip()


def _only(found: Set[str]) -> str | None:
    return next(iter(found)) if len(found) == 1 else None
