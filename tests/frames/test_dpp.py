"""Diverse keyframes by determinants over features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spatiotoken.frames.dpp import DPP, dpp_keyframes
from spatiotoken.frames.uniform import Uniform
from spatiotoken.probe.dataset import examples
from spatiotoken.structures import Frames
from spatiotoken.video.features import frame_features


def frames(features: Tensor) -> Frames:
    return Frames(torch.arange(features.shape[0]).double(), features=features)


def test_one_frame_of_each_scene() -> None:
    scenes = torch.eye(4).repeat_interleave(5, dim=0)
    scenes += 0.01 * torch.randn(scenes.shape, generator=torch.Generator().manual_seed(0))
    chosen = DPP(num_frames=4).select(frames(scenes)).indices
    assert [index // 5 for index in chosen] == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(4))
def test_as_by_determinants_of_the_whole_kernel(seed: int) -> None:
    features = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    distance = torch.cdist(features, features).square()
    for bandwidth in (0.3, 1.0, 2.0):
        kernel = (-distance / (2 * bandwidth**2 * distance.mean())).exp()
        order: list[int] = []
        for _ in range(6):
            left = [item for item in range(12) if item not in order]
            sets = [[*order, item] for item in left]
            values = [float(torch.linalg.slogdet(kernel[rows][:, rows]).logabsdet) for rows in sets]
            # With one frame alone all are equal, but for rounding.
            order.append(left[max(range(len(left)), key=lambda i: round(values[i], 9))])
        found, novelty = dpp_keyframes(features.float(), 6, bandwidth)
        assert found.tolist() == order
        assert novelty.prod().log().item() == pytest.approx(
            torch.linalg.slogdet(kernel[order][:, order]).logabsdet.item(), rel=1e-4
        )


def test_neither_scale_nor_what_never_changes_matters() -> None:
    features = torch.rand(40, 6, generator=torch.Generator().manual_seed(0))
    chosen = DPP(num_frames=7).select(frames(features)).indices
    assert DPP(num_frames=7).select(frames(1000 * features)).indices == chosen
    constant = torch.full((40, 50), 3.0)
    assert DPP(num_frames=7).select(frames(torch.cat([features, constant], dim=1))).indices == chosen


def test_a_single_different_frame_is_found() -> None:
    for place in (1, 1777, 3999):
        features = torch.full((4000, 12), 0.1)
        features[place] = 0.2
        assert DPP(num_frames=2).select(frames(features)).indices == (0, place)


def test_copies_come_last() -> None:
    for same in (torch.zeros(9, 4), torch.full((9, 4), 0.1)):
        assert DPP(num_frames=3).select(frames(same)).indices == (0, 1, 2)
    features = torch.tensor([1.0, 1.0, 5.0, 5.0, 1.0])[:, None]
    assert DPP(num_frames=3).select(frames(features)).indices == (0, 1, 2)


def test_needles() -> None:
    """A letter in one of 64 frames is in the 8 chosen ones far more often than in 8 at equal distances."""
    kept = {"dpp": 0.0, "uniform": 0.0}
    for example in examples("test", 40, num_frames=64, families=("needle",)):
        shows = (example.evidence[..., 2] > example.evidence[..., 0]).any(dim=0)
        candidates = frames(frame_features(example.frames))
        for method in (DPP(num_frames=8), Uniform(num_frames=8)):
            kept[method.name] += float(shows[list(method.select(candidates).indices)].sum() / shows.sum()) / 40
    assert kept["dpp"] > 0.9 and kept["dpp"] > 3 * kept["uniform"]
