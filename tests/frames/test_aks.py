"""AKS: the authors' vectors, how parts are halved, and budgets that do not divide."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spatiotoken.frames.aks import AKS, aks_keyframes, aks_segments
from spatiotoken.structures import Frames
from tests.vectors import cases


def frames(relevance: Tensor) -> Frames:
    return Frames(torch.arange(relevance.shape[0]).double(), relevance=relevance)


def test_authors_results() -> None:
    for hyper, tensors in cases("AKS"):
        scores, expected = tensors["in.scores"], tensors["out.selected"].tolist()
        count, settings = hyper["max_num_frames"], (hyper["t1"], float(hyper["t2"]), hyper["all_depth"])
        if tensors["out.leaves"].shape[0]:
            segments = aks_segments(scores, count, *settings)
            assert segments == [tuple(leaf) for leaf in tensors["out.leaves"].tolist()]
            assert aks_keyframes(scores, segments, count) == expected
        method = AKS(num_frames=count, threshold=settings[0], deviation=settings[1], depth=settings[2])
        assert method.select(frames(scores.float())).indices == tuple(expected)


def test_a_peak_keeps_its_part_whole_and_the_rest_is_halved() -> None:
    relevance = torch.zeros(16)
    relevance[5], relevance[6] = 1.0, 0.9
    relevance[8:] = 0.1
    # The best four of all are 0.55 on average, 0.38 above the mean of all; 0.475 and 0.24 in the first half.
    assert aks_segments(relevance, 4, 0.3, -100, 2) == [(0, 15, 0)]
    assert AKS(num_frames=4, threshold=0.3).select(frames(relevance)).indices == (5, 6, 8, 9)
    assert aks_segments(relevance, 4, 0.5, -100, 1) == [(0, 7, 1), (8, 15, 1)]
    assert AKS(num_frames=4, threshold=0.5, depth=1).select(frames(relevance)).indices == (5, 6, 8, 9)
    assert AKS(num_frames=4, threshold=1.0, depth=2).select(frames(relevance)).indices == (0, 5, 8, 12)
    # A deviation that no part reaches has every part halved.
    assert len(aks_segments(relevance, 4, 0.0, 0.9, 2)) == 4
    # The second half is 0.75 below its best and final, before the quarters of the first.
    halves = torch.tensor([0.5, 0.5, 0.5, 0.5, 0, 0, 0, 1])
    assert aks_segments(halves, 1, 0.7, -100, 2) == [(4, 7, 1), (0, 1, 2), (2, 3, 2)]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 31, 33, 48, 63])
def test_the_whole_budget_is_used(count: int) -> None:
    """With the authors' depth of 5 theirs keeps none of 16 frames, 32 of 48 and none of 31."""
    relevance = torch.rand(200, generator=torch.Generator().manual_seed(count))
    chosen = AKS(num_frames=count).select(frames(relevance)).indices
    assert len(chosen) == count
    parts = 1 << min(5, count.bit_length() - 1)
    edges = [segment[0] for segment in aks_segments(relevance, count, 1.0, -100, parts.bit_length() - 1)]
    assert len(edges) == parts
    assert len({sum(edge <= index for edge in edges) for index in chosen}) == parts, "a frame of each part"


def test_what_is_left_over_goes_to_the_best() -> None:
    relevance = torch.arange(12).float()
    # Halves give one frame each, 5 and 11; the third is the best of the others.
    assert AKS(num_frames=3).select(frames(relevance)).indices == (5, 10, 11)


def test_equal_relevance_spreads_the_frames() -> None:
    assert AKS(num_frames=4).select(frames(torch.full((16,), 0.3))).indices == (0, 4, 8, 12)
    assert AKS(num_frames=1).select(frames(torch.full((3,), -0.3))).indices == (0,)
    assert AKS(num_frames=16).select(frames(torch.zeros(16))).indices == tuple(range(16))
