"""TiFRe: which frames are key, and what of the others is seen in their place."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from spatiotoken.frames.tifre import TiFRe, tifre_keyframes, tifre_mixing
from spatiotoken.structures import Frames

EAST, NORTH = torch.eye(2)


def test_keyframes_are_the_most_relevant() -> None:
    assert tifre_keyframes(torch.tensor([0.1, 0.9, 0.3, 0.8]), 2).tolist() == [1, 3]
    assert tifre_keyframes(torch.ones(5), 2).tolist() == [0, 1]
    assert tifre_keyframes(torch.tensor([0.5, 0.2, 0.5, 0.5]), 2).tolist() == [0, 2]


def test_others_are_merged_into_the_most_similar() -> None:
    features = torch.stack(
        [2 * EAST, EAST, 0.6 * EAST + 0.8 * NORTH, NORTH, -EAST - NORTH, 0 * EAST, EAST + 0.1 * NORTH]
    )
    relevance = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.3, 0.3])
    frames = Frames(torch.arange(7.0), features=features, relevance=relevance)
    choice = TiFRe(num_frames=2, key_weight=0.7).select(frames)
    assert choice.indices == (1, 3) and choice.mixing is not None and torch.equal(choice.scores, relevance)
    near = 1.01**-0.5  # cosine of the last frame to the first keyframe, which the first one equals
    expected = torch.tensor([[0.3 / (1 + near), 0.7, 0, 0, 0, 0, 0.3 * near / (1 + near)], [0, 0, 0.3, 0.7, 0, 0, 0]])
    torch.testing.assert_close(choice.mixing, expected)


def test_a_keyframe_outweighs_all_that_is_merged_into_it() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 8, generator=generator)
    keyframes = torch.tensor([3, 50, 120, 199])
    mixing = tifre_mixing(features, keyframes, 0.6)
    assert mixing.dtype == torch.float32 and mixing.shape == (4, 200) and (mixing >= 0).all()
    torch.testing.assert_close(mixing.sum(dim=1), torch.ones(4))
    torch.testing.assert_close(mixing[torch.arange(4), keyframes], torch.full((4,), 0.6))
    assert ((mixing > 0).sum(dim=0) <= 1).all(), "no frame is in two pictures"


def test_what_is_like_no_keyframe_has_no_part() -> None:
    still = torch.tensor([[0.0, 1.0, 0.0]])
    assert torch.equal(tifre_mixing(torch.stack([EAST, NORTH, -NORTH]), torch.tensor([1]), 0.8), still)
    assert torch.equal(tifre_mixing(torch.zeros(3, 4), torch.tensor([1]), 0.8), still)
    # Copies of a frame tie, so all of them go to the first.
    copies = tifre_mixing(torch.full((4, 3), 0.1), torch.tensor([0, 1]), 0.8)
    torch.testing.assert_close(copies, torch.tensor([[0.8, 0, 0.1, 0.1], [0, 1, 0, 0]]))


def test_merging_can_be_turned_off() -> None:
    frames = Frames(torch.arange(3.0), relevance=torch.tensor([0.0, 1.0, 0.5]))
    choice = TiFRe(num_frames=2, key_weight=1.0).select(frames)
    assert choice.indices == (1, 2) and choice.mixing is None
    with pytest.raises(ValueError, match="come without features"):
        TiFRe(num_frames=2).select(frames)
    with pytest.raises(ValidationError, match="greater than 0.5"):
        TiFRe(key_weight=0.5)
    with pytest.raises(ValidationError, match="compares frames with the question"):
        TiFRe(scorer="dinov2")
