"""Questions about probe scenes, their answers, and where in the video these can be seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from spatiotoken.probe.scenes import (
    ATTRIBUTE,
    COLOURS,
    COUNTING,
    DETAIL,
    DIRECTIONS,
    FAMILIES,
    LETTERS,
    MAX_OBJECTS,
    MOTION,
    MOTION_PIXELS,
    NEEDLE,
    ORDER,
    SEPARATION,
    SHAPES,
    SIDE,
    SPATIAL,
    STILL,
    TEMPLATES,
    Scenes,
)

COUNTS = tuple(str(number + 1) for number in range(MAX_OBJECTS))
PLACE = "place"
_FROM_MIDDLE = 4  # pixels to the middle of the picture, for an object to be on one side of it
LETTER_BOX, DOT_BOX = MAX_OBJECTS + 1, MAX_OBJECTS + 2  # where `Scenes.boxes` has them


@dataclass(frozen=True)
class Question:
    """One question about one scene.

    Attributes:
        options: the answers that its text allows, all equally likely: chance is one in so many.
        things: rows of ``Scenes.boxes`` that show the answer, and ``frames`` the interval ``[start, end)`` in which
            they do.
    """

    family: str
    text: str
    answer: str
    options: tuple[str, ...]
    things: tuple[int, ...]
    frames: tuple[int, int]


def briefed_questions(scenes: Scenes) -> list[Question]:
    """For each scene the question that it was made for."""
    values = scenes.lists()
    families, templates = scenes.briefs.family.tolist(), scenes.briefs.template.tolist()
    answers = scenes.briefs.answer.tolist()
    found = []
    for row, (family, template) in enumerate(zip(families, templates, strict=True)):
        scene = _Scene(values, row, scenes.num_frames)
        name = FAMILIES[family]
        found.append(scene.ask(name, TEMPLATES[name][template], answers[row]))
    return found


def all_questions(scenes: Scenes) -> list[list[Question]]:
    """For each scene every question that it answers: what a model is trained on."""
    values = scenes.lists()
    return [_Scene(values, row, scenes.num_frames).everything() for row in range(len(scenes))]


def place_questions(scenes: Scenes) -> list[list[Question]]:
    """Easier questions that lead to those about relations and motion: on which side of the picture's middle an object
    is, or is in the first or last frame that shows it. They are for training alone."""
    values = scenes.lists()
    return [_Scene(values, row, scenes.num_frames).places() for row in range(len(scenes))]


def evidence(boxes: Tensor, question: Question) -> Tensor:
    """The boxes ``[things, T, 4]`` of a scene's ``Scenes.boxes`` that show the answer, empty in other frames."""
    shown = boxes[list(question.things)].clone()
    shown[:, : question.frames[0]] = 0
    shown[:, question.frames[1] :] = 0
    return shown


