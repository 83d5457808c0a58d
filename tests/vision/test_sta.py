"""STA within a tower."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spatiotoken.vision import sta
from spatiotoken.vision.base import TowerShape
from spatiotoken.vision.pairs import mean_keys
from spatiotoken.vision.sta import STA, accumulated, dullness, first_frame, sta_count
from tests.vision.pruners import attended, patches, plain_owners, through, without_values


def plain_sta(keys: Tensor, hidden: Tensor, going: int) -> list[list[int]]:
    """Which patches of each frame stay: the authors' rule in double precision, patch by patch.

    Args:
        keys: ``[T, n, d]`` in the order in which frames are gone through.
        hidden: ``[T, n, D]``.
    """
    unit = keys.double() / keys.double().norm(dim=-1, keepdim=True)
    places = range(keys.shape[1])
    best = {i: max((float(unit[0, i] @ unit[0, j]) for j in places[1::2]), default=0.0) for i in places[::2]}
    # Their list: odd patches, then even ones by rising similarity; what goes is its end.
    listed = [*places[1::2], *sorted(places[::2], key=lambda i: best[i])]
    stays = [sorted(listed[: len(listed) - going])]
    handing, scores = list(places), dict.fromkeys(places, 1.0)
    for frame in range(1, len(keys)):
        got = dict.fromkeys(places, 0.0)
        for before in handing:
            cosines = torch.stack([unit[frame, place] @ unit[frame - 1, before] for place in places])
            for place, share in enumerate(cosines.softmax(dim=0).tolist()):
                got[place] += share * scores[before]
        active = hidden[frame].double().abs().sum(dim=-1)
        active = (active - active.min()) / (active.max() - active.min())
        ranked = sorted(places, key=lambda place: got[place] * (1 - float(active[place])))
        handing = sorted(ranked[: len(ranked) - going])
        total = sum(got[place] for place in handing)
        scores = {place: got[place] / total for place in handing}
        stays.append(handing)
    return stays


@pytest.mark.parametrize("held", [1 << 25, 100])
@pytest.mark.parametrize("seed", range(8))
def test_follows_the_authors_rule(seed: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sta, "PAIRS", held)
    tokens = patches((1 + seed % 6, 3, 2 + seed % 3), seed)
    frames, places = len(tokens.counts), tokens.counts[0]
    keys, hidden = mean_keys(tokens), tokens.hidden.unflatten(0, (frames, -1))
    for going in (1, 2, places // 2, places - 1):
        kept = accumulated(torch.nn.functional.normalize(keys, dim=-1), dullness(hidden), places - going)
        assert [frame.nonzero()[:, 0].tolist() for frame in kept] == plain_sta(keys, hidden, going)


def test_by_hand() -> None:
    """Four patches in each of two frames; the second shows patches 0 and 1 of the first again."""
    axes = torch.eye(4)
    unit = torch.stack([axes, axes[[0, 1, 0, 1]]])
    # Handed on: softmax over (1, 0, 1, 0), (0, 1, 0, 1) and twice over (0, 0, 0, 0), so every patch gets 1.
    assert accumulated(unit, torch.tensor([[0.0] * 4, [0.1, 0.5, 0.4, 0.2]]), 2)[1].tolist() == [
        True,
        False,
        False,
        True,
    ]
    # Patches 2 and 3 of the first frame are alike, so one goes, and hands on nothing.
    first = torch.stack([axes[0], axes[1], axes[2], axes[2]])
    assert first_frame(first, 3).tolist() == [True, True, False, True]
    assert dullness(torch.tensor([[[3.0, -1.0], [0.0, 0.0], [-2.0, 0.0]]])).tolist() == [[0.0, 1.0, 0.5]]


def test_seen_patches_go() -> None:
    """What all patches of the frame before point at gets the most of their scores."""
    axes = torch.eye(3)
    unit = torch.stack([axes[[0, 0, 0]], axes[[1, 0, 2]], axes[[1, 0, 2]]])
    kept = accumulated(unit, torch.ones(3, 3), 2)
    assert kept[1].tolist() == [True, False, True], "the one that repeats goes"


@pytest.mark.parametrize(
    ("patches_", "retention"), [(196, 0.43), (16, 0.5), (729, 0.25), (9, 0.11), (1, 0.2), (5, 0.9)]
)
def test_budget(patches_: int, retention: float) -> None:
    for steps in (1, 2, 3, 5):
        counts = [patches_, *(sta_count(patches_, retention, step, steps) for step in range(steps))]
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] == max(1, int(patches_ * retention + 1e-9))
    # As with r = 64: 64, 32 and 16 of each of their 196, since groups of 1, 2 and 4 frames lose 64.
    assert [sta_count(196, 84 / 196, step, 3) for step in range(3)] == [132, 100, 84]


@pytest.mark.parametrize("grid", [(4, 4, 4), (5, 3, 5), (1, 6, 6), (3, 1, 1), (2, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_through_a_tower(grid: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens = patches(grid, 5, dtype=dtype)
    method = STA(retention=0.4)
    assert method.layers(tokens.tower) == (0, 2, 4)
    counts, rest, owner = through(method, tokens)
    places = grid[1] * grid[2]
    assert counts == [(sta_count(places, 0.4, step, 3),) * grid[0] for step in range(3)]
    assert rest.num_tokens == grid[0] * max(1, int(0.4 * places))
    again = through(method, tokens)
    assert torch.equal(again[1].places, rest.places) and torch.equal(again[2], owner)


def test_the_second_place_goes_backwards() -> None:
    tokens = patches((4, 3, 4), 1)
    method = STA(retention=0.5)
    count = sta_count(12, 0.5, 1, 3)
    found = method.reduce(replace(tokens, layer=2))
    keys, hidden = mean_keys(tokens), tokens.hidden.unflatten(0, (4, -1))
    expected = plain_sta(keys.flip(0), hidden.flip(0), 12 - count)[::-1]
    assert found is not None
    survivors = [place + 12 * frame for frame, stays in enumerate(expected) for place in stays]
    assert found.survivors.tolist() == survivors
    assert found.survivors[found.assignment].tolist() == plain_owners(tokens, survivors)


def test_equal_patches_and_what_is_not_a_number() -> None:
    tokens = patches((3, 2, 3), 0)
    states = attended(tokens)
    same = replace(tokens, hidden=torch.ones(18, 4), attention=replace(states, key=torch.ones_like(states.key)))
    first = STA(retention=0.5, at=(0.0,)).reduce(same)
    assert first is not None and first.survivors.tolist() == [1, 3, 5, 6, 7, 8, 12, 13, 14]
    broken = states.key.clone()
    broken[7] = torch.nan
    counts, _, _ = through(STA(retention=0.5), replace(tokens, attention=replace(states, key=broken)))
    assert counts[-1] == (3, 3, 3)


def test_the_host_never_waits() -> None:
    tokens, method = without_values(patches((4, 4, 4), 0, cls=False)), STA(retention=0.5)
    merge = method.reduce(replace(tokens, layer=method.layers(tokens.tower)[0]))
    assert merge is not None and merge.survivors.shape == (sum(merge.counts or ()),)


def test_keeps_everything() -> None:
    assert STA(retention=1.0).layers(TowerShape(12, tuple(range(12)), has_cls=False)) == ()
    assert STA().layers(TowerShape(12, (11,), has_cls=False)) == (0, 4, 8)
    assert STA().layers(TowerShape(1, (0,), has_cls=False)) == (0,)
