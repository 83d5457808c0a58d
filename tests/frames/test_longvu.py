"""LongVU's frames: the authors' vectors, windows, and the cap."""

from __future__ import annotations

import pytest
import torch

from spatiotoken.frames.longvu import LongVU, longvu_keyframes, longvu_similarity
from spatiotoken.structures import Frames
from tests.vectors import cases


def test_authors_results() -> None:
    for hyper, tensors in cases("LongVU"):
        patches, expected = tensors["in.dino"].float(), tensors["out.frame_indices"].tolist()
        window, threshold, count = hyper["window_size"], hyper["dino_threshold"], patches.shape[0]
        similarity = longvu_similarity(patches, window)
        assert longvu_keyframes(similarity, count, window, threshold).tolist() == expected
        frames = Frames(torch.arange(count).double(), patches=patches)
        choice = LongVU(num_frames=len(expected), window=window, threshold=threshold).select(frames)
        assert choice.indices == tuple(expected)
        torch.testing.assert_close(choice.scores, 1 - similarity)


def test_frames_unlike_their_window_stay() -> None:
    """The fifth and the seventh frame are new; the middle of each window stays; the last window is shorter."""
    scene, other, third = torch.eye(3)
    vectors = torch.stack([scene, scene, 2 * scene, scene, other, scene, third, scene, scene, scene])
    patches = torch.stack([vectors, vectors], dim=1)
    frames = Frames(torch.arange(10.0), patches=patches)
    similarity = longvu_similarity(patches, 4)
    torch.testing.assert_close(similarity, torch.tensor([1, 1, 1, 1, 0.25, 0.5, 0.25, 0.5, 1, 1]))
    assert LongVU(num_frames=9, window=4, threshold=0.4).select(frames).indices == (2, 4, 6, 9)
    assert LongVU(num_frames=9, window=4, threshold=0.0).select(frames).indices == (2, 6, 9)
    assert LongVU(num_frames=9, threshold=0.0).select(frames).indices == (5,)
    assert LongVU(num_frames=10, window=4, threshold=0.4).select(frames).indices == tuple(range(10))


def test_more_than_the_cap_are_thinned_evenly() -> None:
    assert longvu_keyframes(torch.zeros(10), 4, 16, 0.5).tolist() == [0, 2, 5, 7]
    # Frames 0 to 4 and the middle, 8, of ten.
    similarity = (torch.arange(10) >= 5).float()
    assert longvu_keyframes(similarity, 9, 16, 0.5).tolist() == [0, 1, 2, 3, 4, 5]
    assert longvu_keyframes(similarity, 3, 16, 0.5).tolist() == [0, 2, 4]
    for count in range(1, 200):
        indices = longvu_keyframes(torch.zeros(200), count, 16, 0.5)
        assert indices.shape == (count,) and (indices.diff() > 0).all()


def test_windows_do_not_see_each_other() -> None:
    patches = torch.randn(40, 5, 8, generator=torch.Generator().manual_seed(0))
    similarity = longvu_similarity(patches, 16)
    torch.testing.assert_close(similarity[16:32], longvu_similarity(patches[16:32], 16))
    unit = torch.nn.functional.normalize(patches[32:].flatten(1), dim=1)
    torch.testing.assert_close(similarity[32:], (unit @ unit.T).mean(dim=1))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_still_and_blank_videos(value: float) -> None:
    """Blank frames are like nothing, so only the cap takes some away; equal ones are all like each other."""
    frames = Frames(torch.arange(20.0), patches=torch.full((20, 3, 2), value))
    chosen = LongVU(num_frames=5).select(frames).indices
    assert chosen == ((8, 18) if value else (0, 4, 8, 12, 16))
