"""Neighbours in space and time, against masks written out pair by pair."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from spatiotoken.attention import PrefillInputs
from spatiotoken.attention.kernels.pattern import visible_pairs
from spatiotoken.attention.recall import seen_pairs
from spatiotoken.attention.yopo_neighbours import YOPONeighbours, neighbour_blocks, numbered_places
from tests.attention import attention_map, prefill_inputs, video_inputs

TEXT = [[-1, -1, -1, -1]]


def grid(
    frames: int, height: int, width: int, number: int = 0, newline: bool = False, stamp: int = 0
) -> list[list[int]]:
    """Places of a video, with a newline behind each row and ``stamp`` tokens of text before each later frame."""
    found: list[list[int]] = []
    for frame in range(frames):
        found += TEXT * (stamp if frame else 0)
        for row in range(height):
            found += [[number, frame, row, column] for column in range(width)] + TEXT * newline
    return found


PROMPTS = {
    "video": TEXT * 5 + grid(4, 3, 5) + TEXT * 6,
    "no text": grid(5, 4, 3),
    # The last newline is outside of the picture.
    "newlines": TEXT * 3 + grid(3, 3, 4, newline=True) + TEXT * 4,
    "time stamps": TEXT * 2 + grid(4, 3, 3, stamp=3) + TEXT * 2,
    # Pictures come before videos in the prompt, but are counted after them.
    "pictures": TEXT * 2 + grid(1, 4, 4, 2) + grid(1, 2, 3, 3) + TEXT * 5 + grid(3, 3, 3, 0) + TEXT,
    "pruned": TEXT * 3 + grid(5, 3, 4)[::3] + TEXT * 3,
    "text": TEXT * 20,
}


def prompt(name: str, heads: int = 4) -> PrefillInputs:
    places = torch.tensor(PROMPTS[name])
    return replace(prefill_inputs(len(places), heads=heads, kv_heads=heads // 2, dim=8), coordinates=places)


def is_near(one: list[int], other: list[int], numbers: dict[tuple[int, int], int], radius: int, frames: int) -> bool:
    between = numbers[one[0], one[1]] - numbers[other[0], other[1]]
    return 0 <= between <= frames and abs(one[2] - other[2]) <= radius and abs(one[3] - other[3]) <= radius


def expected(places: list[list[int]], radius: int, frames: int, block: int, *, idle: bool = False) -> Tensor:
    """``[L, L]`` bool, token by token: what each query sees."""
    length = len(places)
    visual = [number for number, place in enumerate(places) if place[0] >= 0]
    numbers: dict[tuple[int, int], int] = {}
    for number in visual:
        numbers.setdefault((places[number][0], places[number][1]), len(numbers))

    def standing_at(token: int) -> list[int] | None:
        before = [number for number in visual if number <= token]
        return places[before[-1]] if before else None

    def outside(token: int) -> bool:
        before, after = ([n for n in visual if n <= token], [n for n in visual if n >= token])
        return not before or not after or places[before[-1]][0] != places[after[0]][0]

    seen = torch.zeros(length, length, dtype=torch.bool)
    for first in range(0, length, block):
        queries = range(first, min(first + block, length))
        for start in range(0, first + 1, block):
            keys = range(start, min(start + block, length))
            text = any(map(outside, queries)) or any(map(outside, keys)) or first == start
            near = not idle and any(
                one is not None and other is not None and is_near(one, other, numbers, radius, frames)
                for one in map(standing_at, queries)
                for other in map(standing_at, keys)
            )
            if text or near:
                seen[queries.start : queries.stop, keys.start : keys.stop] = True
    for key, place in enumerate(places):
        if place[0] < 0:
            seen[:, key] = True
    return seen.tril()


@pytest.mark.parametrize("block", [1, 3, 4])
@pytest.mark.parametrize("radius, frames", [(0, 0), (1, 0), (1, 1), (2, 2), (0, 9), (9, 1), (9, 9)])
@pytest.mark.parametrize("name", PROMPTS)
def test_pattern_written_out(name: str, radius: int, frames: int, block: int) -> None:
    inputs = prompt(name)
    pattern = YOPONeighbours(radius=radius, frames=frames, block=block).pattern(inputs)
    assert pattern.blocks.shape[:2] == (1, 1) and not pattern.blocks.triu(1).any()
    found = visible_pairs(pattern, inputs.length, inputs.length)[0, 0]
    assert torch.equal(found, expected(PROMPTS[name], radius, frames, block))


def test_a_token_by_hand() -> None:
    """In blocks of one token: the middle of the third of four frames of 3 x 5."""
    inputs = prompt("video")
    pattern = YOPONeighbours(radius=1, frames=1, block=1).pattern(inputs)
    (keys,) = visible_pairs(pattern, inputs.length, inputs.length)[0, 0, 5 + 2 * 15 + 7].nonzero(as_tuple=True)
    text, before = [0, 1, 2, 3, 4], [row + column for row in (20, 25, 30) for column in (1, 2, 3)]
    assert keys.tolist() == [*text, *before, 36, 37, 38, 41, 42]


def test_frames_are_counted_over_all_grids() -> None:
    places = numbered_places(torch.tensor(PROMPTS["pictures"]))
    assert places[:, 0].tolist() == [0] * 2 + [1] * 16 + [2] * 11 + [3] * 9 + [4] * 9 + [5] * 10
    assert places[1].tolist() == [0, -1, -1] and places[24].tolist() == [2, 1, 2]
    near = neighbour_blocks(places, (6, 4, 4), 0, 1, 1)
    # The corners of the second picture and of the first, of the video's first frame and of the second picture.
    assert near[18, 2] and near[29, 18] and not near[29, 2]


def test_weights_are_on_what_is_seen() -> None:
    for name in ("video", "newlines", "time stamps"):
        inputs = prompt(name)
        method = YOPONeighbours(radius=1, frames=0, block=2, backend="gather")
        weights = attention_map(method, inputs)
        seen = expected(PROMPTS[name], 1, 0, 2)
        assert torch.equal(weights > 0, seen.expand(4, -1, -1))
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, inputs.length))
        assert method.attend(inputs).density == pytest.approx(seen.sum() / torch.ones_like(seen).tril().sum())


@pytest.mark.parametrize("name", PROMPTS)
def test_inactive_heads_see_no_other_pictures(name: str) -> None:
    inputs = replace(prompt(name), layer=1, depth=3)
    method = YOPONeighbours(radius=1, frames=1, block=2, inactive_heads=((0,), (1, 3), ()), backend="reference")
    found = visible_pairs(method.pattern(inputs), inputs.length, inputs.length)[0]
    near, idle = (expected(PROMPTS[name], 1, 1, 2, idle=idle) for idle in (False, True))
    assert torch.equal(found, torch.stack([near, idle, near, idle]))
    attended = method.attend(inputs)
    if name != "text":
        assert attended.output is not None and (attention_map(method, inputs) > 0).equal(seen_pairs(method, inputs))
    # A layer without idle heads has one pattern for all.
    assert method.pattern(replace(inputs, layer=2)).blocks.shape[1] == 1


def test_inactive_heads_must_fit_the_model() -> None:
    inputs = replace(prompt("video"), layer=1, depth=2)
    with pytest.raises(ValueError, match="describes 1 layers, the model has 2"):
        YOPONeighbours(inactive_heads=((0,),)).pattern(inputs)
    with pytest.raises(ValueError, match="names head 4 at layer 1, the model has 4"):
        YOPONeighbours(inactive_heads=((), (0, 4))).pattern(inputs)
    with pytest.raises(ValidationError, match="from 0"):
        YOPONeighbours(inactive_heads=((-1,),))


def test_a_radius_of_everything_is_dense() -> None:
    for name in PROMPTS:
        assert YOPONeighbours(radius=4, frames=8, block=2).attend(prompt(name)).output is None
    assert YOPONeighbours().is_dense(64, 0, 1) and not YOPONeighbours().is_dense(65, 0, 1)
    # One frame too few, and one row.
    inputs = video_inputs((4, 3, 3), before=0, after=0)
    assert YOPONeighbours(radius=2, frames=3, block=1, backend="gather").attend(inputs).density == 1
    assert YOPONeighbours(radius=2, frames=2, block=1, backend="gather").attend(inputs).density < 1
    assert YOPONeighbours(radius=1, frames=3, block=1, backend="gather").attend(inputs).density < 1


def test_text_alone_is_dense_and_long_videos_are_not() -> None:
    assert YOPONeighbours(block=4).attend(prefill_inputs(50)).output is None
    inputs = video_inputs((40, 4, 4), dim=8)
    attended = YOPONeighbours(radius=3, frames=1, block=16, backend="gather").attend(inputs)
    assert attended.output is not None and attended.density < 0.2
