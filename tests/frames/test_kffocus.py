"""Keyframes where a codec would have much to write."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spatiotoken.frames.kffocus import KFFocus, changes, group_starts
from spatiotoken.frames.uniform import Uniform
from spatiotoken.probe.dataset import examples
from spatiotoken.structures import Frames
from spatiotoken.video.features import frame_features


def chosen(patches: Tensor, count: int, **settings: float) -> tuple[int, ...]:
    frames = Frames(torch.arange(patches.shape[0]).double(), patches=patches)
    return KFFocus(num_frames=count, **settings).select(frames).indices


def noise(frames: int, seed: int = 0) -> Tensor:
    return 0.01 * torch.randn(frames, 16, 3, generator=torch.Generator().manual_seed(seed))


def test_changes_by_hand() -> None:
    patches = torch.zeros(4, 2, 1)
    patches[1, 0], patches[2, 0], patches[2, 1], patches[3, 0], patches[3, 1] = 3, 3, 4, 5, 4
    # Residuals of the two blocks: 3 and 0, 0 and 4, 2 and 0; their (lower) median is 0.
    change, novelty = changes(patches, 1.0)
    assert change.tolist() == [1.5, 2.0, 1.0]
    # The first and the last frame have one neighbour; the others are predicted by either, block by block.
    assert novelty.tolist() == [1.5, 0.0, 0.0, 1.0]


def test_small_residuals_are_skipped() -> None:
    patches = torch.arange(5.0)[:, None, None].expand(5, 4, 1).clone()
    patches[3:, 0] += 9
    # The median residual is 1; one of four blocks changes by 10 once.
    assert changes(patches, 2.0)[0].tolist() == [0, 0, (10 - 2) / 4, 0]
    assert changes(patches, 0.0)[0].tolist() == [1, 1, (10 + 3) / 4, 1]


def test_groups_begin_at_the_largest_changes() -> None:
    change = torch.tensor([0.0, 5.0, 1.0, 0.0, 3.0, 0.0, 0.0])
    assert group_starts(change, 1) == [0]
    assert group_starts(change, 3) == [0, 2, 5]
    assert group_starts(change, 4) == [0, 2, 3, 5]
    assert group_starts(torch.tensor([2.0, 2.0, 2.0]), 3) == [0, 1, 2]


def test_without_changes_the_longest_group_is_halved() -> None:
    assert group_starts(torch.zeros(15), 4) == [0, 4, 8, 12]
    assert group_starts(torch.tensor([0.0, 0, 7, 0, 0, 0, 0]), 3) == [0, 3, 5]
    for size in (2, 3, 7, 50):
        for count in range(1, size + 1):
            starts = group_starts(torch.zeros(size - 1), count)
            assert len(set(starts)) == count and starts[0] == 0 and starts[-1] < size


def test_scenes_and_a_flash() -> None:
    scenes = torch.rand(3, 16, 3, generator=torch.Generator().manual_seed(1)).repeat_interleave(20, dim=0)
    video = scenes + noise(60)
    video[33, 5] += 1.0
    indices = chosen(video, 5)
    assert 33 in indices
    assert {index // 20 for index in indices} == {0, 1, 2}
    # Even in a budget that spends no boundary on the flash, it is the least redundant frame of its group.
    assert 33 in chosen(video, 3)


def test_the_first_of_a_group_without_news() -> None:
    scenes = torch.rand(3, 16, 3, generator=torch.Generator().manual_seed(1)).repeat_interleave(4, dim=0)
    # The ends are only predicted from one side, but nothing happens there either.
    assert chosen(scenes, 3) == (0, 4, 8)
    assert chosen(torch.full((12, 16, 3), 0.1), 3) == (0, 3, 6)
    assert chosen(torch.zeros(2, 16, 3), 1) == (0,)


def test_steady_motion_is_sampled_evenly() -> None:
    steady = torch.arange(64.0)[:, None, None].expand(64, 16, 3)
    assert chosen(steady, 4) == (0, 16, 32, 48)


def test_the_scale_of_features_does_not_matter() -> None:
    video = torch.rand(50, 8, 5, generator=torch.Generator().manual_seed(2)).cumsum(dim=0)
    for skip in (0.0, 1.0, 1.3):
        assert chosen(video, 9, skip=skip) == chosen(video * 64, 9, skip=skip)


def test_long_videos_are_read_in_parts() -> None:
    video = torch.rand(200, 6, 3, generator=torch.Generator().manual_seed(3))
    residual = (video[1:] - video[:-1]).norm(dim=2)
    torch.testing.assert_close(changes(video, 0.0)[0], residual.mean(dim=1))


@pytest.mark.parametrize("count", [4, 8])
def test_needles(count: int) -> None:
    """A letter in one of 64 frames is in the chosen ones far more often than in as many at equal distances."""
    kept = {"kffocus": 0.0, "uniform": 0.0}
    for example in examples("test", 40, num_frames=64, families=("needle",)):
        shows = (example.evidence[..., 2] > example.evidence[..., 0]).any(dim=0)
        patches = frame_features(example.frames).unflatten(1, (3, -1)).transpose(1, 2)
        candidates = Frames(torch.arange(64) / 4, patches=patches)
        for method in (KFFocus(num_frames=count), Uniform(num_frames=count)):
            kept[method.name] += float(shows[list(method.select(candidates).indices)].sum() / shows.sum()) / 40
    assert kept["kffocus"] > 0.9 and kept["kffocus"] > 3 * kept["uniform"]
