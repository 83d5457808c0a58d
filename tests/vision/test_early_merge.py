"""EarlyTom's first stage within a tower."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from spatiotoken.vision import early_merge
from spatiotoken.vision.early_merge import EarlyMerge, merged_frames, near_cosines, segment_lengths
from tests.vision.towers import applied, drawn, shape, through, tokens_of


def walk(frames: int, places: int, seed: int) -> Tensor:
    """``[T, N, 8]`` frames that change slowly, and now and then at once."""
    generator = torch.Generator().manual_seed(seed)
    steps = 0.4 * torch.randn(frames, places, 8, generator=generator)
    cuts = torch.rand(frames, generator=generator) < 0.1
    steps[0] += 2
    steps += 4 * cuts[:, None, None] * torch.randn(frames, places, 8, generator=generator)
    return steps.cumsum(dim=0)


def plain(frames: Tensor, similarity: float, decay: float, window: int) -> list[Tensor]:
    """The frames that the rule leaves, one by one."""

    def alike(a: int, b: int) -> float:
        return float(cosine_similarity(frames[a], frames[b], dim=-1).mean())

    segments, running = [[0]], 1.0
    for frame in range(1, len(frames)):
        running = decay * alike(segments[-1][0], frame) + (1 - decay) * running
        if running < similarity or len(segments[-1]) == window - 1:
            segments.append([frame])
            running = 1.0
        else:
            segments[-1].append(frame)
    left = []
    for first, *between, last in (segment if len(segment) > 1 else [*segment, -1] for segment in segments):
        left.append(frames[first])
        if len(between) > 1:
            ends, between = alike(first, last), between[:-1]
        while between:
            frame = between.pop(0)
            value = frames[frame]
            if between:
                near, after = alike(frame, frame + 1), alike(frame + 1, frame + 2)
                if near > ends and near > after:
                    share = near / (near + max(after, 0.0))
                    value = share * value + (1 - share) * frames[between.pop(0)]
            left.append(value)
        if last >= 0:
            left.append(frames[last])
    return left


@pytest.mark.parametrize("seed", range(16))
def test_follows_the_rule(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    total, places = [4, 5, 11, 30][seed % 4], [1, 6][seed // 4 % 2]
    frames = walk(total, places, seed)
    method = EarlyMerge(similarity=[0.3, 0.6, 0.9][seed % 3], window=[5, 6, 8][seed % 3])
    monkeypatch.setattr(early_merge, "_FRAMES", 3)
    tokens = tokens_of(frames.view(-1, 2, 4), (total, 1, places))
    merge = method.reduce(tokens)
    got = tokens.hidden if merge is None else applied(tokens, merge).hidden
    expected = torch.stack(plain(frames, method.similarity, method.decay, method.window))
    torch.testing.assert_close(got.view(-1, places, 8), expected)


def test_authors_results() -> None:
    """What the released code makes of nine frames of one patch, at 0.7 and a window of 6."""
    frames = torch.tensor([0.0, 10, 12, 20, 24, 60, 75, 80, 100]).deg2rad()
    frames = torch.stack([frames.cos(), frames.sin(), torch.zeros_like(frames), torch.zeros_like(frames)], dim=1)
    tokens = tokens_of(frames.view(-1, 2, 2), (9, 1, 1))
    merge = EarlyMerge(similarity=0.7).reduce(tokens)
    assert merge is not None
    theirs = [[1.0, 0.0], [0.9815, 0.1907], [0.9135, 0.4067], [0.5, 0.8660], [0.2588, 0.9659], [-0.1736, 0.9848]]
    torch.testing.assert_close(applied(tokens, merge).hidden[:, :2], torch.tensor(theirs), atol=1e-4, rtol=0)


def test_segments() -> None:
    still = [[1.0] * 4] * 11
    assert segment_lengths(still, 0.8, 0.9, 6) == [5, 5, 1]
    assert segment_lengths([[1.0] * 4], 0.8, 0.9, 6) == [1]
    # 0.5 * 0.5 + 0.5 stays above 0.7 once, then 0.5 * 0.5 + 0.5 * 0.75 does not.
    assert segment_lengths([[0.5] * 4] * 4, 0.7, 0.5, 6) == [2, 2]


def test_between() -> None:
    # Of five, 0 and 4 stay, 1 and 2 merge by 3 : 2, 3 goes to the more alike 4.
    cosines = [[0.5, 0.5, 0.5, 0.1], [0.6, 0, 0, 0], [0.4, 0, 0, 0], [0.9, 0, 0, 0], [0.0, 0, 0, 0]]
    left, owner, shares = merged_frames(cosines, [5])
    assert left == [0, 1, 4] and owner == [0, 1, 1, 2, 2]
    assert shares == pytest.approx([1, 0.6, 0.4, 0, 1])
    # Less alike than the ends: none merge. The last of those between goes to the one before, which is as alike.
    cosines[0][3], cosines[3][0] = 0.7, 0.4
    assert merged_frames(cosines, [5]) == ([0, 1, 2, 4], [0, 1, 2, 2, 3], [1, 1, 1, 0, 1])
    assert merged_frames(cosines, [3, 2]) == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [1] * 5)
    # Where the next pair points the other way, the first of a pair stays as it is.
    cosines[0][3], cosines[2][0] = 0.1, -0.4
    assert merged_frames(cosines, [5])[2] == [1, 1, 0, 0, 1]


def test_near_cosines() -> None:
    frames = walk(7, 3, 0)
    found = near_cosines(frames, 4)
    for first in range(7):
        for step in range(1, 5):
            there = first + step < 7
            expected = cosine_similarity(frames[first], frames[first + step], dim=-1).mean() if there else 0
            assert float(found[first, step - 1]) == pytest.approx(float(expected), abs=1e-6)


def test_whole_frames_through_all_layers() -> None:
    frames = walk(24, 4, 3)
    tokens = tokens_of(frames.view(-1, 2, 4), (24, 2, 2), depth=10)
    method = EarlyMerge(similarity=0.3)
    assert method.layers(tokens.tower) == (3, 6, 8)
    left, owner = through(method, tokens)
    assert set(left.counts) == {4} and len(left.counts) < 18
    assert torch.equal(left.places[owner] % 4, torch.arange(96) % 4)
    # First and last frames of the video always stay.
    assert left.places[0] == 0 and left.places[-1] == 95


def test_a_window_beyond_the_video(monkeypatch: pytest.MonkeyPatch) -> None:
    """Similarities are those of the frames that there are, however long a segment may be."""
    tokens = tokens_of(walk(9, 3, 4).view(-1, 2, 4), (9, 1, 3))
    reaches: list[int] = []

    def noted(frames: Tensor, reach: int) -> Tensor:
        reaches.append(reach)
        return near_cosines(frames, reach)

    monkeypatch.setattr(early_merge, "near_cosines", noted)
    merges = [EarlyMerge(similarity=0.0, window=window).reduce(tokens) for window in (10, 11, 10**9)]
    assert reaches == [8, 8, 8]
    for merge in merges:
        assert merge is not None and merges[0] is not None
        assert torch.equal(merge.assignment, merges[0].assignment)


def test_few_frames_stay() -> None:
    for frames in (1, 2, 3):
        assert EarlyMerge(similarity=0).reduce(drawn((frames, 2, 2), 0)) is None
    merge = EarlyMerge(similarity=0).reduce(tokens_of(torch.ones(16, 2, 3), (4, 2, 2)))
    assert merge is not None and merge.survivors.tolist() == [*range(8), *range(12, 16)]
    assert merge.assignment.tolist() == [*range(8), *range(4, 8), *range(8, 12)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_compares_in_float32(dtype: torch.dtype) -> None:
    frames = walk(12, 4, 5).to(dtype)
    got = EarlyMerge(similarity=0.2).reduce(tokens_of(frames.view(-1, 2, 4), (12, 2, 2)))
    expected = EarlyMerge(similarity=0.2).reduce(tokens_of(frames.float().view(-1, 2, 4), (12, 2, 2)))
    assert got is not None and expected is not None
    assert torch.equal(got.assignment, expected.assignment) and torch.equal(got.weights, expected.weights)


def test_nan_merges_nothing_by_likeness() -> None:
    tokens = tokens_of(torch.full((40, 2, 3), torch.nan), (10, 2, 2))
    merge = EarlyMerge().reduce(tokens)
    assert merge is not None and merge.counts == (4,) * 8  # of each five frames one goes, as always
    assert merge.weights is not None and merge.weights.unique().tolist() == [0, 1]


def test_layers() -> None:
    assert EarlyMerge().layers(shape(26)) == (7, 15, 21)  # behind 6, 14 and 20
    assert EarlyMerge().layers(shape(2)) == (1,) and EarlyMerge().layers(shape(1)) == (0,)
    assert EarlyMerge(similarity=1.0).layers(shape(26)) == ()
    assert EarlyMerge(behind=(0.0,)).layers(shape(4)) == (0,)
