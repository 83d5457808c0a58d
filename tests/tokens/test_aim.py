"""AIM's merging against the authors' results."""

from __future__ import annotations

import torch

from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens.aim import AIM, aim_count, aim_merge
from tests.vectors import cases


def test_authors_vectors() -> None:
    for _, tensors in cases("AIM", "merge"):
        frames = tensors["in.features"].float()
        for name, retention in (("half", 0.5), ("quarter", 0.25)):
            expected = tensors[f"out.after_{name}"]
            values, index, _ = aim_merge(frames, aim_count(frames.shape[1], retention))
            torch.testing.assert_close(values, expected, atol=2e-4, rtol=0)
            video = VideoFeatures(frames.flatten(0, 1), (len(frames), 1, frames.shape[1]))
            reduced = AIM(retention=retention).reduce(video)
            in_place = expected.take_along_dim(index.argsort(dim=1).unsqueeze(-1), 1)
            torch.testing.assert_close(reduced.embeddings, in_place.flatten(0, 1), atol=2e-4, rtol=0)
            base = frames.shape[1] * torch.arange(len(frames))[:, None]
            assert torch.equal(reduced.source, (index.sort(dim=1).values + base).flatten())


def test_count() -> None:
    assert [aim_count(n, 0.25) for n in (196, 169, 729, 49, 64, 1)] == [49, 43, 183, 13, 16, 1]
    assert aim_count(196, 0.5) == 98 and aim_count(196, 0.3) == 59 and aim_count(10, 0.1) == 1


def test_last_step_is_partial() -> None:
    frames = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    half, _, _ = aim_merge(frames, 8)
    values, index, owner = aim_merge(frames, 6)
    assert values.shape[1] == 6 and torch.equal(owner.gather(1, index), torch.arange(6).expand(2, 6))
    # Two of the eight halves merged, the others are as they were.
    same = (values.unsqueeze(2) == half.unsqueeze(1)).all(dim=-1).any(dim=-1).sum(dim=1)
    assert ((same >= 4) & (same < 6)).all()


def test_mean_of_means_or_of_tokens() -> None:
    # 1 and 3 merge with 2 in the first step; their mean then counts as one token, or as three.
    angle = torch.tensor([0.0, 0.01, 0.02, 1.0])
    values = torch.stack([angle.cos(), angle.sin()], dim=1) * torch.tensor([1.0, 2.0, 3.0, 12.0])[:, None]
    video = VideoFeatures(values, (1, 2, 2))
    assert AIM(retention=0.5).reduce(video).assignment.tolist() == [0, 0, 0, 1]
    means = values[:3].mean(dim=0)
    torch.testing.assert_close(AIM(retention=0.25).reduce(video).embeddings[0], (means + values[3]) / 2)
    torch.testing.assert_close(AIM(retention=0.25, weighted=True).reduce(video).embeddings[0], values.mean(dim=0))


def test_one_token_a_frame_is_left() -> None:
    video = VideoFeatures(torch.randn(3 * 5, 4, generator=torch.Generator().manual_seed(1)), (3, 1, 5))
    reduced = AIM(retention=0.01).reduce(video)
    assert reduced.assignment.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert torch.equal(reduced.source // 5, torch.arange(3))
