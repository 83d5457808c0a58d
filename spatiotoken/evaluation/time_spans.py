"""Spans of time in a model's words."""

from __future__ import annotations

import re

from spatiotoken.evaluation.wording import plain

_NUMBER = r"\d+(?:\.\d+)?"
_SECONDS = rf"{_NUMBER}\s*s(?:e\w*)?\b"  # misspelt too: lmms-eval's prompt says "seonds"
_CERTAIN = (
    rf"\d+:\d{{2}}(?::\d{{2}})?(?:\.\d+)?|\d+\s*m(?:in(?:ute)?s?)?\s*(?:and\s*)?{_SECONDS}"
    rf"|\d+\s*min(?:ute)?s?\b|{_SECONDS}"
)
_TIME = rf"((?:{_CERTAIN}|{_NUMBER})(?![\d:]))"
_FIRST = rf"(?<![\w.:]){_TIME}"
_CERTAINLY = re.compile(rf"(?<![\w.:])(?:{_CERTAIN})(?![\d:])")
_SPANS = (
    re.compile(rf"{_FIRST}\s*(?:[-~]|to|until|till?|through)\s*{_TIME}|between\s+{_TIME}\s*and\s*{_TIME}"),
    re.compile(rf"\b(?:start|begin)\D{{0,200}}{_FIRST}.{{0,200}}?\b(?:end|finish|stop)\D{{0,200}}{_TIME}", re.DOTALL),
    re.compile(rf"\A\D*?{_FIRST}(?:[\s,;()]+|\s*and\s*){_TIME}\D*\Z"),
)
_HAPPENS = re.compile("start|end|happen")
_EXAMPLE = re.compile(r"\bexample\b\D*\Z")


def parse_span(text: str) -> tuple[float, float] | None:
    """The seconds from which to which something happens, or None.

    Times are seconds (``12.5``, ``3s``), ``m:ss``, ``h:mm:ss`` or ``1 min 5 s``. What counts is, in this order: the
    first two that are joined by a dash, "to" or the like, or by "and" after "between"; what is said to start and to end
    it; two with nothing but a comma or "and" between them; the only two that are certainly times. Lines with "start",
    "end" or "happen" come first, and times in the wrong order are swapped, as in lmms-eval's ``charades_sta``. A pair
    that follows "example" is the prompt's.
    """
    said = plain(text).lower()
    times = _joined_times(said) or _CERTAINLY.findall(said)
    if len(times) != 2:
        return None
    start, end = sorted(map(_seconds, times))
    return start, end


def _joined_times(said: str) -> list[str]:
    lines = sorted(re.split(r"[!?\n]", said), key=lambda line: not _HAPPENS.search(line))
    for pattern in _SPANS:
        for match in (match for part in (*lines, said) for match in pattern.finditer(part)):
            if not _EXAMPLE.search(match.string[: match.start()]):
                return [time for time in match.groups() if time]
    return []


def _seconds(time: str) -> float:
    numbers = [float(number) for number in re.findall(_NUMBER, time)]
    if re.match(r"\d+\s*m", time):
        return 60 * numbers[0] + sum(numbers[1:])
    seconds = 0.0
    for number in numbers:
        seconds = 60 * seconds + number
    return seconds
