"""Long-tail pruning: where the curve is cut."""

from __future__ import annotations

import pytest
import torch

from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens.long_tail import LongTail, long_tail_counts, long_tail_mask, similarity_to_frame


@pytest.mark.parametrize(
    ("curve", "head"),
    [
        ([0.9, 0.8, 0.1, 0.08, 0.06, 0.04, 0.02], 2),  # a long tail, which begins below the chord
        ([0.9, 0.88, 0.86, 0.84, 0.82, 0.1, 0.0], 5),  # a long head, which ends above it
        ([1.0, 0.0, 0.0, 0.0, 0.0], 1),
        ([0.5, 0.5, 0.5], 3),  # nothing stands out
        ([0.9, 0.1], 2),
        ([0.9], 1),
    ],
)
def test_the_cut_is_at_the_knee(curve: list[float], head: int) -> None:
    order = torch.randperm(len(curve), generator=torch.Generator().manual_seed(0))
    similarity = torch.tensor(curve)[order][None]
    counts = long_tail_counts(similarity, 0.0)
    assert counts.tolist() == [head]
    kept = long_tail_mask(similarity, counts)[0].nonzero()[:, 0]
    assert sorted(order[kept].tolist()) == list(range(head))


def test_floor() -> None:
    similarity = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]])
    assert long_tail_counts(similarity, 0.0).tolist() == [1, 6]
    assert long_tail_counts(similarity, 0.4).tolist() == [4, 6]
    assert long_tail_counts(similarity, 1.0).tolist() == [10, 10]


def test_each_frame_is_cut_by_its_own_summary() -> None:
    axes = torch.eye(3)
    hidden = torch.stack([axes[0], axes[1], axes[2], 2 * axes[0], axes[1], axes[1], axes[2], 0 * axes[0]])
    summary = torch.stack([5 * axes[0], axes[1]])
    assert similarity_to_frame(hidden, summary).tolist() == [[1, 0, 0, 1], [1, 1, 0, 0]]
    video = VideoFeatures(torch.randn(8, 5), (2, 2, 2), hidden=hidden, frame_features=summary)
    reduced = LongTail().reduce(video)
    assert reduced.source.tolist() == [0, 3, 4, 5]
    assert torch.equal(reduced.embeddings, video.embeddings[reduced.source])
    assert LongTail(min_retention=0.75).reduce(video).source.tolist() == [0, 1, 3, 4, 5, 6]
    assert LongTail(min_retention=1).reduce(video).embeddings is video.embeddings


def test_equal_tokens_are_equally_similar() -> None:
    token, summary = torch.randn(2, 1, 77, generator=torch.Generator().manual_seed(0))
    assert len(set(similarity_to_frame(token.expand(61, -1), summary)[0].tolist())) == 1
