"""The words before and after a letter, in lower case, by which models say that it is their answer, or is none."""

from __future__ import annotations

from typing import NamedTuple


class Cue(NamedTuple):
    """Regular expressions of what is said before a letter and after it.

    Attributes:
        certain: they tell only where the letter cannot be an article, a pronoun or a name.
    """

    before: str
    after: str = ""
    certain: bool = False


_GAP = r"[\s:=,(是为은는は-]*"
_FILLED_GAP = (
    rf"{_GAP}(?:\b(?:is|was|be|are|would|should|must|will|can|only|to|the|this|that|it|your|question|options?|choices?|"
    r"letters?|answer|correct|right|best|most|likely|probably|definitely|clearly|indeed|in|case|here|for|of|above|given"
    rf"|following|therefore|thus|hence)\b(?:'s)?{_GAP})*$"
)
_DELIMITED = r" ?(?:$|[\n.):,;/|=-])"

# "Final answer: B"
FINAL = Cue(rf"\bfinal (?:answer|choice|decision)\b{_FILLED_GAP}")
# "The answer is B", "I choose B", "So, B"
ANSWER = Cue(
    r"(?:\b(?:ans(?:wers?)?|(?:correct|right|best|appropriate|suitable|accurate|likely|matching) (?:option|choice)"
    r"|my (?:choice|guess|pick)|i(?:'d|'ll| would| will)? (?:choose|chose|select|pick|go (?:with|for)|say|guess|think"
    rf"|believe)|therefore|thus|hence|so)\b|(?:^|\n)a:|答[案え]|选择?|選択|정?답){_FILLED_GAP}"
)
# "B because it moves"
TEXT_BEGINS = Cue(r"^[\s()-]*$")
# "It turns left.\nB. a blue bus"
LINE_BEGINS = Cue(r"(?:^|\n)[\s()-]*$", _DELIMITED)
# "It shows option B"
OPTION = Cue(rf"(?:\b(?:option|choice|letter)\b|选项){_GAP}$")
# "I see a bus (B)"
BRACKETED = Cue(r"\(\s*$", _DELIMITED)
# "Of these, B is the best"
RIGHT = Cue(
    r"(?:^|[.!?:;,\n(]|\b(?:think|believe|that|option|choice|letter|because|but|say|and|while|whereas)\b)[\s(]*$",
    r"\)* (?:is|was|would be|seems|looks|appears)(?: to be)? (?:\w+ly |the |most )*"
    r"(?:correct|right|best|answer|true|accurate|appropriate|likely|suitable|only|one|option|choice)\b",
)
# "It is B", "It turns left. B"
STATED = Cue(
    rf"(?:^|[.!?:;,\n])[\s(]*$|\b(?:is|be|it's|that's|but|maybe|perhaps|probably|namely|means)\b{_FILLED_GAP}",
    certain=True,
)
# "A. a red car B. a blue bus"
LABEL = Cue(r"(?:^|[\s(])$", r" ?[.):]")
# "It is not B", but not "It is not red, so B"
DENIED_BEFORE = Cue(
    r"(?:\b(?:not|never|neither|nor|except|unlike|cannot|can't|whether|(?:tell|sure|know) if|rather than|instead of"
    r"|rul\w+ out|eliminat\w+|exclud\w+)\b|n't\b)"
    r"(?:(?!\b(?:but|so|therefore|thus|hence|because|since|however|although|though|and|which)\b)[^.!?;,:\n])*$"
)
# "B is wrong"
DENIED_AFTER = Cue(
    "",
    r"\)* (?:(?:both|all) )?(?:(?:is|are|was|were|seems?|looks?|would be|can be) (?:\w+ly |also |both )?"
    r"(?:not|wrong|incorrect|false|out|ruled|eliminated|excluded|unlikely|inaccurate)\b"
    r"|(?:(?:is|are|was|can|could|does|do)(?:n't| not)|cannot|can't)(?!\w))",
)
