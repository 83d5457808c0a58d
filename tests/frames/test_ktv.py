"""KTV's keyframes: the authors' vector, the tightest clustering, and frames that coincide."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from spatiotoken.frames.ktv import KTV, ktv_keyframes
from spatiotoken.structures import Frames
from tests.vectors import cases


def frames(features: Tensor) -> Frames:
    return Frames(torch.arange(features.shape[0]).double(), features=features)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_authors_results(seed: int) -> None:
    for hyper, tensors in cases("KTV", "key"):
        features, expected = tensors["in.frame_features"].float(), tensors["out.keyframes_sorted"].tolist()
        assert ktv_keyframes(features, hyper["num_cluster"], seed=seed).tolist() == expected
        assert KTV(num_frames=hyper["num_cluster"], seed=seed).select(frames(features)).indices == tuple(expected)


def test_tightest_clusters_are_found() -> None:
    """Every way to cut some numbers in three is tried."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        values = torch.rand(9, generator=generator)
        order = values.argsort()
        cuts = [(order[:i], order[i:j], order[j:]) for i, j in combinations(range(1, 9), 2)]
        parts = min(
            cuts, key=lambda cut: sum(float((values[part] - values[part].mean()).square().sum()) for part in cut)
        )
        chosen = ktv_keyframes(values[:, None], 3, restarts=30)
        for part in parts:
            distance = (values - values[part].mean()).abs()
            # Of two members both are as near to their mean.
            assert distance[chosen].min() <= distance.min() + 1e-6


def test_an_offset_of_all_features_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randn(5, 16, generator=generator).repeat_interleave(8, dim=0)
    features = scenes + 0.3 * torch.randn(40, 16, generator=generator)
    chosen = ktv_keyframes(features, 5)
    assert (chosen // 8).tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(ktv_keyframes(features + 1000, 5), chosen)


def test_as_many_as_asked_of_frames_that_coincide() -> None:
    scenes = torch.eye(2).repeat_interleave(torch.tensor([6, 3]), dim=0)
    chosen = KTV(num_frames=4).select(frames(scenes)).indices
    assert len(set(chosen)) == 4 and chosen[0] < 6 <= chosen[-1]
    assert KTV(num_frames=2).select(frames(scenes)).indices == (0, 6)
    assert KTV(num_frames=3).select(frames(torch.zeros(7, 2))).indices == (0, 1, 2)
    assert KTV(num_frames=9).select(frames(scenes)).indices == tuple(range(9))


def test_random_numbers_are_its_own() -> None:
    features = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    chosen = {seed: KTV(seed=seed, restarts=1).select(frames(features)).indices for seed in range(8)}
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert all(KTV(seed=seed, restarts=1).select(frames(features)).indices == chosen[seed] for seed in chosen)
    assert len(set(chosen.values())) > 1, "noise has no clear clusters, so the seed decides"
