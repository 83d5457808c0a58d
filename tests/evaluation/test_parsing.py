"""What is read from a model's words."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from spatiotoken.evaluation.parsing import normalised, parse_option, parse_span, parse_yes_no

VEHICLES = ("a red car", "a blue bus", "a green bike", "a yellow boat")
WEARER = (  # as in EgoSchema, where C wears the camera
    "C is washing dishes.",
    "C cooks food in the kitchen.",
    "C picks up a card and puts it on the table.",
    "C cleans the floor with a man.",
    "C plays cards with B.",
)
ACTORS = ("A man walks a dog", "A woman runs", "A dog sleeps", "A cat eats")
DEEDS = ("picks up the red cup and washes it", "opens the door and leaves the room", "sits down")
CATS = ("cat", "black cat", "dog", "not visible")
TEN = tuple(f"thing {word}" for word in "one two three four five six seven eight nine ten".split())

# $ is the letter, % the small letter, # the option's text.
SHAPES = {
    "bare": ["$", "%", " $ ", "\n$\n", "$.", "$)", "$:", "$,", "$;", "$!", "%.", "%)", "- $", "> $"],
    "bracketed": ["($)", "(%)", "[$]", "{$}", "<$>", "($", "($).", "($):", '"$"', "'$'"],
    "marked up": ["**$**", "*$*", "__$__", "`$`", "<b>$</b>", "**($)**", "**$.** #", "$</s>", "$<|im_end|>"],
    "full width": ["（$）", "【$】", "$．", "$。", "$、"],
    "with text": ["$. #", "$) #", "$: #", "$ - #", "$ – #", "$, #", "$ #", "($) #", "($): #", "[$] #", "%. #", "%) #"],
    "crammed": ["$.#", "\n $. #", "$. #\n\nThe video shows it.", "$. #. The video shows it.", "**$. #**"],
    "label": ["Answer: $", "answer: %", "ANSWER: $", "Answer:$", "Answer ($)", "Ans: $", "Ans. $", "**Answer:** $"],
    "heading": ["### Answer\n$", "Answer = $", '{"answer": "$"}', "A: $\n", "ASSISTANT: $", "Response: $. #"],
    "the answer is": [
        "The answer is $",
        "The answer is $.",
        "the answer is %",
        "the answer is %.",
        "The answer is ($)",
        "The answer is: $",
        "The answer is:\n\n$",
        "The answer is **$**.",
        'The answer is "$".',
        "answer is: **($) #**",
        "The answer would be $.",
        "The answer to the question is $.",
        "My answer is $.",
        "The answer is $: #",
    ],
    "the best": [
        "The correct answer is ($) because it moves.",
        "The correct answer is: $. #",
        "The correct answer is option $.",
        "The correct option is $",
        "The right answer is $",
        "The best answer is $",
        "The best answer is: $",
        "Best answer: $",
        "Best answer: ($",
        "Best option: ($",
        "The most likely answer is $.",
        "My choice is $",
    ],
    "I": ["I choose $", "I'd choose option $", "I would go with $.", "I select ($)", "I think it is option $."],
    "I think": ["I think it's $", "I think the answer is $, since it moves.", "I believe $ is correct.", "It is $."],
    "option": ["Option $", "option %", "Option $ because it moves", "Option ($)", "Option $: #", "Letter $"],
    "option does": ["Option $ best describes the video.", "The video clearly shows option $.", "Option $ is correct."],
    "is right": [
        "$ is correct",
        "$ is the correct answer.",
        "($) is the best answer",
        "Of these, $ is the best option.",
    ],
    "because": ["$ because it moves", "$, because it moves", "$ since this is shown", "$\n\nIt is shown."],
    "therefore": ["So the answer is $.", "So, $.", "Therefore, $", "Thus the correct option is ($).", "Hence $."],
    "after words": ["It turns left. $", "It turns left.\n\n$", "Based on the video, $.", "Looking at it:\n$. #"],
    "reasoned": [
        "<think>A or C? A red car.</think> $",
        "<think>\nThe answer is A.\n</think>\n\n$",
        "The answer is A.</think>$",
        "<thinking>C</thinking>The answer is $",
        "<think>A</think><answer>$</answer>",
        "<answer> $. # </answer>",
    ],
    "boxed": [
        "\\boxed{$}",
        "$\\boxed{$}$".replace("$\\", "\\"),
        "\\boxed{\\text{$}}",
        "It is not A. \\boxed{\\textbf{($)}}",
    ],
    "final": ["Final answer: $", "**Final Answer**: ($)", "The answer is A? No. Final answer: $"],
    "other languages": ["答案是$", "答案：$", "正确答案是 $。", "选$", "选项$", "答えは$", "정답은 $입니다", "답: $"],
    "all listed": ["A. a\nB. b\nC. c\nD. d\n\nAnswer: $", "A. no\nB. no\nC. no\nD. no\nThe answer is $."],
    "text": ["#", "#.", '"#"', "It is #.", "There is # in the video.", "The answer is #.", "Answer: #"],
    "hesitant": [
        "I cannot see it well, but the answer is $.",
        "I'm not sure, but I think $.",
        "Sorry, the answer is $",
    ],
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("letter", "ABCD")
def test_shapes_of_answers(kind: str, letter: str) -> None:
    text = VEHICLES["ABCD".index(letter)]
    for shape in SHAPES[kind]:
        said = shape.replace("$", letter).replace("%", letter.lower()).replace("#", text)
        assert parse_option(said, VEHICLES) == letter, said


def test_that_is_more_than_forty_shapes() -> None:
    assert len({shape for shapes in SHAPES.values() for shape in shapes}) > 120


NOTHING = {
    "empty": ["", "   ", ".", "\n", "Answer:", "The answer is", "\\boxed{}", "<answer></answer>"],
    "refusal": [
        "I cannot tell.",
        "I cannot tell which option is correct.",
        "I'm sorry, but I can't see the video.",
        "As an AI, I can't watch videos.",
        "I am unable to determine the answer.",
        "It cannot be determined.",
        "There is not enough information.",
        "I cannot tell if it is a red car.",
        "I cannot tell whether the answer is B",
        "Please provide the video",
    ],
    "article": ["A man walks a dog", "A man is seen in the street.", "A person", "The answer is A man walking a dog"],
    "quoted article": ['The answer is a "car"', "Answer: A man is walking", "It's a car", "e.g. a car"],
    "pronoun": ["I", "I see a person", "I think so"],
    "beyond": ["E", "(E)", "E.", "E. a red car", "The answer is E.", "Option E", "Z"],
    "two letters": ["A or B", "A and C", "A, B", "A/B", "A & B", "(A) or (B)", "(A) and (C)", "A, B, or D", "a or b"],
    "two in words": ["both A and B", "Both A and C are correct.", "The answer is either A or B."],
    "two answers": ["It could be A or it could be B", "Which option is right, A, B, C or D?", "The answer is A or C."],
    "denied": ["not B", "It is not B", "The answer is not B", "It isn't B", "I don't think it is B", "B is wrong"],
    "more denied": [
        "Option B is not correct",
        "the answer cannot be B",
        "neither",
        "Neither A nor B",
        "B is incorrect.",
    ],
    "none or all": ["None of the above", "All of the above", "No", "Yes", "a red car and a blue bus", "not a blue bus"],
    "listed": [
        "A. a red car\nB. a blue bus\nC. a green bike\nD. a yellow boat",
        "A. a red car B. a blue bus C. a green bike D. a yellow boat",
        "The options are A, B, C, D.",
    ],
    "in words": ["He wears a T-shirt", "An X-ray", "C's hands", "the U.S. army", "in L.A. and D.C.", "ABCD", "Because"],
    "in names": ["Vitamin D is good", "John B. Smith", "Plan B works", "Player B wins the game", "He has 3 D glasses"],
    "only thought": ["<think>The answer is B", "<think>B</think>"],
    "other text": ["car", "The car", "a red", "a red carpet", "buses"],
}


@pytest.mark.parametrize("kind", NOTHING)
def test_what_says_nothing(kind: str) -> None:
    for said in NOTHING[kind]:
        assert parse_option(said, VEHICLES) is None, said


@pytest.mark.parametrize(
    ("options", "said", "letter"),
    [
        (VEHICLES, "B. a green bike", "B"),
        (VEHICLES, "A. a green bike", "A"),
        (VEHICLES, "(D) a red car", "D"),
        (VEHICLES, "B - I see a green bike", "B"),
        (VEHICLES, "It is not A, but C", "C"),
        (VEHICLES, "It is B, not A.", "B"),
        (VEHICLES, "The answer is B, and A is wrong.", "B"),
        (VEHICLES, "A is wrong. B is correct.", "B"),
        (VEHICLES, "It can't be A, so the answer is B.", "B"),
        (VEHICLES, "Not a red car but a blue bus", "B"),
        (VEHICLES, "B\n\nA. a red car\nB. a blue bus", "B"),
        (VEHICLES, "B. a blue bus\n\nA. a red car is not seen\nC. neither", "B"),
        # Names.
        (WEARER, "C", "C"),
        (WEARER, "(C)", "C"),
        (WEARER, "The answer is C", "C"),
        (WEARER, "C is correct", "C"),
        (WEARER, "C cooks food in the kitchen.", "B"),
        (WEARER, "Based on the video, C is washing dishes.", "A"),
        (WEARER, "C plays cards with B", "E"),
        (WEARER, "C. C picks up a card and puts it on the table.", "C"),
        (WEARER, "C C picks up a card and puts it", "C"),
        (WEARER, "B. C cooks food in the kitchen.", "B"),
        (WEARER, "D: C cleans", "D"),
        (WEARER, '{"answer": "C", "confidence": 0.9}', "C"),
        (WEARER, "C is cooking", None),
        (WEARER, "C's hands are wet", None),
        (WEARER, "It is C cleaning", None),
        (("Team A", "Team B"), "Team A", "A"),
        (("Team A", "Team B"), "It is Team B.", "B"),
        (("vitamin D", "vitamin C", "iron", "zinc"), "It is vitamin C.", "B"),
        # The article.
        (ACTORS, "A man walks a dog", "A"),
        (ACTORS, "A woman runs", "B"),
        (ACTORS, "The answer is A woman runs.", "B"),
        (ACTORS, "In the video a dog sleeps.", "C"),
        (ACTORS, "A. A woman runs", "A"),
        (ACTORS, "A A man walks a dog", "A"),
        (ACTORS, "A man runs", None),
        (VEHICLES, "a (red) bus", None),
        (ACTORS, "A man walks a dog and a woman runs", None),
        (DEEDS, "A picks up the red cup and", "A"),
        (DEEDS, "A person sits down", "C"),
        # The pronoun.
        (TEN, "I", "I"),
        (TEN, "(I)", "I"),
        (TEN, "I. thing nine", "I"),
        (TEN, "The answer is I.", "I"),
        (TEN, "I think it is J", "J"),
        (TEN, "I think it is thing two", "B"),
        (TEN, "I see nothing", None),
        (TEN, "I, too, wonder", None),
        (TEN, "I'm here", None),
        # Options that contain one another, or numbers, or words of refusal.
        (CATS, "a cat", "A"),
        (CATS, "It is a black cat.", "B"),
        (CATS, "a cat and a black cat", None),
        (CATS, "not a cat but a dog", "C"),
        (CATS, "It is not a black cat", None),
        (CATS, "The dog is not visible", None),
        (CATS, "not visible", "D"),
        (CATS, "cats", None),
        (("not moving", "moving"), "It is not moving.", "A"),
        (("He can't swim", "He swims"), "The man: he can’t swim.", "A"),
        (("Yes", "No", "Not sure"), "I'm not sure.", "C"),
        (("1", "2", "3"), "There are 3.", "C"),
        (("1", "2", "3"), "B. 3", "B"),
        (("1", "2", "3"), "3 cars and 2 buses", None),
        (("1", "2", "3"), "1.5", None),
        (("1.5", "15", "-1", "1"), "-1", "C"),
        (("0:12", "0:21"), "at 0:21", "B"),
        (("+", "-"), "-", "B"),
        (("same", "same", "other"), "same", None),
        # Yes and no.
        (("yes", "no"), "No, he does not.", "B"),
        (("yes", "no"), "Yes, there is no car.", "A"),
        (("yes", "no"), "yes or no", None),
        (("no", "yes"), "B", "B"),
        # Options that are letters, or have them.
        (("B", "A", "D", "C"), "A", "A"),
        (("X", "Y"), "The answer is Y", "B"),
        (("X", "Y"), "Y", "B"),
        (("the cat", "the dog", "Both A and B"), "Both A and B", "C"),
        (("the cat", "the dog", "Both A and B"), "C. Both A and B", "C"),
        (("A. a red car", "B. a blue bus"), "blue bus", "B"),
        (("A. a red car", "B. a blue bus"), "I think it's B", "B"),
        (("Left", "Right"), "The right answer is A", "A"),
    ],
)
def test_options_that_need_care(options: Sequence[str], said: str, letter: str | None) -> None:
    assert parse_option(said, options) == letter


def test_every_letter_can_be_said() -> None:
    options = [f"option number {number}" for number in range(26)]
    assert "".join(parse_option(f"({chr(65 + at)})", options) or "" for at in range(26)) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@pytest.mark.parametrize("count", [0, 27])
def test_there_must_be_options_and_letters_for_them(count: int) -> None:
    with pytest.raises(ValueError, match=f"expected 1 to 26 options, got {count}"):
        parse_option("A", ["thing"] * count)


@pytest.mark.parametrize(
    "words", ["A or B ", "not ", "The answer is A or B. ", "a man is a ", "1:", "(", "\n", "<|", "\\boxed{"]
)
def test_endless_repetition_is_read_too(words: str) -> None:
    said = words * 1000
    assert parse_option(said, VEHICLES) is None
    assert parse_span(said) is None
    assert parse_yes_no(said) is None


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        *((text, "yes") for text in ("yes", "Yes.", "**YES**", "Yes, there is no car.", "The answer is yes", "A. Yes")),
        *((text, "no") for text in ("no", "NO!", '"No"', "No, he says yes.", "I say no.", "No, I cannot see it.")),
        *((text, "yes") for text in ("<think>no</think>yes", "No doubt, yes", "Yes yes")),
        *((text, None) for text in ("", "maybe", "yesterday", "nothing", "yes or no", "Yes/No", "No and yes")),
        *((text, None) for text in ("It is yes. Or it is no.", "I have no idea", "I cannot say yes", "not sure")),
    ],
)
def test_yes_or_no(said: str, answer: str | None) -> None:
    assert parse_yes_no(said) == answer


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("A red car.", "red car"),
        ("  The   Red\ncar! ", "red car"),
        ("red, blue", "red blue"),
        ("The man’s T-shirt", "mans t shirt"),
        ("1.5 m at -3 °C", "1.5 m at -3 c"),
        ("10:30", "10:30"),
        ("1,000 people", "1000 people"),
        ("3-4", "3 4"),
        ("two", "two"),
        ("Ｒｅｄ", "red"),
        ("Café", "café"),
        ("**Yes**", "yes"),
        ("<think>red</think>blue", "blue"),
        ("The answer is \\boxed{a red car}.", "red car"),
        ("It is red. <answer>blue</answer>", "blue"),
        ("the", "the"),
        ("?!", ""),
        ("", ""),
    ],
)
def test_normalised(said: str, words: str) -> None:
    assert normalised(said) == words


@pytest.mark.parametrize(
    ("said", "span"),
    [
        # As lmms-eval's charades_sta reads them.
        ("12.5 - 20.1", (12.5, 20.1)),
        ("12.5-20.1", (12.5, 20.1)),
        ("12.5 – 20.1", (12.5, 20.1)),
        ("12.5 to 20.1", (12.5, 20.1)),
        ("3.2to7.8", (3.2, 7.8)),
        ("12.5s - 20.1s", (12.5, 20.1)),
        ("from 3s to 7 seconds", (3, 7)),
        ("The event happens in the 24.3 - 30.4 seconds.", (24.3, 30.4)),
        ("The event 'person turn a light on' happens in the 24.3 - 30.4 seonds.", (24.3, 30.4)),
        ("The event 'person 2 opens 1 door' happens in the 5.0 - 9.0 seconds", (5, 9)),
        ("0 - 5.2", (0, 5.2)),
        ("0:12 to 1:05", (12, 65)),
        ("00:12 - 01:05", (12, 65)),
        ("00:00:18 - 00:00:23", (18, 23)),
        ("1:02:03 - 1:02:10", (3723, 3730)),
        ("The event starts at 00:00:18 and ends at 00:00:23.", (18, 23)),
        ("Starting time: 0.8 seconds\nEnding time: 1.1 seconds", (0.8, 1.1)),
        ("start time: 00:03\nend time: 00:09", (3, 9)),
        ("24.3 - 30.4 seconds, or 40.0 - 45.0 seconds", (24.3, 30.4)),
        ("1 - 2\nThe event happens in 3.0 - 4.0 seconds.", (3, 4)),
        ("A specific example is : 20.8 - 30.0 seconds. The event happens in 3.0 - 4.0 seconds", (3, 4)),
        # As it does not.
        ("From 3.5 seconds to 7.25 seconds", (3.5, 7.25)),
        ("24.3 seonds - 30.4 seonds", (24.3, 30.4)),
        ("[12.5, 20.1]", (12.5, 20.1)),
        ("(12.5, 20.1)", (12.5, 20.1)),
        ("12.5, 20.1", (12.5, 20.1)),
        ("<12.5><20.1>", (12.5, 20.1)),
        ('{"start": 3.0, "end": 7.5}', (3, 7.5)),
        ("between 3 and 7 seconds", (3, 7)),
        ("The start time for this event is 0 seconds, and the end time is 12 seconds.", (0, 12)),
        ("It begins at 2.0s and finishes at 4.5s.", (2, 4.5)),
        ("He comes in at 3 s and is gone at 7 s", (3, 7)),
        ("1 min 5 s to 1 minute 20 seconds", (65, 80)),
        ("1m5s - 1m20s", (65, 80)),
        ("1 minute to 2 minutes", (60, 120)),
        ("0:12.5 - 0:20.1", (12.5, 20.1)),
        ("**3.2 - 7.8**", (3.2, 7.8)),
        ("<think>0 - 1</think>3.2 ～ 7.8", (3.2, 7.8)),
        # In the wrong order.
        ("20.1 - 12.5", (12.5, 20.1)),
        ("1:05 to 0:12", (12, 65)),
        ("The event starts at 9.5 seconds and ends at 4 seconds.", (4, 9.5)),
        ("5 - 5", (5, 5)),
        # No span.
        *((text, None) for text in ("", "no", "3", "at 24.3 seconds", "12.5 -", "The video is 30 seconds long")),
        *((text, None) for text in ("1, 2, 3", "frame 12 to frame 20", "frames 1, 2 and 3")),
    ],
)
def test_spans(said: str, span: tuple[float, float] | None) -> None:
    found = parse_span(said)
    assert found == (None if span is None else pytest.approx(span))
