"""KTV's key tokens: the authors' vectors, their quotas, and how relevance reaches the frames."""

from __future__ import annotations

import pytest
import torch

from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens.ktv_tokens import KTVTokens, ktv_tokens_count, ktv_tokens_quotas, ktv_tokens_scores
from spatiotoken.tokens.merging import top_indices
from tests.vectors import cases


def test_authors_results() -> None:
    for hyper, tensors in cases("KTV", "tok"):
        features, logits = tensors["in.features"].float(), tensors["in.cls_logits"].float()
        frames, places, _ = features.shape
        count = hyper["remain_tokens_num"]
        scores = ktv_tokens_scores(features, logits, hyper["rate"])
        assert torch.equal(top_indices(scores, count).int(), tensors["out.kept"])
        clip = VideoFeatures(
            torch.randn(frames * places, 8),
            (frames, 1, places),
            saliency=logits.view(1, -1),
            hidden=features.flatten(0, 1),
            question=torch.randn(3, 8),
        )
        kept = KTVTokens(retention=count / places, rate=hyper["rate"], shares=(1, 1, 1)).reduce(clip).source
        expected = tensors["out.kept"].long() + places * torch.arange(frames)[:, None]
        assert torch.equal(kept, expected.flatten())


@pytest.mark.parametrize(
    ("frames", "tokens", "shares", "expected"),
    [
        (6, 504, (2, 1, 1), [144, 72, 72, 72, 72, 72]),
        (6, 936, (4, 2, 1), [288, 144, 144, 144, 144, 72]),
        (6, 1872, (4, 2, 1), [576, 288, 288, 288, 288, 144]),
        (12, 1872, (4, 2, 1), [288] * 2 + [144] * 8 + [72] * 2),
    ],
)
def test_authors_quotas(frames: int, tokens: int, shares: tuple[float, float, float], expected: list[int]) -> None:
    assert ktv_tokens_count(frames * 576, tokens / (frames * 576)) == tokens
    relevance = torch.randperm(frames, generator=torch.Generator().manual_seed(0)).float()
    quotas = ktv_tokens_quotas(tokens, relevance, 576, shares)
    assert quotas[relevance.argsort(descending=True)].tolist() == expected


def test_quotas_of_other_clips() -> None:
    assert ktv_tokens_quotas(5, torch.zeros(1), 9, (2, 1, 1)).tolist() == [5]
    assert ktv_tokens_quotas(6, torch.tensor([0.1, 0.2]), 9, (2, 1, 1)).tolist() == [2, 4]
    assert ktv_tokens_quotas(2, torch.tensor([0.1, 0.4, 0.2]), 9, (4, 2, 1)).tolist() == [0, 1, 1]
    # A full frame passes on what it cannot take.
    assert ktv_tokens_quotas(7, torch.tensor([0.3, 0.2, 0.1]), 3, (9, 1, 1)).tolist() == [3, 2, 2]


def test_frames_that_match_the_question_keep_more() -> None:
    frames = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.2]])[:, None].expand(3, 8, 2)
    parts = {"saliency": torch.arange(24.0)[None], "hidden": torch.ones(24, 5)}
    clip = VideoFeatures(frames.flatten(0, 1), (3, 2, 4), question=torch.tensor([[0.0, 3.0], [0.0, 1.0]]), **parts)
    kept = KTVTokens(retention=0.5).reduce(clip).source
    # All tokens are equally redundant, so the last, most salient ones stay.
    assert kept.tolist() == [5, 6, 7, 10, 11, 12, 13, 14, 15, 21, 22, 23]
    assert torch.bincount(KTVTokens(retention=0.5, shares=(1, 1, 1)).reduce(clip).source // 8).tolist() == [4, 4, 4]
    with pytest.raises(ValueError, match="come without question"):
        KTVTokens(retention=0.5).reduce(VideoFeatures(frames.flatten(0, 1), (3, 2, 4), **parts))


def test_rate_weighs_saliency_against_redundancy() -> None:
    east, north = torch.eye(2)
    features = torch.stack([east, east, east, north])[None]
    saliency = torch.tensor([[0.1, 0.7, 0.2, 0.1]])
    assert ktv_tokens_scores(features, saliency, 1.0).argmax() == 1
    assert ktv_tokens_scores(features, saliency, 0.0).tolist() == [[0, 0, 0, 1]]
    # A zero token is like none, itself included.
    scores = ktv_tokens_scores(torch.stack([east, torch.zeros(2), east])[None], torch.zeros(1, 3), 0.5)
    assert scores.tolist() == [[0, 0.5, 0]]
