"""Relevant and diverse keyframes, segment by segment."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import normalize

from spatiotoken.frames.mdp3 import MDP3, kernel, mdp3_keyframes
from spatiotoken.structures import Frames

SCALES = (0.125, 0.25, 0.5, 1.0, 2.0)


def random_video(frames: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features of a few scenes, and how relevant the frames are."""
    generator = torch.Generator().manual_seed(seed)
    scenes = torch.randn(5, 16, generator=generator).repeat_interleave(-(-frames // 5), dim=0)[:frames]
    features = normalize(scenes + 0.5 * torch.randn(frames, 16, generator=generator), dim=1)
    return features, features @ normalize(torch.randn(16, generator=generator), dim=0)


def by_determinants(features: Tensor, quality: Tensor, count: int, segment: int) -> list[int]:
    """The same search with a determinant for each set that it looks at."""
    units = features.double()
    full = kernel(units @ units.T, SCALES)

    def logarithm(items: list[int]) -> float:
        return float(torch.linalg.slogdet(full[items][:, items]).logabsdet) if items else 0.0

    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for begin in range(0, len(units), segment):
        candidates = range(begin, min(begin + segment, len(units)))
        found: dict[int, tuple[float, list[int]]] = {}
        for total, (value, chosen) in best.items():
            given, order, gain = chosen[-1:], [], 0.0
            for size in range(min(count - total, len(candidates)) + 1):
                if size:
                    values = {
                        item: logarithm(given + order + [item]) - logarithm(given + order) + float(quality[item])
                        for item in candidates
                        if item not in order
                    }
                    item = max(values, key=values.__getitem__)
                    order.append(item)
                    gain += values[item]
                if total + size not in found or value + gain > found[total + size][0]:
                    found[total + size] = (value + gain, chosen + sorted(order))
        best = found
    return best[count][1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count, segment", [(1, 6), (4, 6), (7, 5), (8, 3), (6, 24), (20, 7)])
def test_as_by_determinants(count: int, segment: int, seed: int) -> None:
    features, relevance = random_video(24, seed)
    quality = 10 * kernel(relevance.double(), SCALES).log()
    expected = by_determinants(features, quality, count, segment)
    assert mdp3_keyframes(features, quality, count, segment, SCALES) == expected
    frames = Frames(torch.arange(24).double(), features=features, relevance=relevance)
    assert MDP3(num_frames=count, segment=segment).select(frames).indices == tuple(expected)


def test_one_long_segment_without_its_kernel() -> None:
    features, relevance = random_video(700, 0)
    quality = 10 * kernel(relevance.double(), SCALES).log()
    units = features.double()
    full, order = kernel(units @ units.T, SCALES), []
    for _ in range(5):
        left = [item for item in range(700) if item not in order]
        sets = [[*order, item] for item in left]
        values = [torch.linalg.slogdet(full[rows][:, rows]).logabsdet + quality[rows].sum() for rows in sets]
        order.append(left[max(range(len(left)), key=values.__getitem__)])
    assert mdp3_keyframes(features, quality, 5, None, SCALES) == sorted(order)


def test_relevance_decides_among_different_frames() -> None:
    relevance = torch.tensor([0.1, 0.3, 0.0, 0.2, 0.25, -0.4, 0.28, 0.05])
    for segment in (2, 3, 8, None):
        frames = Frames(torch.arange(8.0), features=torch.eye(8), relevance=relevance)
        choice = MDP3(num_frames=3, segment=segment).select(frames)
        assert choice.indices == (1, 4, 6)
        assert torch.equal(choice.scores, relevance)


def test_copies_give_way_to_less_relevant_frames() -> None:
    features = torch.eye(3)[[0, 0, 0, 1, 1, 2]]
    relevance = torch.tensor([0.3, 0.3, 0.3, 0.25, 0.25, 0.2])
    frames = Frames(torch.arange(6.0), features=features, relevance=relevance)
    for segment in (3, 6, None):
        assert MDP3(num_frames=3, segment=segment).select(frames).indices == (0, 3, 5)
    # Only the last frame before a segment is known there, so a copy of an earlier one can be taken.
    returning = Frames(torch.arange(6.0), features=torch.eye(3)[[0, 0, 1, 1, 0, 0]], relevance=torch.full((6,), 0.3))
    assert MDP3(num_frames=3, segment=2).select(returning).indices == (0, 2, 4)


def test_weight_of_diversity() -> None:
    features, relevance = random_video(40, 3)
    frames = Frames(torch.arange(40.0), features=features, relevance=relevance)
    best = sorted(relevance.argsort(descending=True)[:6].tolist())
    assert list(MDP3(num_frames=6, weight=0.001).select(frames).indices) == best
    diverse = MDP3(num_frames=6, weight=1000.0, segment=None).select(frames).indices
    assert {index // 8 for index in diverse} == {0, 1, 2, 3, 4}


def test_the_whole_budget_is_used() -> None:
    for features in (torch.zeros(10, 4), torch.ones(10, 4), torch.eye(10)):
        frames = Frames(torch.arange(10.0), features=features, relevance=torch.zeros(10))
        for count in range(1, 10):
            for segment in (2, 4, None):
                assert len(MDP3(num_frames=count, segment=segment).select(frames).indices) == count


def test_features_of_any_length() -> None:
    features, relevance = random_video(30, 1)
    lengths = torch.rand(30, 1, generator=torch.Generator().manual_seed(9)) + 0.5
    pair = [Frames(torch.arange(30.0), features=f, relevance=relevance) for f in (features, lengths * features)]
    assert MDP3(num_frames=5).select(pair[0]).indices == MDP3(num_frames=5).select(pair[1]).indices


@pytest.mark.parametrize("settings", [{"scales": ()}, {"scales": (0.0,)}, {"scorer": "pixels"}, {"segment": 0}])
def test_settings_that_make_no_sense(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        MDP3(**settings)
