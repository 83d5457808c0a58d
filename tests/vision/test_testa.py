"""TESTA within a tower."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from spatiotoken.vision import pairs
from spatiotoken.vision.pairs import match_frames, mean_keys, merge_frames
from spatiotoken.vision.testa import TESTA, frame_layers, frames_and_patches
from spatiotoken.vision.tome import ToMe
from tests.vision.towers import drawn, shape, through, tokens_of


def plain_match(frames: Tensor, reduction: int) -> list[int]:
    """Which frame each of ``frames [T, N, d]`` goes to: the rule, one patch at a time."""
    unit = frames / frames.norm(dim=-1, keepdim=True)
    matched = []
    for even in range(0, len(frames), 2):
        votes: Counter[int] = Counter()
        for place in range(frames.shape[1]):
            alike = [(float(unit[even, place] @ unit[odd, place]), -odd) for odd in range(1, len(frames), 2)]
            if alike:
                votes[-max(alike)[1]] += 1
        if votes:
            partner = min(votes, key=lambda odd: (-votes[odd], odd))
            matched.append((-float((unit[even] * unit[partner]).sum()), even, partner))
    owner = list(range(len(frames)))
    for _, even, partner in sorted(matched)[:reduction]:
        owner[even] = partner
    return owner


@pytest.mark.parametrize("seed", range(12))
def test_frames_follow_the_rule(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = [2, 3, 5, 8][seed % 4]
    frames = torch.randn(total, 7, 5, generator=generator) + 2 * torch.randn(total, 1, 5, generator=generator)
    if seed % 2:
        monkeypatch.setattr(pairs, "_COSINES", 2 * total)  # few places at a time
    for reduction in range(total):
        left, goes = match_frames(frames, reduction)
        assert left[goes].tolist() == plain_match(frames, min(reduction, total // 2))
        assert left.shape[0] == total - min(reduction, total // 2)
        assert torch.equal(goes[left], torch.arange(left.shape[0]))


def test_patches_vote() -> None:
    """Two patches of frame 0 are most like frame 1, one is far more like frame 3: it goes to frame 1."""
    angles = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.3, 1.5], [2.0, 2.0, 2.0], [0.5, 0.5, 0.0]])
    keys = torch.stack([angles.cos(), angles.sin()], dim=-1)
    left, goes = match_frames(keys, 1)
    assert left[goes].tolist() == [1, 1, 2, 3]
    tokens = tokens_of(keys.flatten(0, 1)[:, None].repeat(1, 2, 1), (4, 1, 3))
    merge = merge_frames(tokens, mean_keys(tokens), 3)
    assert merge.survivors.tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 11] and merge.counts == (3, 3, 3)
    assert merge.assignment.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8] and merge.weights is tokens.sizes


def test_counts() -> None:
    # What the authors leave of 96 frames of 196 patches is 48 of 100.
    assert frames_and_patches(96, 196, 0.25, 0.5) == (48, 98)
    assert frames_and_patches(96, 196, 0.25, 0.0) == (96, 49) and frames_and_patches(96, 196, 0.25, 1.0) == (24, 196)
    assert frames_and_patches(1, 16, 0.25, 0.5) == (1, 4) and frames_and_patches(3, 1, 0.1, 0.5) == (1, 1)
    assert frames_and_patches(1, 16, 0.25, 1.0) == (1, 16) and frames_and_patches(5, 3, 0.1, 0.0) == (5, 1)
    for frames in (1, 2, 3, 7, 32):
        for patches in (1, 4, 9, 49):
            for retention in (0.01, 0.1, 0.25, 0.3, 0.5, 0.9, 1.0):
                for temporal in (0.0, 0.2, 0.5, 0.9, 1.0):
                    left, each = frames_and_patches(frames, patches, retention, temporal)
                    least = {0.0: frames, 1.0: patches}.get(temporal, 1)
                    assert 1 <= left <= frames and 1 <= each <= patches
                    assert left * each <= max(least, frames * patches * retention + 1e-6)


@pytest.mark.parametrize("temporal", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("retention", [0.02, 0.25, 0.6, 0.95])
@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 4, 4), (4, 4, 4), (7, 3, 3), (5, 1, 1), (2, 2, 3)])
@pytest.mark.parametrize("depth", [2, 3, 6])
def test_budget(temporal: float, retention: float, grid: tuple[int, int, int], depth: int) -> None:
    left, _ = through(TESTA(retention=retention, temporal=temporal), drawn(grid, 1, depth=depth))
    frames, patches = frames_and_patches(grid[0], grid[1] * grid[2], retention, temporal)
    assert left.counts == (patches,) * frames


def test_a_retention_of_almost_nothing_leaves_one() -> None:
    for retention in (1e-6, 1e-20, 1e-300):
        for temporal in (0.01, 0.5, 0.99):
            assert frames_and_patches(96, 196, retention, temporal) == (1, 1)
    left, owner = through(TESTA(retention=1e-20), drawn((4, 4, 4), 3))
    assert left.counts == (1,) and owner.unique().tolist() == [0]


def test_frames_first_then_patches() -> None:
    tokens, method = drawn((4, 4, 4), 2), TESTA(retention=0.25)
    first = method.reduce(tokens)
    assert first is not None and first.counts == (16, 16, 16)
    # Whole frames go, place by place.
    frame, place = first.survivors[first.assignment].div(16, rounding_mode="floor"), torch.arange(64) % 16
    assert torch.equal(first.survivors[first.assignment] % 16, place)
    assert (frame.view(4, 16) == frame.view(4, 16)[:, :1]).all()
    left, owner = through(method, tokens)
    assert left.counts == (8, 8) and owner.unique().shape[0] == 16


def test_without_time_it_is_tome() -> None:
    tokens = drawn((3, 4, 4), 4)
    for ours, theirs in zip(
        through(TESTA(retention=0.3, temporal=0), tokens), through(ToMe(retention=0.3), tokens), strict=True
    ):
        if isinstance(ours, Tensor):
            assert isinstance(theirs, Tensor) and torch.equal(ours, theirs)


def test_pictures_merge_patches_only() -> None:
    left, _ = through(TESTA(retention=0.25), drawn((1, 4, 4), 7))
    assert left.counts == (4,)
    assert TESTA(retention=0.25).reduce(drawn((1, 4, 4), 7)) is None  # a layer for frames


def test_ties_go_to_the_lowest_index() -> None:
    left, goes = match_frames(torch.ones(6, 2, 3), 2)
    assert left[goes].tolist() == [1, 1, 1, 3, 4, 5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_ranks_in_float32(dtype: torch.dtype) -> None:
    tokens = drawn((6, 2, 2), 5, dtype)
    assert tokens.attention is not None
    got, expected = TESTA().reduce(tokens), TESTA().reduce(tokens_of(tokens.attention.key.float(), tokens.grid))
    assert got is not None and expected is not None and torch.equal(got.assignment, expected.assignment)


def test_keeps_the_budget_among_nan() -> None:
    tokens = drawn((4, 4, 4), 6)
    assert tokens.attention is not None
    tokens.attention.key[3] = torch.nan
    assert through(TESTA(retention=0.25), tokens)[0].counts == (8, 8)


def test_layers() -> None:
    assert TESTA(retention=1.0).layers(shape(5)) == () and TESTA().layers(shape(3)) == (0, 1, 2)
    assert [frame_layers(depth, 0.5) for depth in (2, 3, 4, 27)] == [1, 2, 2, 14]
    assert frame_layers(4, 0.01) == 1 and frame_layers(4, 0.99) == 3
    assert frame_layers(1, 0.0) == 0 and frame_layers(1, 1.0) == 1
    with pytest.raises(ValueError, match="two layers"):
        TESTA().layers(shape(1))
