"""ATS within a tower."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spatiotoken.vision.ats import ATS, sampled, significance
from spatiotoken.vision.base import TowerShape, TowerTokens
from tests.vision.pruners import attended, frames_of, patches, plain_owners, through


def plain_significance(tokens: TowerTokens) -> list[list[float]]:
    """Of each frame's rows, in double precision, one voter at a time."""
    states, found = attended(tokens), []
    for frame, rows in enumerate(frames_of(tokens)):
        got = torch.zeros(len(rows), dtype=torch.float64)
        for head in range(states.key.shape[1]):
            keys = states.key[rows, head].double()
            voters = states.query[rows, head] if states.cls_query is None else states.cls_query[frame, head][None]
            for voter in voters.double():
                got += (keys @ voter * states.scale).softmax(dim=0) / len(voters)
        norms = states.value[rows].double().flatten(1).norm(dim=1)
        found.append((got * norms).tolist())
    return found


def plain_sampling(scores: list[float], count: int) -> set[int]:
    """Places nearest to the points of the cumulated scores, one point at a time: the authors' rule."""
    order = sorted(range(len(scores)), key=lambda place: scores[place])
    total, curve = 0.0, []
    for place in order:
        total += scores[place]
        curve.append(total)
    lowest, highest = curve[0], curve[-1]
    if highest == lowest:
        return {order[0]}
    curve = [(value - lowest) / (highest - lowest) for value in curve]
    start = min(value for value in curve if value > 0)
    points = [start + (1 - start) * step / (count - 1) for step in range(count)] if count > 1 else [1.0]
    return {order[min(range(len(curve)), key=lambda index: abs(curve[index] - point))] for point in points}


def ragged(seed: int, *, cls: bool = False, sharp: float = 1.0) -> TowerTokens:
    """Frames of 5, 1, 9 and 3 patches."""
    tokens = replace(patches((1, 3, 6), seed, sharp=sharp), counts=(5, 1, 9, 3), grid=(4, 3, 3))
    if not cls:
        return tokens
    query = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(seed)) * sharp
    return replace(tokens, attention=replace(attended(tokens), cls_query=query))


@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_significance(seed: int, cls: bool) -> None:
    for tokens in (patches((3, 3, 4), seed, cls=cls, sharp=3.0), ragged(seed, cls=cls, sharp=3.0)):
        rows, real = tokens.rows_by_frame()
        found = significance(attended(tokens), rows, real)
        for row, mask, expected in zip(found, real, plain_significance(tokens), strict=True):
            torch.testing.assert_close(row[mask], torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(30))
def test_follows_the_authors_rule(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (6,), generator=generator)
    real = torch.arange(40) < lengths[:, None]
    scores = torch.rand(6, 40, generator=generator) ** [1, 2, 4][seed % 3]
    for count in (1, 2, 7, 20, 40):
        found = sampled(scores, real, count)
        for row, mask, length in zip(found, scores, lengths.tolist(), strict=True):
            assert set(row.nonzero()[:, 0].tolist()) == plain_sampling(mask[:length].double().tolist(), count)


def test_by_hand() -> None:
    everything = torch.ones(1, 4, dtype=torch.bool)
    # Cumulated: 1, 2, 4, 8 of 8, so 0, 1, 3 and 7 of 7 from the first step on. Three points: 1, 4 and 7.
    scores = torch.tensor([[4.0, 1.0, 2.0, 1.0]])
    assert sampled(scores, everything, 3)[0].tolist() == [True, False, True, True]
    # Two points: the first step and the end.
    assert sampled(scores, everything, 2)[0].tolist() == [True, False, False, True]
    assert sampled(scores, everything, 1)[0].tolist() == [True, False, False, False]
    # One patch has it all: however many points, no other is near.
    assert sampled(torch.tensor([[0.0, 9.0, 0.0, 0.0]]), everything, 4)[0].tolist() == [False, True, False, False]
    # Nothing to choose by.
    assert sampled(torch.zeros(1, 4), everything, 3)[0].tolist() == [True, False, False, False]


def test_few_stay_where_few_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    even, peaked = torch.rand(1, 100, generator=generator) + 5, torch.rand(1, 100, generator=generator) ** 30
    real = torch.ones(1, 100, dtype=torch.bool)
    assert int(sampled(even, real, 50).sum()) > 45
    assert int(sampled(peaked, real, 50).sum()) < 15


def test_leaves_different_numbers() -> None:
    tokens = patches((3, 4, 5), 2, cls=True, sharp=6.0)
    points = 12
    expected = [plain_sampling(scores, points) for scores in plain_significance(tokens)]
    merge = ATS(retention=0.6).reduce(replace(tokens, layer=3))
    assert merge is not None and merge.counts == tuple(len(places) for places in expected)
    assert len(set(merge.counts)) > 1
    stays = [place + 20 * frame for frame, places in enumerate(expected) for place in sorted(places)]
    assert merge.survivors.tolist() == stays
    assert merge.survivors[merge.assignment].tolist() == plain_owners(tokens, stays)


@pytest.mark.parametrize("seed", range(4))
def test_ragged_frames(seed: int) -> None:
    tokens = ragged(seed, cls=seed % 2 == 0, sharp=3.0)
    points = 5  # of the 9 patches that a frame had
    expected = [plain_sampling(scores, points) for scores in plain_significance(tokens)]
    merge = ATS(retention=0.6).reduce(tokens)
    assert merge is not None and merge.counts == tuple(len(places) for places in expected)
    rows = frames_of(tokens)
    stays = [rows[frame][place] for frame, places in enumerate(expected) for place in sorted(places)]
    assert merge.survivors.tolist() == stays
    assert merge.survivors[merge.assignment].tolist() == plain_owners(tokens, stays)


@pytest.mark.parametrize("grid", [(4, 4, 4), (3, 3, 5), (1, 6, 6), (3, 1, 1), (2, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", [False, True])
def test_through_a_tower(grid: tuple[int, int, int], dtype: torch.dtype, cls: bool) -> None:
    tokens = patches(grid, 5, dtype=dtype, cls=cls, sharp=2.0)
    method = ATS(retention=0.5)
    counts, rest, owner = through(method, tokens)
    most = max(1, grid[1] * grid[2] // 2)
    assert all(1 <= count <= most for stage in counts for count in stage)
    again = through(method, tokens)
    assert torch.equal(again[1].places, rest.places) and torch.equal(again[2], owner)


def test_equal_patches_and_what_is_not_a_number() -> None:
    tokens = patches((2, 2, 4), 0)
    states = attended(tokens)
    same = torch.ones_like(states.key)
    merge = ATS(retention=0.5).reduce(replace(tokens, attention=replace(states, query=same, key=same, value=same)))
    # Cumulated evenly: the points are at 1, 3, 5 and 7 of 7.
    assert merge is not None and merge.survivors.tolist() == [1, 3, 5, 7, 9, 11, 13, 15]
    broken: Tensor = states.key.clone()
    broken[3] = torch.nan
    counts, _, _ = through(ATS(retention=0.5), replace(tokens, attention=replace(states, key=broken)))
    assert counts[-1][0] == 1 and 1 <= counts[-1][1] <= 4


def test_acts_where_whole_frames_are_seen() -> None:
    qwen = TowerShape(32, (7, 15, 23, 31), has_cls=False)
    assert ATS().layers(qwen) == (7, 15, 23)
    assert ATS(retention=1.0).layers(qwen) == ()
    assert ATS(retention=0.5, at=(0.0,)).layers(TowerShape(3, (2,), has_cls=False)) == (2,)
