"""Learning-free reduction: counts, and clips whose right answer is evident."""

from __future__ import annotations

import pytest
import torch

from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.learning_free import (
    LearningFree,
    learning_free_count,
    spatial_selection,
    temporal_count,
    temporal_runs,
)


def reduce(method: LearningFree, frames: torch.Tensor) -> ReducedTokens:
    return method.reduce(VideoFeatures(frames.flatten(0, 1), (frames.shape[0], 1, frames.shape[1])))


def test_counts() -> None:
    assert learning_free_count(100, 0.0625) == 6 and learning_free_count(9, 0.01) == 1
    assert temporal_count(16, 10, 0.0625, 0.5) == 40  # 16 times less: 4 times in time, 4 times in space
    assert temporal_count(16, 10, 0.0625, 0.0) == 160
    assert temporal_count(16, 10, 0.25, 1.0) == 40
    assert temporal_count(4, 10, 0.0625, 1.0) == 10  # one per place at least
    assert temporal_count(1, 10, 0.5, 1.0) == 10


def test_the_most_similar_neighbours_are_joined() -> None:
    angle = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.9, 0.3], [0.15, 1.8, 0.5], [1.0, 2.7, 0.9]])
    frames = torch.stack([angle.cos(), angle.sin()], dim=-1)
    begins = temporal_runs(frames, 8).view(4, 3)
    # Turns by .05, .1, .2 and .3 are the four smallest.
    assert begins.tolist() == [[True] * 3, [False, True, False], [False, True, False], [True] * 3]
    assert temporal_runs(torch.ones(3, 2, 4), 4).tolist() == [True, True, False, False, True, True]


def test_frames_keep_the_same_share() -> None:
    tokens = torch.eye(5)[torch.tensor([0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 4])]
    frame = torch.tensor([0] * 8 + [1] * 4)
    # Half of each: what stands alone first, then of the equals the first.
    assert spatial_selection(tokens, frame, 2, 6).tolist() == [0, 1, 6, 7, 8, 11]
    assert spatial_selection(tokens, frame, 2, 12).tolist() == list(range(12))
    assert spatial_selection(tokens, frame + 1, 3, 1).tolist() == [6]


def test_runs_become_means() -> None:
    still, change = torch.eye(4)[0], torch.eye(4)
    frames = torch.stack([torch.stack([still * (1 + t), change[t]]) for t in range(4)])
    reduced = reduce(LearningFree(retention=5 / 8, temporal=1.0), frames)
    assert reduced.source.tolist() == [0, 1, 3, 5, 7]
    assert reduced.assignment.tolist() == [0, 1, 0, 2, 0, 3, 0, 4]
    torch.testing.assert_close(reduced.embeddings[0], 2.5 * still)
    assert torch.equal(reduced.embeddings[1:], change)


@pytest.mark.parametrize("temporal", [0.0, 0.5, 1.0])
def test_still_clips_and_images(temporal: float) -> None:
    method = LearningFree(retention=0.25, temporal=temporal)
    still = reduce(method, torch.ones(8, 6, 4).half())
    assert still.source.shape[0] == 12 and torch.equal(still.embeddings, torch.ones(12, 4).half())
    picture = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(0))
    reduced = reduce(method, picture)
    assert reduced.source.shape[0] == 2 and torch.equal(reduced.embeddings, picture[0, reduced.source])
    assert reduce(LearningFree(retention=0.01, temporal=temporal), torch.zeros(4, 6, 8)).source.tolist() == [0]