class _Scene:
    """One scene of a batch, as plain integers."""

    def __init__(self, values: dict[str, list], row: int, num_frames: int) -> None:
        self._values = {name: value[row] for name, value in values.items()}
        self._num_frames = num_frames

    def __getattr__(self, name: str) -> Any:
        return self._values[name]

    def ask(self, family: str, template: str, answer: int) -> Question:
        """The briefed question. The scene was made for ``answer``, which is only needed to choose between the two ways
        to ask a spatial question."""
        if family == ATTRIBUTE:
            return self._attribute(0, template)
        if family == MOTION:
            return self._motion(0)
        if family == ORDER:
            return self._order(template, self.after + (template == "before"))
        if family == COUNTING:
            return self._counting()
        if family == SPATIAL:
            axis = 1 if template == "horizontal" else 0
            lower_first = self.centre[0][self.start[0]][axis] < self.centre[1][self.start[1]][axis]
            first, second = (0, 1) if lower_first == (answer == 0) else (1, 0)
            return self._spatial(first, second, axis)
        if family == NEEDLE:
            return self._needle()
        return self._detail()

    def everything(self) -> list[Question]:
        objects = range(self.count)
        found = [self._attribute(slot, template) for slot in objects for template in TEMPLATES[ATTRIBUTE]]
        found += [self._motion(slot) for slot in objects if self._moves(slot)]
        found.append(self._counting())
        if self.sequential:
            found += [self._order("first", 0), self._order("last", 0)]
            found += [self._order("after", slot) for slot in range(self.count - 1)]
            found += [self._order("before", slot) for slot in range(1, self.count)]
        pairs = [(first, second) for first in objects for second in objects if first != second]
        found += [self._spatial(*pair, axis) for pair in pairs for axis in (0, 1) if self._apart(*pair, axis)]
        if self.letter_frame >= 0:
            found.append(self._needle())
        if self.dot_end > self.dot_start:
            found.append(self._detail())
        return found

    def places(self) -> list[Question]:
        found = []
        for slot in range(self.count):
            start, end = self._interval(slot)
            for axis, options in ((1, ("left", "right")), (0, ("above", "below"))):
                text = f"Is the {self._name(slot)} {options[0]} or {options[1]}"
                for tail, frames in (("", (start, end)), (" first", (start, start + 1)), (" last", (end - 1, end))):
                    from_middle = [self.centre[slot][time][axis] - SIDE // 2 for time in range(*frames)]
                    if max(from_middle) <= -_FROM_MIDDLE or min(from_middle) >= _FROM_MIDDLE:
                        answer = options[0 if from_middle[0] < 0 else 1]
                        found.append(Question(PLACE, f"{text}{tail}?", answer, options, (slot,), frames))
        return found

    def _moves(self, slot: int) -> bool:
        (y0, x0), (y1, x1) = self.centre[slot][self.start[slot]], self.centre[slot][self.end[slot] - 1]
        far = abs(y1 - y0) + abs(x1 - x0) >= MOTION_PIXELS
        return self.direction[slot] != STILL and far and 2 * (self.end[slot] - self.start[slot]) >= self._num_frames

    def _together(self, first: int, second: int) -> tuple[int, int]:
        return max(self.start[first], self.start[second]), min(self.end[first], self.end[second])

    def _apart(self, first: int, second: int, axis: int) -> bool:
        start, end = self._together(first, second)
        if end - start < self._num_frames // 4:
            return False
        gaps = [self.centre[first][t][axis] - self.centre[second][t][axis] for t in range(start, end)]
        return min(gaps) >= SEPARATION or max(gaps) <= -SEPARATION

    def _name(self, slot: int) -> str:
        return f"{COLOURS[self.colour[slot]]} {SHAPES[self.shape[slot]]}"

    def _interval(self, *slots: int) -> tuple[int, int]:
        return min(self.start[slot] for slot in slots), max(self.end[slot] for slot in slots)

    def _attribute(self, slot: int, template: str) -> Question:
        colour, shape = COLOURS[self.colour[slot]], SHAPES[self.shape[slot]]
        interval = self._interval(slot)
        if template == "colour":
            return Question(ATTRIBUTE, f"What colour is the {shape}?", colour, COLOURS, (slot,), interval)
        return Question(ATTRIBUTE, f"What shape is the {colour} object?", shape, SHAPES, (slot,), interval)

    def _motion(self, slot: int) -> Question:
        text = f"Which way does the {self._name(slot)} move?"
        return Question(MOTION, text, DIRECTIONS[self.direction[slot]], DIRECTIONS, (slot,), self._interval(slot))

    def _order(self, template: str, slot: int) -> Question:
        """What comes first or last of all, or just after or before the object in ``slot``."""
        things: tuple[int, ...]
        options: tuple[str, ...]
        if template in ("first", "last"):
            found = 0 if template == "first" else self.count - 1
            text, options, things = f"What colour is the object that comes {template}?", COLOURS, (found,)
        else:
            found = slot + 1 if template == "after" else slot - 1
            text = f"What colour is the object that comes just {template} the {self._name(slot)}?"
            options = tuple(colour for colour in COLOURS if colour != COLOURS[self.colour[slot]])
            things = (slot, found)
        return Question(ORDER, text, COLOURS[self.colour[found]], options, things, self._interval(*things))

    def _counting(self) -> Question:
        things = tuple(range(self.count))
        text = "How many coloured objects are there in all?"
        return Question(COUNTING, text, COUNTS[self.count - 1], COUNTS, things, self._interval(*things))

    def _spatial(self, first: int, second: int, axis: int) -> Question:
        options = ("above", "below") if axis == 0 else ("left", "right")
        start, end = self._together(first, second)
        lower = self.centre[first][start][axis] < self.centre[second][start][axis]
        tail = "" if axis == 0 else " of"
        text = f"Is the {self._name(first)} {options[0]} or {options[1]}{tail} the {self._name(second)}?"
        return Question(SPATIAL, text, options[0 if lower else 1], options, (first, second), (start, end))

    def _needle(self) -> Question:
        frames = (self.letter_frame, self.letter_frame + 1)
        return Question(NEEDLE, "Which letter flashes up?", LETTERS[self.letter], LETTERS, (LETTER_BOX,), frames)

    def _detail(self) -> Question:
        frames = (self.dot_start, self.dot_end)
        return Question(DETAIL, "What colour is the small dot?", COLOURS[self.dot_colour], COLOURS, (DOT_BOX,), frames)
