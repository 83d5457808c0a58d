"""DyCoke: the authors' vectors, and clips of every length."""

from __future__ import annotations

import pytest
import torch

from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens.dycoke import DyCoke, dycoke_count, dycoke_places, dycoke_selection
from tests.vectors import cases


def test_authors_results() -> None:
    for hyper, tensors in cases("DyCoke"):
        frames = tensors["in.features"].float()
        count, places = frames.shape[:2]
        ratio = hyper["merging_ratio"]
        expected = tensors["out.kept_in_output_order"].long().sort().values
        assert dycoke_places(places, ratio) == hyper["n_keep_per_pruned_frame"]
        assert torch.equal(dycoke_selection(frames, ratio, reference=True), expected)
        clip = VideoFeatures(frames.flatten(0, 1), (count, 1, places))
        assert torch.equal(DyCoke(merging_ratio=ratio, reference=True).reduce(clip).source, expected)
        # Mended, it differs from them in the third frame of the last group only.
        mended = DyCoke(merging_ratio=ratio).reduce(clip).source
        third = count - 2
        assert torch.equal(mended[mended // places != third], expected[expected // places != third])
        assert int((mended // places == third).sum()) == hyper["n_keep_per_pruned_frame"]


@pytest.mark.parametrize(
    ("num_frames", "whole", "whole_in_reference"),
    [
        (1, [0], [0]),
        (2, [0], [0]),
        (3, [0], [0, 2]),
        (4, [0], [0, 2]),
        (5, [0, 4], [0, 4]),
        (7, [0, 4], [0, 4, 6]),
        (8, [0, 4], [0, 4, 6]),
        (10, [0, 4, 8], [0, 4, 8]),
    ],
)
def test_whole_frames(num_frames: int, whole: list[int], whole_in_reference: list[int]) -> None:
    frames = torch.randn(num_frames, 10, 4, generator=torch.Generator().manual_seed(0))
    for reference, expected in ((False, whole), (True, whole_in_reference)):
        kept = dycoke_selection(frames, 0.7, reference)
        assert kept.shape == (dycoke_count(num_frames, 10, 0.7, reference),)
        per_frame = torch.bincount(kept // 10, minlength=num_frames)
        assert per_frame.tolist() == [10 if frame in expected else 3 for frame in range(num_frames)]


def test_whom_each_frame_is_compared_with() -> None:
    east, north = torch.eye(2)
    first = torch.stack([east, east, east, east])
    second, third, fourth = first.clone(), first.clone(), first.clone()
    second[1] = north
    third[2] = north
    fourth[:3] = north  # of these, place 2 is what the third frame shows
    fourth[3] = -north  # as far from the third frame as places 0 and 1, which come first
    clip = torch.stack([first, second, third, fourth])
    assert dycoke_selection(clip, 0.75).tolist() == [0, 1, 2, 3, 4 + 1, 8 + 2, 12 + 0]
    assert dycoke_selection(clip, 0.5).tolist() == [0, 1, 2, 3, 4 + 0, 4 + 1, 8 + 0, 8 + 2, 12 + 0, 12 + 1]


def test_cut_frames_may_become_empty() -> None:
    clip = VideoFeatures(torch.zeros(5, 3), (5, 1, 1))
    reduced = DyCoke().reduce(clip)
    assert reduced.source.tolist() == [0, 4] and reduced.assignment.tolist() == [0, -1, -1, -1, 1]
    assert DyCoke(merging_ratio=0).reduce(clip).embeddings is clip.embeddings
