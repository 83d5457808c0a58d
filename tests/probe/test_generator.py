"""Probe scenes are the same everywhere, their questions balanced, and their pictures show the answers."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from spatiotoken.probe.dataset import scene_seed
from spatiotoken.probe.draws import Draws
from spatiotoken.probe.questions import (
    COUNTS,
    DOT_BOX,
    LETTER_BOX,
    Question,
    all_questions,
    briefed_questions,
    evidence,
)
from spatiotoken.probe.render import render
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
    TEMPLATES,
    Briefs,
    Scenes,
    coverage,
    sample_scenes,
)

ROUND = 7 * 24  # so many samples have every answer of every template equally often
LENGTHS = (8, 9, 16, 33)
ADDITIVE = {"red": 0b100, "green": 0b010, "blue": 0b001, "yellow": 0b110, "purple": 0b101, "cyan": 0b011}


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return sample_scenes(0, torch.arange(ROUND))


@pytest.fixture(scope="module")
def videos(scenes: Scenes) -> Tensor:
    return render(scenes)


def asked(questions: list[Question], family: str) -> list[tuple[int, Question]]:
    """(row, question) of one family."""
    return [(row, question) for row, question in enumerate(questions) if question.family == family]


# The same everywhere.


def digest(seed: int, samples: list[int], num_frames: int) -> str:
    scenes = sample_scenes(seed, torch.tensor(samples), num_frames=num_frames)
    found = hashlib.sha256(render(scenes).numpy().tobytes())
    for questions in (briefed_questions(scenes), *all_questions(scenes)):
        for question in questions:
            found.update("|".join((question.family, question.text, question.answer, *question.options)).encode())
    return found.hexdigest()


@pytest.mark.parametrize(
    ("seed", "samples", "num_frames", "expected"),
    [
        (0, list(range(14)), 16, "e9443b570e63704a09492328da2d71efb6ca7dccae113139d8ee3e389401d570"),
        (5, [0, 1, 2, 3, 4, 5, 6, 1 << 40], 9, "7b8dc9730bebeb605f7213d3d5895723aba507e724ef3f2eb830f8a92be01636"),
    ],
)
def test_videos_and_questions_never_change(seed: int, samples: list[int], num_frames: int, expected: str) -> None:
    assert digest(seed, samples, num_frames) == expected


def test_a_sample_does_not_depend_on_its_batch() -> None:
    many, alone = sample_scenes(3, torch.arange(31, -1, -1)), sample_scenes(3, torch.tensor([5]))
    row = 31 - 5
    for field in fields(Scenes):
        value = getattr(alone, field.name)
        if isinstance(value, Tensor):
            assert torch.equal(value[0], getattr(many, field.name)[row]), field.name
    assert torch.equal(render(alone)[0], render(many)[row])
    assert briefed_questions(alone)[0] == briefed_questions(many)[row]
    assert all_questions(alone)[0] == all_questions(many)[row]


def test_other_seeds_and_samples_give_other_videos() -> None:
    videos = torch.cat([render(sample_scenes(seed, torch.arange(8), num_frames=8)) for seed in range(3)])
    assert len({video.numpy().tobytes() for video in videos}) == 24


# Draws.


def chi_square(values: Tensor, cells: int) -> float:
    counts = torch.bincount(values.flatten(), minlength=cells).double()
    assert len(counts) == cells
    mean = counts.mean()
    return ((counts - mean).square().sum() / mean).item()


def loose_bound(cells: int) -> float:
    """Six standard deviations above a chi-square variable's mean."""
    return cells - 1 + 6 * (2 * (cells - 1)) ** 0.5


@pytest.mark.parametrize("seed", [0, 1, -7, 1 << 62])
def test_integers_are_uniform_within_their_bounds(seed: int) -> None:
    draws = Draws(seed, torch.arange(20000))
    values = draws.integers("a", -3, 8, 5)
    assert values.shape == (20000, 5) and values.min() == -3 and values.max() == 7
    assert chi_square(values + 3, 11) < loose_bound(11)
    # Neither neighbouring samples nor positions nor names nor seeds tell anything of each other.
    first = values[:, 0] + 3
    for second in (first.roll(1), values[:, 1] + 3, draws.integers("b", 0, 11), other_seed(seed)):
        assert chi_square(first * 11 + second, 121) < loose_bound(121)


