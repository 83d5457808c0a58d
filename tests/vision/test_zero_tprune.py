"""Zero-TPrune within a tower."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spatiotoken.vision import pruning, zero_tprune
from spatiotoken.vision.base import TowerShape, TowerTokens
from spatiotoken.vision.zero_tprune import (
    ZeroTPrune,
    alike,
    importance,
    page_rank,
    voting_rounds,
    zero_tprune_count,
)
from tests.vision.pruners import attended, frames_of, patches, plain_owners, through, without_values


def plain_ranks(tokens: TowerTokens, rows: list[int], frame: int, rounds: int) -> list[float]:
    """Importance of some rows of a frame, in double precision, patch by patch."""
    states = attended(tokens)
    heads, count = states.key.shape[1], len(rows)
    squares, says = torch.zeros(heads, count, dtype=torch.float64), []
    for head in range(heads):
        keys = states.key[rows, head].double()
        votes = [1.0] * count
        for number in range(rounds):
            got = torch.zeros(count, dtype=torch.float64)
            for voter, row in enumerate(rows):
                got += votes[voter] * (keys @ states.query[row, head].double() * states.scale).softmax(dim=0)
            if number == 0 and states.cls_query is not None:
                got += count**0.5 * (keys @ states.cls_query[frame, head].double() * states.scale).softmax(dim=0)
            votes = got.tolist()
        scores = torch.tensor(votes, dtype=torch.float64) * count / sum(votes)
        says.append(0.01 <= float(((scores - 1) ** 2).mean()) <= 0.7)
        squares[head] = scores**2
    heard = squares[torch.tensor(says)] if any(says) else squares
    return heard.mean(dim=0).sqrt().tolist()


def plain_zero_tprune(tokens: TowerTokens, count: int, similar: float, rounds: int) -> tuple[list[int], int]:
    """Rows that stay, and how many of the others went for being alike: stage by stage, one row at a time."""
    keys = attended(tokens).key.double().mean(dim=1)
    unit = keys / keys.norm(dim=1, keepdim=True)
    stays, gone = [], 0
    for frame, rows in enumerate(frames_of(tokens)):
        going = min(int((len(rows) - count) * similar), len(rows) // 2)
        left = rows
        if going:
            ranks = plain_ranks(tokens, rows, frame, 1)
            order = sorted(range(len(rows)), key=lambda place: -ranks[place])
            half = -(-len(rows) // 2)
            upper, lower = [rows[i] for i in order[:half]], [rows[i] for i in order[half:]]
            lower.sort(key=lambda row: -max(float(unit[row] @ unit[other]) for other in upper))
            left = sorted({*rows} - {*lower[:going]})
            gone += going
        ranks = plain_ranks(tokens, left, frame, rounds)
        stays += sorted(left[i] for i in sorted(range(len(left)), key=lambda place: -ranks[place])[:count])
    return stays, gone


@pytest.mark.parametrize("held", [1 << 25, 40])
@pytest.mark.parametrize("seed", range(12))
def test_follows_the_rule(seed: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "PAIRS", held)
    monkeypatch.setattr(zero_tprune, "PAIRS", held)
    tokens = patches((1 + seed % 3, 3, 4 + seed % 2), seed, cls=seed % 2 == 0, sharp=[0.1, 1.0, 4.0][seed % 3])
    method = ZeroTPrune(retention=0.3, similar=[0.0, 0.5, 1.0][seed % 3], at=([0.1, 0.5, 0.8][seed % 3],))
    (layer,) = method.layers(tokens.tower)
    count = zero_tprune_count(tokens.counts[0], 0.3, 0, 1)
    stays, gone = plain_zero_tprune(tokens, count, method.similar, voting_rounds(layer, 6))
    assert (gone > 0) == (method.similar > 0)
    merge = method.reduce(replace(tokens, layer=layer))
    assert merge is not None and merge.counts == (count,) * len(tokens.counts)
    assert merge.survivors.tolist() == stays
    assert merge.survivors[merge.assignment].tolist() == plain_owners(tokens, stays)


def test_votes_by_hand() -> None:
    """Everybody looks at patch 0, which looks at patch 1: the chain has its end there."""
    key = 30 * torch.eye(3)[None, :, None]
    query = torch.eye(3)[[1, 0, 0]][None, :, None]
    # One round: patch 0 has two votes, patch 1 one. The next: 0 has that one, 1 those two.
    assert page_rank(query, key, None, 1.0, 1)[0].tolist() == pytest.approx([2, 1, 0], abs=1e-6)
    assert page_rank(query, key, None, 1.0, 2)[0].tolist() == pytest.approx([1, 2, 0], abs=1e-6)
    # The CLS token adds sqrt(3) to patch 2, which it looks at; all are scaled to a mean of 1.
    cls = torch.eye(3)[2][None, None]
    share = 3 / (3 + 3**0.5)
    expected = [2 * share, share, 3**0.5 * share]
    assert page_rank(query, key, cls, 1.0, 1)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_heads_that_say_too_little_or_too_much() -> None:
    even, some, much = torch.ones(4), torch.tensor([1.5, 0.5, 1.0, 1.0]), torch.tensor([4.0, 0.0, 0.0, 0.0])
    assert importance(torch.stack([even, some, much])[None])[0].tolist() == pytest.approx(some.tolist())
    assert importance(2 * torch.stack([even, some])[None])[0].tolist() == pytest.approx(some.tolist())
    both = importance(torch.stack([even, much])[None])[0]
    assert both.tolist() == pytest.approx([8.5**0.5, 0.5**0.5, 0.5**0.5, 0.5**0.5]), "all have a say where none is fit"


def test_alike_patches_go_from_the_less_important_half() -> None:
    keys = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.5, 0.5], [1.0, 0.05]]])
    ranks = torch.tensor([[5.0, 1.0, 4.0, 3.0, 2.0]])  # 0, 2 and 3 are above 4 and 1
    assert alike(ranks, keys, 1)[0].nonzero()[:, 0].tolist() == [4]
    assert alike(ranks, keys, 2)[0].nonzero()[:, 0].tolist() == [1, 4]
    equal = alike(torch.ones(2, 4), torch.ones(2, 4, 3), 1)
    assert equal.nonzero()[:, 1].tolist() == [2, 2], (
        "ties: the first two are the upper half, then the lowest index goes"
    )


def test_rounds_by_depth() -> None:
    assert [voting_rounds(layer, 12) for layer in range(12)] == [30] * 3 + [5] * 6 + [1] * 3


@pytest.mark.parametrize(("places", "retention"), [(196, 0.5), (16, 0.25), (729, 0.1), (1, 0.5), (7, 0.99)])
def test_budget(places: int, retention: float) -> None:
    for steps in (1, 2, 3):
        counts = [places, *(zero_tprune_count(places, retention, step, steps) for step in range(steps))]
        assert counts == sorted(counts, reverse=True) and counts[-1] == max(1, int(places * retention + 1e-9))


@pytest.mark.parametrize("grid", [(4, 4, 4), (3, 3, 5), (1, 6, 6), (3, 1, 1), (2, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", [False, True])
def test_through_a_tower(grid: tuple[int, int, int], dtype: torch.dtype, cls: bool) -> None:
    tokens = patches(grid, 5, dtype=dtype, cls=cls)
    method = ZeroTPrune(retention=0.3)
    assert method.layers(tokens.tower) == (1, 3, 4)
    counts, rest, owner = through(method, tokens)
    places = grid[1] * grid[2]
    assert counts == [(zero_tprune_count(places, 0.3, step, 3),) * grid[0] for step in range(3)]
    again = through(method, tokens)
    assert torch.equal(again[1].places, rest.places) and torch.equal(again[2], owner)


def test_equal_patches_and_what_is_not_a_number() -> None:
    tokens = patches((2, 2, 4), 0)
    states = attended(tokens)
    same = torch.ones_like(states.key)
    merge = ZeroTPrune(retention=0.5, at=(0.5,)).reduce(
        replace(tokens, layer=3, attention=replace(states, query=same, key=same))
    )
    # Of the lower half 4 and 5 go, then the lowest indices stay.
    assert merge is not None and merge.survivors.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    broken: Tensor = states.key.clone()
    broken[3] = torch.nan
    counts, _, _ = through(ZeroTPrune(retention=0.5), replace(tokens, attention=replace(states, key=broken)))
    assert counts[-1] == (4, 4)


def test_the_host_never_waits() -> None:
    tokens, method = without_values(patches((4, 4, 4), 0, cls=True)), ZeroTPrune(retention=0.5)
    merge = method.reduce(replace(tokens, layer=method.layers(tokens.tower)[0]))
    assert merge is not None and merge.survivors.shape == (sum(merge.counts or ()),)


def test_acts_where_whole_frames_are_seen() -> None:
    qwen = TowerShape(32, (7, 15, 23, 31), has_cls=False)
    assert ZeroTPrune().layers(qwen) == (7, 15, 23)
    tokens = patches((2, 4, 4), 2, tower=TowerShape(3, (2,), has_cls=False))
    counts, _, _ = through(ZeroTPrune(retention=0.5), tokens)
    assert counts == [(8, 8)]
    assert ZeroTPrune(retention=1.0).layers(qwen) == ()
