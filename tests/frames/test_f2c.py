"""F2C: peaks, anchors and clips by hand, and the budget of tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spatiotoken.frames.f2c import F2C, anchor_frames, clip_lengths, common_scale, growing_clips, peaks
from spatiotoken.structures import FrameChoice, Frames


def select(method: F2C, relevance: Tensor, features: Tensor | None = None) -> FrameChoice:
    if features is None:
        features = torch.eye(relevance.shape[0])
    return method.select(Frames(torch.arange(relevance.shape[0]).double(), features, relevance=relevance))


def test_peaks_lie_between_valleys() -> None:
    assert peaks(torch.tensor([0.0, 2, 1, 3, 3, 0, 5, 6])) == [1, 3, 7]
    assert peaks(torch.tensor([3.0, 2, 1])) == [0]
    assert peaks(torch.tensor([1.0, 2, 3])) == [2]
    assert peaks(torch.tensor([1.0])) == [0]
    assert peaks(torch.tensor([1.0, 2.0])) == [1]
    assert peaks(torch.full((5,), 0.3)) == [0, 1, 2, 3]


def test_anchors_are_the_best_of_clusters_in_time() -> None:
    relevance = torch.zeros(100)
    relevance[[2, 5, 8, 70, 75, 90]] = torch.tensor([0.3, 0.5, 0.4, 0.9, 0.9, 0.1])
    # Flat stretches are valleys all along, and their frames peaks of no relevance; these lose to any real one.
    assert anchor_frames(relevance, 2) == [5, 70]
    waves = torch.tensor([0.0, 1, 0, 2, 0, 0.5, 0, 3, 0])
    assert anchor_frames(waves, 4) == [1, 3, 5, 7]
    assert anchor_frames(waves, 1) == [7]
    spread = anchor_frames(torch.full((64,), 0.2), 4)
    assert len(spread) == 4 and [index // 16 for index in spread] == [0, 1, 2, 3]


def test_clips_grow_to_both_sides_and_stay_inside() -> None:
    assert growing_clips([0, 5, 9], 10, 4).tolist() == [[0, 1, 2, 3], [5, 6, 4, 7], [9, 8, 7, 6]]
    for total in (2, 3, 7):
        for anchor in range(total):
            order = growing_clips([anchor], total, total)[0]
            assert order[0] == anchor and order.sort().values.tolist() == list(range(total))
            for length in range(1, total + 1):
                clip = order[:length].sort().values
                assert clip[-1] - clip[0] == length - 1, "no gap"


def test_the_length_of_a_clip() -> None:
    order = growing_clips([4, 12], 16, 4)
    relevance = torch.full((16,), 0.5)
    same, different = torch.ones(16, 8), torch.eye(16)
    assert clip_lengths(same, relevance, order, 0.0, 0.05).tolist() == [4, 4], "longer is better"
    assert clip_lengths(different, relevance, order, 0.5, 0.0).tolist() == [4, 4], "what is new is not redundant"
    relevance[[3, 5, 6]] = 0.1
    assert clip_lengths(same, relevance, order[:1], 0.5, 0.0).tolist() == [1], "nothing but relevance counts"
    assert clip_lengths(same, relevance, order, 0.5, 0.05).tolist() == [1, 4]
    # Relevance 0.9, 0.9, 0.1 in the order of growth: two frames are worth 0.9 + 0.2 * 2/3, three 0.63 + 0.2.
    relevance = torch.tensor([0.1, 0.9, 0.9, 0.1])
    assert clip_lengths(same[:4], relevance, growing_clips([1], 4, 3), 0.0, 0.2).tolist() == [2]
    assert clip_lengths(torch.zeros(16, 8), torch.zeros(16), order, 0.5, 0.05).tolist() == [4, 4]


def test_overlapping_clips_merge() -> None:
    relevance = torch.zeros(40)
    relevance[10:15] = torch.tensor([0.5, 1.0, 0.5, 1.0, 0.5])
    relevance = relevance - 1e-3 * (torch.arange(40) - 12).abs()
    assert anchor_frames(relevance, 8) == [11, 13]
    choice = select(F2C(num_frames=8, full_frames=2, reward=5.0), relevance)
    # Four frames about each: 10..13 and 12..15.
    assert choice.indices == (10, 11, 12, 13, 14, 15)
    assert choice.scales is not None and choice.scales[0] == pytest.approx((2 / 6) ** 0.5)


@pytest.mark.parametrize("total", [1, 2, 5, 31, 300])
@pytest.mark.parametrize(("num_frames", "full_frames"), [(1, 1), (2, 1), (128, 32), (16, 300), (1000, 7), (300, 299)])
def test_tokens_never_exceed_the_budget(total: int, num_frames: int, full_frames: int) -> None:
    generator = torch.Generator().manual_seed(total)
    relevance, features = torch.rand(total, generator=generator), torch.randn(total, 8, generator=generator)
    for curve in (relevance, relevance.sort().values, torch.zeros(total), relevance.cumsum(0).sin()):
        choice = select(F2C(num_frames=num_frames, full_frames=full_frames), curve, features)
        scales = choice.scales or (1.0,) * len(choice.indices)
        assert 1 <= len(choice.indices) <= num_frames
        assert len(set(scales)) == 1 and sum(scale**2 for scale in scales) <= full_frames
        assert sum(scale**2 for scale in scales) >= min(full_frames, len(scales)) * (1 - 1e-6), "and use it"
        if total <= num_frames:
            assert choice.indices == tuple(range(total))


def test_the_scale() -> None:
    assert common_scale(4, 4) == common_scale(3, 4) == 1.0
    assert common_scale(16, 4) == pytest.approx(0.5)
    for kept in range(1, 4000, 7):
        for full in (1, 3, 32, 999):
            assert sum([common_scale(kept, full) ** 2] * kept) <= max(full, kept if kept <= full else 0)


def test_without_room_for_clips_the_anchors_are_kept() -> None:
    relevance = torch.tensor([0.0, 1, 0, 2, 0, 0.5, 0, 3, 0])
    choice = select(F2C(num_frames=4), relevance)
    assert choice.indices == (1, 3, 5, 7) and choice.scales is None
    assert select(F2C(num_frames=9), relevance).scales is None