def other_seed(seed: int) -> Tensor:
    return Draws(seed + 1, torch.arange(20000)).integers("a", 0, 11)


def test_bounds_may_be_tensors() -> None:
    low = torch.arange(5000) % 50
    values = Draws(0, torch.arange(5000)).integers("a", low, low + 4)
    assert chi_square(values - low, 4) < loose_bound(4)


def test_chance_is_its_percentage() -> None:
    draws = Draws(0, torch.arange(20000))
    assert draws.chance("a", 30, 2).double().mean().item() == pytest.approx(0.3, abs=0.01)
    assert not draws.chance("a", 0).any() and draws.chance("a", 100).all()


def test_permutations_are_equally_likely() -> None:
    orders = Draws(0, torch.arange(20000)).permutations("a", 4)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(4).expand(20000, 4))
    numbers = (orders * torch.tensor([64, 16, 4, 1])).sum(dim=1)
    kinds, counts = numbers.unique(return_counts=True)
    assert len(kinds) == 24
    assert chi_square(torch.arange(24).repeat_interleave(counts), 24) < loose_bound(24)


# Ranges.


@pytest.mark.parametrize("num_frames", LENGTHS)
def test_everything_is_inside_picture_and_video(num_frames: int) -> None:
    scenes = sample_scenes(1, torch.arange(ROUND), num_frames=num_frames)
    boxes = scenes.boxes()
    shown = boxes.any(dim=-1)
    assert boxes.min() == 0 and boxes.max() <= SIDE
    assert (boxes[..., 2:] > boxes[..., :2])[shown].all()
    assert torch.equal(shown[:, : MAX_OBJECTS + 1], scenes.visible())
    there = torch.arange(MAX_OBJECTS) < scenes.count[:, None]
    assert torch.equal(shown[:, :MAX_OBJECTS].any(dim=-1), there)
    assert ((scenes.end <= num_frames) & (scenes.start >= 0)).all()
    assert scenes.num_frames == num_frames and len(scenes) == ROUND


