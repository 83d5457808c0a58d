"""Slow frames in full size, fast ones smaller."""

from __future__ import annotations

import colorsys

import pytest
import torch
from torch import Tensor

from spatiotoken.frames.slow_fast import SlowFast, hsv, slow_frames
from spatiotoken.structures import FrameChoice, Frames


def select(patches: Tensor, **settings: object) -> FrameChoice:
    settings = {"scorer": "dinov2", **settings}
    return SlowFast(**settings).select(Frames(torch.arange(patches.shape[0]).double(), patches=patches))


def turning(changed: list[int], patches: int = 20) -> Tensor:
    """``[T, patches, 2]``: of each frame the first so many patches point elsewhere than in the first frame."""
    east, north = torch.eye(2)
    return torch.stack([torch.where((torch.arange(patches) < n)[:, None], north, east) for n in changed])


def test_a_frame_is_compared_with_the_last_slow_one() -> None:
    # One patch of 20 a frame: 0.95 alike is enough, and two patches since the last slow frame are not.
    video = turning([0, 1, 2, 3, 4, 5])
    assert slow_frames(video, 0.95, 0.7).tolist() == [True, False, True, False, True, False]
    assert slow_frames(video, 0.9, 0.7).tolist() == [True, False, False, True, False, False]
    assert slow_frames(video, 0.0, 0.7).tolist() == [True] + [False] * 5
    assert slow_frames(video, 1.0, 0.7).tolist() == [True] * 6


def test_patches_are_alike_by_their_direction() -> None:
    patches = torch.tensor([[1.0, 0.0], [5.0, 1.0], [1.0, 1.0], [0.0, 0.0]])[:, None]
    # Cosines with the first frame: 0.98, 0.71 and none.
    assert slow_frames(patches, 0.95, 0.7).tolist() == [True, False, False, True]
    assert slow_frames(patches, 0.95, 0.72).tolist() == [True, False, True, True]


def test_black_patches_do_not_count() -> None:
    video = torch.zeros(4, 20, 3)
    assert slow_frames(video, 1.0, 0.7).tolist() == [True, False, False, False]
    # Two of two patches that show anything: all of them are alike, then one of two is not, then all are black.
    video[:, :2] = 1.0
    video[2:, 0] = torch.tensor([1.0, -1.0, 0.0])
    assert slow_frames(video, 0.95, 0.7).tolist() == [True, False, True, False]
    video[3] = 0
    assert slow_frames(video, 0.95, 0.7).tolist() == [True, False, True, True]


def test_sizes() -> None:
    choice = select(turning([0, 0, 9, 9, 9]))
    assert choice.indices == (0, 1, 2, 3, 4)
    assert choice.scales == pytest.approx([1, 0.3**0.5, 1, 0.3**0.5, 0.3**0.5])
    assert select(turning([0, 0, 9]), fast_share=0.25).scales == (1.0, 0.5, 1.0)
    assert select(turning([0, 9, 0])).scales is None
    assert select(turning([0, 0, 0]), fast_share=1.0).scales is None
    assert select(turning([0])).scales is None


def test_budget_of_full_frames() -> None:
    video = turning([0, 0, 0, 9, 9])  # worth 2 + 3 * 0.3
    for budget in (0.5, 1.45, 2.9):
        scales = select(video, full_frames=budget).scales
        assert sum(scale**2 for scale in scales) == pytest.approx(budget)
        assert scales[1] / scales[0] == pytest.approx(0.3**0.5)
    assert select(video, full_frames=3.0).scales == select(video).scales
    assert select(turning([0, 9, 0]), full_frames=0.75).scales == pytest.approx([0.5] * 3)


def test_too_many_frames_are_thinned_before_they_are_compared() -> None:
    choice = select(turning([0, 9, 9, 0, 9, 9, 0, 9, 9, 9]), num_frames=4)
    assert choice.indices == (0, 3, 6, 9)
    assert choice.scales == pytest.approx([1, 0.3**0.5, 0.3**0.5, 1])


def test_colours_as_hue_saturation_and_value() -> None:
    rgb = torch.rand(500, 3, generator=torch.Generator().manual_seed(0))
    rgb[:8] = torch.cartesian_prod(*3 * [torch.tensor([0.0, 1.0])])
    rgb[8:20] = rgb[8:20, :1]  # grey
    expected = [colorsys.rgb_to_hsv(*colour) for colour in rgb.double().tolist()]
    torch.testing.assert_close(hsv(rgb), torch.tensor(expected) * torch.tensor([180.0, 255.0, 255.0]))


def test_pixels_are_compared_as_the_authors_do() -> None:
    colours = torch.tensor([[0.8, 0, 0], [0, 0.8, 0], [0.8, 0.8, 0.8], [0.3, 0.3, 0.3]])
    video = colours[:, None].expand(4, 256, 3)
    # Hue weighs little: red is like green, but not like grey.
    assert select(video, scorer="pixels").scales == pytest.approx([1, 0.3**0.5, 1, 0.3**0.5])
    # Taken as features, red and green have nothing in common.
    assert select(video).scales == pytest.approx([1, 1, 1, 0.3**0.5])
