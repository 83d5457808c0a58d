"""Correlation-guided compression: repeated tokens set the count, the summary chooses."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens import correlation_guided
from spatiotoken.tokens.correlation_guided import CorrelationGuided, correlation_guided_counts, lookalikes

EAST, NORTH, UP = torch.eye(3)
FRAME = torch.stack([EAST, 2 * EAST, EAST, EAST, NORTH, UP])  # four alike, of any length


def test_lookalikes() -> None:
    assert lookalikes(FRAME[None], 0.8).tolist() == [[3, 3, 3, 3, 0, 0]]
    assert lookalikes(FRAME[None], -0.5).tolist() == [[5] * 6]
    assert lookalikes(torch.zeros(2, 1, 4), -1).tolist() == [[0], [0]]


def test_lookalikes_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = torch.randn(3, 10, 4, generator=torch.Generator().manual_seed(0))
    whole = lookalikes(frames, 0.3)
    cosine = torch.nn.functional.cosine_similarity(frames[:, :, None], frames[:, None], dim=-1)
    assert torch.equal(whole, (cosine > 0.3).sum(dim=2) - 1)
    monkeypatch.setattr(correlation_guided, "_CHUNK", 4)
    assert torch.equal(lookalikes(frames, 0.3), whole)


def test_counts() -> None:
    similar = torch.tensor([[3, 3, 3, 3, 0, 0], [5, 5, 5, 5, 5, 5], [0, 0, 0, 0, 0, 0]])
    assert correlation_guided_counts(similar, 0.5).tolist() == [2, 1, 6]
    assert correlation_guided_counts(similar, 0.6).tolist() == [6, 1, 6], "the share itself is not too many"
    assert correlation_guided_counts(similar, 1.0).tolist() == [6, 6, 6]
    assert correlation_guided_counts(torch.zeros(1, 1), 0.0).tolist() == [1]


def test_keeps_as_many_as_are_not_repeated_and_those_like_the_frame() -> None:
    hidden = torch.cat([FRAME, torch.stack([EAST, NORTH, UP, -EAST, -NORTH, -UP])])
    summary = torch.stack([EAST + 2 * NORTH, UP])
    video = VideoFeatures(torch.randn(12, 5), (2, 2, 3), hidden=hidden, frame_features=summary)
    reduced = CorrelationGuided(repeats=0.5).reduce(video)
    # Frame 0 has two tokens that are not repeated; the closest to its summary are NORTH and the first EAST.
    assert reduced.source.tolist() == [0, 4, 6, 7, 8, 9, 10, 11]
    assert torch.equal(reduced.embeddings, video.embeddings[reduced.source])
    assert CorrelationGuided(repeats=1).reduce(video).embeddings is video.embeddings


def test_one_token_stays_of_a_frame_that_only_repeats_itself() -> None:
    video = VideoFeatures(torch.ones(8, 2), (2, 2, 2), hidden=torch.ones(8, 3), frame_features=torch.ones(2, 3))
    assert CorrelationGuided().reduce(video).source.tolist() == [0, 4]
    with pytest.raises(ValidationError):
        CorrelationGuided(similarity=1)
