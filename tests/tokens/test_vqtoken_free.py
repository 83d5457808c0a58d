"""The k-means codebook: hand-made clusters and what is left of the degenerate ones."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens.merging import mean_by_assignment
from spatiotoken.tokens.vqtoken_free import (
    VQTokenFree,
    elbow,
    farthest_tokens,
    represent,
    spherical_kmeans,
    vqtoken_free_count,
)


def scenes(noise: float = 0.05) -> VideoFeatures:
    """Three kinds of tokens, of 12, 8 and 4 members, in mixed order and of different lengths."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.tensor([0] * 12 + [1] * 8 + [2] * 4)[torch.randperm(24, generator=generator)]
    tokens = torch.eye(8)[kind] + noise * torch.randn(24, 8, generator=generator)
    return VideoFeatures(tokens * (1 + torch.rand(24, 1, generator=generator)), (2, 3, 4), hidden=kind[:, None].float())


def test_finds_the_kinds() -> None:
    video = scenes()
    reduced = VQTokenFree(retention=3 / 24).reduce(video)
    kind = video.needed("hidden")[:, 0].long()
    assert torch.equal(kind[reduced.source][reduced.assignment], kind)
    torch.testing.assert_close(reduced.embeddings, mean_by_assignment(video.embeddings, reduced.assignment, 3))
    centres = normalize(mean_by_assignment(normalize(video.embeddings, dim=-1), reduced.assignment, 3), dim=-1)
    fit = (normalize(video.embeddings, dim=-1) @ centres.T)[torch.arange(24), reduced.assignment]
    for code, source in enumerate(reduced.source.tolist()):
        assert fit[source] == fit[reduced.assignment == code].max()


def test_adaptive_number_of_codes() -> None:
    assert elbow(torch.tensor([9.0, 6.0, 3.0, 0.3, 0.2, 0.1])) == 4
    assert elbow(torch.tensor([9.0, 6.0, 3.0, 0.3, 0.0, 0.0])) == 4
    assert elbow(torch.tensor([9.0, 0.0, 0.0, 0.0, 0.0])) == 3  # never less than 0.6
    assert [elbow(torch.arange(float(count), 0, -1)) for count in (1, 2)] == [1, 2]
    video = scenes()
    assert VQTokenFree(retention=5 / 24, adaptive=True).reduce(video).source.shape[0] == 3
    assert VQTokenFree(retention=5 / 24).reduce(video).source.shape[0] == 5


def test_farthest_tokens() -> None:
    unit = normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [0.0, 1.0], [-1.0, 0.0]]), dim=-1)
    picks, distortion = farthest_tokens(unit, 5)
    assert picks[:3].tolist() == [1, 4, 3] and sorted(picks.tolist()) == list(range(5))
    assert (distortion.diff() <= 0).all() and distortion[-1] == 0


def test_kmeans_moves_to_the_middle() -> None:
    unit = normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.4], [-0.2, 1.0], [0.2, 1.0]]), dim=-1)
    fit, labels = spherical_kmeans(unit, unit[[0, 2]], 10)
    assert labels.tolist() == [0, 0, 0, 1, 1]
    torch.testing.assert_close(fit[3:], unit[3:, 1])
    assert spherical_kmeans(unit, unit[[0, 2]], 0)[1].tolist() == [0, 0, 1, 1, 1]


def test_codes_without_members_take_the_worst_fit() -> None:
    source, labels = represent(torch.tensor([1.0, 0.6, 0.9, 0.8, 1.0]), torch.tensor([0, 0, 0, 0, 3]), 4)
    assert source.tolist() == [0, 1, 3, 4] and labels.tolist() == [0, 1, 0, 2, 3]


def test_count_holds_even_if_all_tokens_are_equal() -> None:
    assert [vqtoken_free_count(6272, retention) for retention in (0.005, 0.0001, 0.0032)] == [31, 1, 20]
    for tokens in (torch.ones(24, 4), torch.zeros(24, 4)):
        reduced = VQTokenFree(retention=0.25).reduce(VideoFeatures(tokens, (2, 3, 4)))
        assert reduced.source.shape[0] == 6 and torch.equal(reduced.embeddings, tokens[:6])