@pytest.mark.parametrize("max_objects", [2, 3, 4])
def test_no_more_objects_than_asked_for(max_objects: int) -> None:
    scenes = sample_scenes(0, torch.arange(ROUND), num_frames=8, max_objects=max_objects)
    assert scenes.count.min() == 1 and scenes.count.max() == max_objects
    counts = Counter(question.answer for _, question in asked(briefed_questions(scenes), COUNTING))
    assert counts == dict.fromkeys(COUNTS[:max_objects], 24 // max_objects)


def test_what_is_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 8 frames, got 7"):
        sample_scenes(0, torch.arange(2), num_frames=7)
    for number in (1, 5):
        with pytest.raises(ValueError, match=f"2 to 4, got {number}"):
            sample_scenes(0, torch.arange(2), max_objects=number)


@pytest.mark.parametrize(
    ("box", "grid", "cells"),
    [
        ((0, 0, 8, 8), (8, 8), {(0, 0)}),
        ((4, 4, 12, 12), (8, 8), {(0, 0), (0, 1), (1, 0), (1, 1)}),  # a quarter of the box each
        ((7, 0, 15, 8), (8, 8), {(1, 0)}),  # an eighth of the box lies in the row above
        ((6, 56, 12, 62), (8, 8), {(0, 7), (1, 7)}),  # a third and two thirds
        ((6, 0, 15, 4), (8, 8), {(0, 0), (1, 0)}),  # two ninths and seven
        ((7, 0, 13, 6), (8, 8), {(1, 0)}),  # a sixth and five
        ((0, 0, 10, 10), (8, 8), {(0, 0), (0, 1), (1, 0)}),  # fills a quarter of the cells beside it
        ((0, 0, 9, 9), (8, 8), {(0, 0)}),  # and here an eighth
        ((0, 0, 64, 64), (2, 4), {(row, column) for row in range(2) for column in range(4)}),
        ((20, 30, 26, 36), (2, 4), {(0, 1), (0, 2)}),
        ((0, 0, 0, 0), (8, 8), set()),
    ],
)
def test_coverage(box: tuple[int, ...], grid: tuple[int, int], cells: set[tuple[int, int]]) -> None:
    found = coverage(torch.tensor([[box]]), grid)
    assert found.shape == (1, 1, *grid)
    assert {tuple(cell) for cell in found[0, 0].nonzero().tolist()} == cells


# Balance.


@pytest.mark.parametrize("rounds", [1, 3])
def test_every_template_has_every_answer_equally_often(rounds: int) -> None:
    briefs = Briefs.of(torch.arange(ROUND * rounds))
    for family, templates in TEMPLATES.items():
        for template in templates:
            answers = Counter(briefs.answer[briefs.asks(family, template)].tolist())
            assert len(set(answers.values())) == 1, (family, template)
            assert answers.total() * len(templates) == 24 * rounds


def test_answers_are_those_that_the_scenes_were_made_for(scenes: Scenes) -> None:
    names = {ATTRIBUTE: (COLOURS, SHAPES), MOTION: (DIRECTIONS,), ORDER: (COLOURS,) * 4, COUNTING: (COUNTS,)}
    names |= {SPATIAL: (("left", "right"), ("above", "below")), NEEDLE: (LETTERS,), DETAIL: (COLOURS,)}
    everything = all_questions(scenes)
    for row, question in enumerate(briefed_questions(scenes)):
        family = FAMILIES[scenes.briefs.family[row]]
        answers = names[family][scenes.briefs.template[row]]
        assert (question.family, question.answer) == (family, answers[scenes.briefs.answer[row]])
        assert question in everything[row]


def test_chance_is_one_in_so_many_options() -> None:
    scenes = sample_scenes(0, torch.arange(ROUND * 4), num_frames=8)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in briefed_questions(scenes):
        assert question.answer in question.options and len(set(question.options)) == len(question.options)
        neighbour = re.fullmatch(r".* just (after|before) the (\w+) (\w+)\?", question.text)
        if neighbour:
            assert set(question.options) == set(COLOURS) - {neighbour[2]}
        else:
            pattern = re.sub("|".join(COLOURS + SHAPES), "*", question.text)
            counts[pattern][question.answer] += 1
            assert counts[pattern].keys() <= set(question.options)
    assert len(counts) == 10
    for pattern, answers in counts.items():
        assert len(set(answers.values())) == 1, (pattern, answers)


@pytest.fixture(scope="module")
def readings() -> tuple[list[Question], list[Question]]:
    """Many questions of the train and test splits. Their text does not depend on the number of frames."""

    def read(split: str, rounds: int) -> list[Question]:
        parts = torch.arange(ROUND * rounds).split(ROUND * 24)
        return [q for p in parts for q in briefed_questions(sample_scenes(scene_seed(0, split), p, num_frames=8))]

    return read("train", 120), read("test", 48)


def whole_text(question: Question) -> list[str]:
    return [question.text]


def words(question: Question) -> list[str]:
    return [f"{place} {word}" for place, word in enumerate(question.text.split())]


@pytest.mark.parametrize("clues", [whole_text, words])
def test_text_does_not_tell_the_answer(
    readings: tuple[list[Question], list[Question]], clues: Callable[[Question], list[str]]
) -> None:
    """A guesser that has counted which answers go with a text, or with its words, does not beat chance."""
    train, test = readings
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in train:
        for clue in clues(question):
            counts[clue][question.answer] += 1
    gain: dict[str, list[float]] = defaultdict(list)
    for question in test:
        votes = {option: 1.0 for option in question.options}
        for clue in clues(question):
            seen = counts[clue]
            for option in question.options:
                votes[option] *= (seen[option] + 1) / (seen.total() + len(question.options))
        guess = max(question.options, key=votes.__getitem__)
        gain[question.family].append((guess == question.answer) - 1 / len(question.options))
    assert gain.keys() == set(FAMILIES)
    for family, gains in gain.items():
        assert abs(sum(gains) / len(gains)) < 0.03, family


# The right answers, found anew from what the scenes hold.


class Answerer:
    """Reads a question's text and answers it from where things are in the scene."""

    def __init__(self, scenes: Scenes, row: int) -> None:
        self.centre = scenes.centre[row]
        self.times = [shown.nonzero()[:, 0].tolist() for shown in scenes.visible()[row, :MAX_OBJECTS]]
        self.there = [slot for slot in range(MAX_OBJECTS) if self.times[slot]]
        self.colours = [COLOURS[scenes.colour[row, slot]] for slot in self.there]
        self.shapes = [SHAPES[scenes.shape[row, slot]] for slot in self.there]
        self.rest = {"Which letter flashes up?": LETTERS[scenes.letter[row]]}
        self.rest["What colour is the small dot?"] = COLOURS[scenes.dot_colour[row]]
        self.rest["How many coloured objects are there in all?"] = str(len(self.there))
        assert len(set(self.colours)) == len(set(self.shapes)) == len(self.there)

    def named(self, colour: str, shape: str) -> int:
        assert self.shapes[self.colours.index(colour)] == shape
        return self.colours.index(colour)

    def __call__(self, text: str) -> str:
        if text in self.rest:
            return self.rest[text]
        ways = {
            r"What colour is the (\w+)\?": lambda shape: self.colours[self.shapes.index(shape)],
            r"What shape is the (\w+) object\?": lambda colour: self.shapes[self.colours.index(colour)],
            r"Which way does the (\w+) (\w+) move\?": self.motion,
            r"What colour is the object that comes (first|last)\?": self.extreme,
            r"What colour is the object that comes just (after|before) the (\w+) (\w+)\?": self.neighbour,
            r"Is the (\w+) (\w+) (?:left or right of|above or below) the (\w+) (\w+)\?": self.spatial,
        }
        for pattern, way in ways.items():
            if found := re.fullmatch(pattern, text):
                if way == self.spatial:
                    return self.spatial(*found.groups(), axis=1 if "left" in text else 0)
                return way(*found.groups())
        raise AssertionError(text)

    def motion(self, colour: str, shape: str) -> str:
        slot = self.named(colour, shape)
        y, x = (self.centre[slot, self.times[slot][-1]] - self.centre[slot, self.times[slot][0]]).tolist()
        assert min(abs(y), abs(x)) == 0 and max(abs(y), abs(x)) >= MOTION_PIXELS
        return ("left" if x < 0 else "right") if x else ("up" if y < 0 else "down")

    def arrivals(self) -> list[int]:
        starts = [self.times[slot][0] for slot in self.there]
        assert len(set(starts)) == len(starts) >= 2
        return sorted(self.there, key=starts.__getitem__)

    def extreme(self, which: str) -> str:
        return self.colours[self.arrivals()[0 if which == "first" else -1]]

    def neighbour(self, which: str, colour: str, shape: str) -> str:
        order = self.arrivals()
        place = order.index(self.named(colour, shape)) + (1 if which == "after" else -1)
        assert place >= 0
        return self.colours[order[place]]

    def spatial(self, *names: str, axis: int) -> str:
        first, second = self.named(*names[:2]), self.named(*names[2:])
        shared = sorted(set(self.times[first]) & set(self.times[second]))
        gaps = self.centre[first, shared, axis] - self.centre[second, shared, axis]
        assert (gaps.sign() == gaps[0].sign()).all() and gaps.abs().min() >= SEPARATION
        before, behind = ("above", "below") if axis == 0 else ("left", "right")
        return before if gaps[0] < 0 else behind


@pytest.mark.parametrize("num_frames", LENGTHS)
def test_answers_are_right(num_frames: int) -> None:
    scenes = sample_scenes(2, torch.arange(ROUND), num_frames=num_frames)
    families: Counter[str] = Counter()
    for row, questions in enumerate(all_questions(scenes)):
        answerer = Answerer(scenes, row)
        assert len({question.text for question in questions}) == len(questions)
        for question in questions:
            assert answerer(question.text) == question.answer in question.options, (row, question)
            families[question.family] += 1
    assert min(families[family] for family in FAMILIES) > 50


# What the pictures show.


def hues(picture: Tensor) -> Tensor:
    """``[..., H, W]`` of a picture ``[..., 3, H, W]``: which of red, green and blue are strong, as bits; 0 where it is
    dull, as backgrounds, distractors, letters and edges are."""
    picture = picture.int()
    vivid = picture.amax(dim=-3) - picture.amin(dim=-3) > 90
    return ((picture > 125) * torch.tensor([4, 2, 1])[:, None, None]).sum(dim=-3) * vivid


def cut_out(picture: Tensor, box: Tensor) -> Tensor:
    top, left, bottom, right = box.tolist()
    return picture[..., top:bottom, left:right]


@pytest.mark.parametrize("num_frames", [16, 32, 64])
def test_a_needle_shows_in_one_frame(num_frames: int) -> None:
    scenes = sample_scenes(0, torch.arange(ROUND), num_frames=num_frames)
    boxes = scenes.boxes()
    found = asked(briefed_questions(scenes), NEEDLE)
    assert len(found) == 24
    for row, question in found:
        assert question.things == (LETTER_BOX,)
        assert evidence(boxes[row], question).any(dim=-1).sum() == 1


def test_evidence_is_where_and_when_the_question_says(scenes: Scenes) -> None:
    boxes = scenes.boxes()
    before = boxes.clone()
    for row, questions in enumerate(all_questions(scenes)):
        for question in questions:
            shown = evidence(boxes[row], question)
            start, end = question.frames
            assert torch.equal(shown[:, start:end], boxes[row, list(question.things), start:end])
            assert not shown[:, :start].any() and not shown[:, end:].any()
            assert shown.any(dim=-1).any(dim=-1).all()  # each of the things is seen
    assert torch.equal(boxes, before)


def test_letters_are_in_their_boxes(scenes: Scenes, videos: Tensor) -> None:
    boxes = scenes.boxes()
    inks = defaultdict(set)
    for row, question in asked(briefed_questions(scenes), NEEDLE):
        shown = evidence(boxes[row], question)[0]
        time = question.frames[0]
        plate = cut_out(videos[row, time], shown[time])
        border = torch.ones(plate.shape[1:], dtype=torch.bool)
        border[2:-2, 2:-2] = False
        assert plate[:, border].min() > 230
        inks[question.answer].add((plate.amax(dim=0) < 128).numpy().tobytes())
        for other in {max(time - 1, 0), min(time + 1, scenes.num_frames - 1)} - {time}:
            there = cut_out(videos[row, other], shown[time])
            assert (there[:, border].amin(dim=0) < 230).double().mean() > 0.5
    assert inks.keys() == set(LETTERS)
    assert len(set.union(*inks.values())) == len(LETTERS)  # each letter always looks the same, and no two alike


def test_dots_are_in_their_boxes(scenes: Scenes, videos: Tensor) -> None:
    boxes = scenes.boxes()
    for row, questions in enumerate(all_questions(scenes)):
        for _, question in asked(questions, DETAIL):
            assert question.things == (DOT_BOX,)
            shown = evidence(boxes[row], question)[0]
            assert shown.any(dim=-1).sum() == scenes.num_frames // 2
            for time in range(*question.frames):
                centre = shown[time] + torch.tensor([1, 1, -1, -1])
                if scenes.letter_frame[row] != time:
                    assert (hues(cut_out(videos[row, time], centre)) == ADDITIVE[question.answer]).all()


def test_objects_are_in_their_boxes(scenes: Scenes, videos: Tensor) -> None:
    boxes, colours = scenes.boxes(), hues(videos)
    for row in range(len(scenes)):
        for slot in range(scenes.count[row]):
            wanted = ADDITIVE[COLOURS[scenes.colour[row, slot]]]
            times = scenes.visible()[row, slot].nonzero()[:, 0].tolist()
            seen = [cut_out(colours[row, time], boxes[row, slot, time]) == wanted for time in times]
            assert sum(there.double().mean() > 0.15 for there in seen) >= len(times) / 2, (row, slot)


def test_colours_are_nowhere_but_in_boxes(scenes: Scenes, videos: Tensor) -> None:
    """Nothing but objects and dots is vivid, so without its evidence a video has no colour to answer with."""
    vivid = hues(videos) != 0
    boxes = scenes.boxes()
    rows, columns = torch.arange(SIDE)[:, None], torch.arange(SIDE)
    for slot in (*range(MAX_OBJECTS), DOT_BOX):
        top, left, bottom, right = boxes[:, slot, :, :, None, None].unbind(dim=2)
        vivid &= ~((top <= rows) & (rows < bottom) & (left <= columns) & (columns < right))
    assert not vivid.any()
