"""What happens in a probe video: objects, paths, times, a flashed letter and a small dot, in integers throughout.

Scenes are drawn in batches. Each is made for one question (its *brief*), whose right answer is fixed beforehand, so a
set of questions has every answer equally often; whatever else there is in a scene is drawn independently of it.
Directions and distances are those of the picture: a camera pan moves the background alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from spatiotoken.probe.draws import Draws

SIDE = 64
"""Height and width of a frame in pixels."""
FPS = 4.0

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
DIRECTIONS = ("left", "right", "up", "down")
LETTERS = ("A", "E", "H", "K", "O", "T", "X", "Z")
MAX_OBJECTS = 4

ATTRIBUTE, MOTION, ORDER, COUNTING, SPATIAL, NEEDLE, DETAIL = FAMILIES = (
    "attribute",
    "motion",
    "order",
    "counting",
    "spatial",
    "needle",
    "detail",
)
TEMPLATES = {
    ATTRIBUTE: ("colour", "shape"),
    MOTION: ("direction",),
    ORDER: ("first", "last", "after", "before"),
    COUNTING: ("objects",),
    SPATIAL: ("horizontal", "vertical"),
    NEEDLE: ("letter",),
    DETAIL: ("colour",),
}
NUM_ANSWERS = {ATTRIBUTE: 6, MOTION: 4, ORDER: 6, COUNTING: 4, SPATIAL: 2, NEEDLE: 8, DETAIL: 6}

GREY = len(COLOURS)  # colour index of distractors, which no question is about
STILL = len(DIRECTIONS)
_STEPS = ((0, -1), (0, 1), (-1, 0), (1, 0), (0, 0))  # (y, x) of each direction and of STILL
_SLOTS = MAX_OBJECTS + 1  # the last is for a distractor
_CANDIDATES = 16  # layouts that a scene is the best of
_CLEARANCE = 3  # pixels wanted between objects
SEPARATION = 10
"""Pixels between the centres of two objects, on one axis and at every moment, for one to be beside the other."""
MOTION_PIXELS = 14
"""A shorter way than this is not asked about."""
LETTER_HEIGHT, LETTER_WIDTH = 18, 14  # of the plate that a letter flashes on
DOT_SIDE = 6


@dataclass(frozen=True)
class Briefs:
    """The question that each sample is made for, as int64 ``[B]`` indices."""

    family: Tensor
    template: Tensor
    answer: Tensor

    @classmethod
    def of(cls, samples: Tensor, max_objects: int = MAX_OBJECTS) -> Briefs:
        """Families, their templates and answers take turns. Every family of the first ``7 * 24 * k`` samples has all
        its templates equally often, and every template all its answers."""
        family = samples % len(FAMILIES)
        turn = samples // len(FAMILIES)
        templates = samples.new_tensor([len(TEMPLATES[name]) for name in FAMILIES])[family]
        answers = samples.new_tensor([NUM_ANSWERS[name] for name in FAMILIES])
        answers[FAMILIES.index(COUNTING)] = max_objects
        return cls(family, turn % templates, turn // templates % answers[family])

    def asks(self, family: str, template: str | None = None) -> Tensor:
        wanted = self.family == FAMILIES.index(family)
        return wanted if template is None else wanted & (self.template == TEMPLATES[family].index(template))


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes. ``S`` slots hold the objects, in their order of appearance where they come one by one, and
    last the distractor. Intervals of frames are ``[start, end)``, empty for what is not there.

    Attributes:
        count: ``[B]`` objects without the distractor.
        sequential: ``[B]`` whether they appear one after another.
        colour, shape, radius, start, end, direction: ``[B, S]``; direction is ``STILL`` for what does not move.
        centre: ``[B, S, T, 2]`` pixels ``(y, x)``.
        letter, letter_frame: ``[B]``; letter_at ``[B, 2]`` is the plate's upper left corner.
        dot_colour, dot_start, dot_end: ``[B]``; dot_at ``[B, 2]`` likewise.
        cut: ``[B]`` first frame of the second background, ``T`` where there is none.
        pan: ``[B, 2]`` twice the pixels that the background moves from first to last frame.
        samples, seed: which draws the picture's texture and noise take.
        briefs: the questions they were made for.
        after: ``[B]`` the slot whose successor the brief of family ``order`` may ask for.
    """

    seed: int
    samples: Tensor
    briefs: Briefs
    count: Tensor
    sequential: Tensor
    colour: Tensor
    shape: Tensor
    radius: Tensor
    start: Tensor
    end: Tensor
    direction: Tensor
    centre: Tensor
    letter: Tensor
    letter_frame: Tensor
    letter_at: Tensor
    dot_colour: Tensor
    dot_start: Tensor
    dot_end: Tensor
    dot_at: Tensor
    cut: Tensor
    pan: Tensor
    after: Tensor

    @property
    def num_frames(self) -> int:
        return self.centre.shape[2]

    def __len__(self) -> int:
        return self.samples.shape[0]

    def visible(self) -> Tensor:
        """``[B, S, T]`` bool."""
        return _during(self.start, self.end, self.num_frames)

    def boxes(self) -> Tensor:
        """``[B, S + 2, T, 4]`` boxes ``(top, left, bottom, right)`` of all slots, the letter and the dot, in pixels and
        with exclusive ends; empty (all zero) where a thing does not show."""
        frames, device = self.num_frames, self.samples.device
        radius = self.radius[:, :, None, None]
        things = torch.cat([self.centre - radius, self.centre + radius + 1], dim=-1) * self.visible()[..., None]

        def plate(at: Tensor, height: int, width: int, start: Tensor, end: Tensor) -> Tensor:
            box = torch.cat([at, at + torch.tensor([height, width], device=device)], dim=-1)
            return (box[:, None] * _during(start, end, frames)[..., None])[:, None]

        letter = plate(self.letter_at, LETTER_HEIGHT, LETTER_WIDTH, self.letter_frame, self.letter_frame + 1)
        dot = plate(self.dot_at, DOT_SIDE, DOT_SIDE, self.dot_start, self.dot_end)
        return torch.cat([things, letter, dot], dim=1)

    def moments(self, first: Tensor, length: int) -> Scenes:
        """The ``length`` frames of each scene that begin with frame ``first [B]``."""
        time = first[:, None] + torch.arange(length, device=first.device)
        row = torch.arange(len(self), device=first.device)[:, None]
        shifted = {name: getattr(self, name) - first for name in ("letter_frame", "dot_start", "dot_end", "cut")}
        intervals = {name: getattr(self, name) - first[:, None] for name in ("start", "end")}
        return replace(self, centre=self.centre.transpose(1, 2)[row, time].transpose(1, 2), **shifted, **intervals)

    def lists(self) -> dict[str, list]:
        """All batched attributes as (nested) Python lists."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.tolist() for name, value in values.items() if isinstance(value, Tensor)}


def coverage(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """``[..., H, W]``: which cells of a frame's ``(H, W)`` grid show a box ``[..., 4]``: those that hold at least a
    fifth of the box, or a fifth of which the box fills."""
    height, width = grid
    # In units of 1 / H and 1 / W pixels, in which cells of any grid have whole sides.
    rows = _overlap(boxes[..., 0] * height, boxes[..., 2] * height, height)
    columns = _overlap(boxes[..., 1] * width, boxes[..., 3] * width, width)
    shared = rows[..., :, None] * columns[..., None, :]
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]) * height * width
    return (5 * shared >= area.clamp(max=SIDE * SIDE)[..., None, None]) & (shared > 0)


def _overlap(low: Tensor, high: Tensor, cells: int) -> Tensor:
    edges = torch.arange(cells + 1, device=low.device) * SIDE
    return (torch.minimum(high[..., None], edges[1:]) - torch.maximum(low[..., None], edges[:-1])).clamp(min=0)


def _during(start: Tensor, end: Tensor, frames: int) -> Tensor:
    time = torch.arange(frames, device=start.device)
    return (start[..., None] <= time) & (time < end[..., None])


def sample_scenes(seed: int, samples: Tensor, *, num_frames: int = 16, max_objects: int = MAX_OBJECTS) -> Scenes:
    """The scenes of those sample numbers (``[B]`` int64, of any size and order).

    Args:
        num_frames: at least 8.
        max_objects: at most 4 of them in a scene, at least 2; fewer make a first stage of training.

    Raises:
        ValueError: either is out of range.
    """
    if num_frames < 8:
        raise ValueError(f"a scene has at least 8 frames, got {num_frames}")
    if not 2 <= max_objects <= MAX_OBJECTS:
        raise ValueError(f"max_objects must be 2 to {MAX_OBJECTS}, got {max_objects}")
    draws = Draws(seed, samples)
    briefs = Briefs.of(samples, max_objects)
    order, spatial = briefs.asks(ORDER), briefs.asks(SPATIAL)

    least = 1 + (order | spatial).long()
    count = draws.integers("count", least, max_objects + 1)
    count = torch.where(briefs.asks(COUNTING), briefs.answer + 1, count)
    sequential = (order | (draws.chance("sequential", 25) & ~briefs.asks(MOTION) & ~spatial)) & (count > 1)
    start, end = _intervals(draws, count, sequential, briefs, num_frames)

    # `after` is asked about the slot that follows, and `before` about this one itself.
    after = draws.integers("after", torch.zeros_like(count), (count - 1).clamp(min=1))
    target = torch.where(briefs.asks(ORDER, "last"), count - 1, torch.zeros_like(count))
    target = torch.where(briefs.asks(ORDER, "after"), after + 1, target)
    target = torch.where(briefs.asks(ORDER, "before"), after, target)
    colour = _turned(
        draws.permutations("colour", len(COLOURS)), target, briefs.answer, order | briefs.asks(ATTRIBUTE, "colour")
    )
    shape = _turned(draws.permutations("shape", len(SHAPES)), target, briefs.answer, briefs.asks(ATTRIBUTE, "shape"))
    colour[:, MAX_OBJECTS] = GREY

    radius = draws.integers("radius", 6, 10, _SLOTS)
    direction = _directions(draws, briefs)
    centre = _paths(draws, briefs, direction, radius, start, end, num_frames)

    batch = samples.shape[0]
    has_letter = briefs.asks(NEEDLE) | draws.chance("letter", 60)
    letter = torch.where(briefs.asks(NEEDLE), briefs.answer, draws.integers("which letter", 0, len(LETTERS)))
    letter_frame = torch.where(has_letter, draws.integers("letter frame", 0, num_frames), -1)
    letter_at = torch.stack(
        [draws.integers("letter y", 1, SIDE - LETTER_HEIGHT), draws.integers("letter x", 1, SIDE - LETTER_WIDTH)], -1
    )
    has_dot = briefs.asks(DETAIL) | draws.chance("dot", 60)
    dot_colour = torch.where(briefs.asks(DETAIL), briefs.answer, draws.integers("dot colour", 0, len(COLOURS)))
    dot_start = draws.integers("dot start", 0, num_frames // 2 + 1)
    return Scenes(
        seed=seed,
        samples=samples,
        briefs=briefs,
        count=count,
        sequential=sequential,
        colour=colour,
        shape=shape,
        radius=radius,
        start=start,
        end=end,
        direction=direction,
        centre=centre,
        letter=letter,
        letter_frame=letter_frame,
        letter_at=letter_at,
        dot_colour=dot_colour,
        dot_start=dot_start,
        dot_end=torch.where(has_dot, dot_start + num_frames // 2, dot_start),
        dot_at=draws.integers("dot at", 2, SIDE - DOT_SIDE - 1, 2),
        cut=torch.where(draws.chance("cut", 30), draws.integers("cut at", 2, num_frames - 1), num_frames),
        pan=draws.integers("pan", -24, 25, 2) * draws.chance("pans", 40).view(batch, 1),
        after=after,
    )


def _turned(indices: Tensor, target: Tensor, wanted: Tensor, where: Tensor) -> Tensor:
    """Cut a permutation to the slots and turn all its values so that the target's is the wanted one, where asked for:
    no value is then likelier beside another."""
    size = indices.shape[1]
    turn = wanted - indices.gather(1, target[:, None])[:, 0]
    return ((indices + (turn * where)[:, None]) % size)[:, :_SLOTS].contiguous()


def _intervals(draws: Draws, count: Tensor, sequential: Tensor, briefs: Briefs, frames: int) -> tuple[Tensor, Tensor]:
    """``[B, S]`` first frames, and the frames after the last: one after another with short overlaps, or together, where
    some come late or leave early."""
    slots = torch.arange(_SLOTS, device=count.device)
    share = frames // count.clamp(min=1)
    jitter = draws.integers("jitter", 0, 1 + frames, _SLOTS) % (share // 2).clamp(min=1)[:, None]
    begin = slots * frames // count[:, None] + jitter * (slots > 0)
    overlap = draws.integers("overlap", 0, 1 + frames // 8, _SLOTS)
    following = (begin + overlap)[:, 1:]
    finish = torch.cat([following, torch.full_like(begin[:, :1], frames)], dim=1)
    finish = torch.where(slots == count[:, None] - 1, frames, finish).clamp(max=frames)

    always = briefs.asks(SPATIAL)[:, None] & (slots < 2)
    late = draws.chance("late", 20, _SLOTS) & ~always
    early = draws.chance("early", 20, _SLOTS) & ~always & ~late
    together_begin = draws.integers("come", 1, 1 + frames // 4, _SLOTS) * late
    together_finish = frames - draws.integers("leave", 1, 1 + frames // 4, _SLOTS) * early

    begin = torch.where(sequential[:, None], begin, together_begin)
    finish = torch.where(sequential[:, None], finish, together_finish)
    # The distractor comes and goes as it likes, in half of the scenes.
    begin[:, -1], finish[:, -1] = together_begin[:, -1], together_finish[:, -1]
    there = slots < count[:, None]
    there[:, -1] = draws.chance("distractor", 50)
    return begin * there, finish * there


def _directions(draws: Draws, briefs: Briefs) -> Tensor:
    direction = draws.integers("direction", 0, len(DIRECTIONS), _SLOTS)
    direction = torch.where(draws.chance("still", 30, _SLOTS), STILL, direction)
    direction[:, 0] = torch.where(briefs.asks(MOTION), briefs.answer, direction[:, 0])
    # Two objects that are to keep their places do not move along the axis that is asked about.
    for template, across in (("horizontal", 2), ("vertical", 0)):
        pair = draws.integers(template, across, across + 2, 2)
        asked = briefs.asks(SPATIAL, template)[:, None] & (direction[:, :2] != STILL)
        direction[:, :2] = torch.where(asked, pair, direction[:, :2])
    return direction


def _paths(
    draws: Draws, briefs: Briefs, direction: Tensor, radius: Tensor, start: Tensor, end: Tensor, frames: int
) -> Tensor:
    """``[B, S, T, 2]`` centres: of some random layouts the one in which objects hide each other least."""
    batch, device = direction.shape[0], direction.device
    fast = draws.chance("fast", 50, _SLOTS)
    distance = torch.where(
        fast, draws.integers("far", 28, 39, _SLOTS), draws.integers("near", MOTION_PIXELS + 2, 26, _SLOTS)
    )
    way = torch.tensor(_STEPS, device=device)[direction] * distance[..., None]  # [B, S, 2]
    low = radius[..., None] + 1 - way.clamp(max=0)
    high = SIDE - 1 - radius[..., None] - way.clamp(min=0)
    origin = draws.integers("origin", low[:, None], high[:, None], _CANDIDATES, _SLOTS, 2)
    time = torch.arange(frames, device=device)
    steps = (end - start - 1).clamp(min=1)[..., None]
    passed = torch.minimum((time - start[..., None]).clamp(min=0), steps)
    moved = way[:, :, None, :] * passed[..., None] // steps[..., None]  # [B, S, T, 2]
    centre = origin[:, :, :, None, :] + moved[:, None]

    first, second = torch.triu_indices(_SLOTS, _SLOTS, offset=1, device=device)
    visible = _during(start, end, frames)
    both = (visible[:, first] & visible[:, second])[:, None]
    apart = (centre[:, :, first] - centre[:, :, second]).abs().amax(dim=-1)
    lacking = (radius[:, first] + radius[:, second] + _CLEARANCE)[:, None, :, None] - apart
    cost = (lacking.clamp(min=0) * both).sum(dim=(2, 3))

    pair = centre[:, :, 0] - centre[:, :, 1]  # [B, K, T, 2]
    kept = torch.maximum(pair.amin(dim=2), (-pair).amin(dim=2))  # least distance, if it never changes sign
    for template, axis in (("horizontal", 1), ("vertical", 0)):
        short = (SEPARATION - kept[..., axis]).clamp(min=0)
        cost = cost + short * briefs.asks(SPATIAL, template)[:, None] * (1 << 16)
    best = cost.argmin(dim=1)
    return centre[torch.arange(batch, device=device), best]
