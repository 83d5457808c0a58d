"""D-CoDe's frames: the authors' vectors, equal distances, and what is least like the chosen ones."""

from __future__ import annotations

import numpy
import pytest
import torch

from spatiotoken.frames.dcode import DCoDe, dcode_keyframes, dcode_uniform
from spatiotoken.structures import Frames
from tests.vectors import cases


def frames(features: torch.Tensor) -> Frames:
    return Frames(torch.arange(features.shape[0]).double(), features=features)


def test_authors_results() -> None:
    for hyper, tensors in cases("D-CoDe"):
        features, expected = tensors["in.cls"].float(), tensors["out.frame_indices"].tolist()
        assert dcode_keyframes(features, hyper["N"], hyper["uniform_ratio"]).tolist() == expected
        method = DCoDe(num_frames=hyper["N"], uniform_ratio=hyper["uniform_ratio"])
        assert method.select(frames(features)).indices == tuple(expected)


def test_equal_distances_are_numpys() -> None:
    for num_frames in [*range(1, 60), 1000, 4000]:
        for count in range(min(num_frames, 40) + 1):
            expected = numpy.linspace(0, num_frames - 1, num=count, dtype=int).tolist()
            assert dcode_uniform(num_frames, count) == expected


def test_the_least_similar_are_added() -> None:
    east, north, up = torch.eye(3)
    features = torch.stack([east, east, north, east, up, -east, east])
    # Two at equal distances, the ends; then what points away from both, then the first of those at right angles.
    assert dcode_keyframes(features, 3, 0.7).tolist() == [0, 5, 6]
    assert dcode_keyframes(features, 4, 0.5).tolist() == [0, 2, 5, 6]
    # By the mean of the chosen, not by the nearest: two frames to the east and one to the west are to the east.
    assert dcode_keyframes(torch.stack([east, north, -east, -north, east]), 3, 2 / 3).tolist() == [0, 2, 4]


def test_nothing_is_chosen_twice() -> None:
    for features in (torch.full((9, 4), 0.1), torch.zeros(9, 4)):
        assert dcode_keyframes(features, 5, 0.5).tolist() == [0, 1, 2, 3, 8]
        assert DCoDe(num_frames=9).select(frames(features)).indices == tuple(range(9))


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.85, 1.0])
def test_any_share_at_equal_distances(ratio: float) -> None:
    features = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    for count in range(1, 30):
        chosen = DCoDe(num_frames=count, uniform_ratio=ratio).select(frames(features)).indices
        assert len(chosen) == count and set(dcode_uniform(30, int(count * ratio))) <= set(chosen)
    assert DCoDe(num_frames=1, uniform_ratio=ratio).select(frames(features)).indices == (0,)
