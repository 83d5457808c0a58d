"""TS-LLaVA's tokens: the authors' samples, and their budget."""

from __future__ import annotations

import torch

from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens.ts_llava_tokens import TSLlavaTokens, ts_llava_tokens_count, ts_llava_tokens_selection
from tests.vectors import cases


def test_authors_results() -> None:
    for hyper, tensors in cases("TS-LLaVA"):
        frames = tensors["in.features"].float()
        count, places = frames.shape[:2]
        expected = tensors["out.sampled_tokens_idx"].long()
        assert torch.equal(ts_llava_tokens_selection(count * places, hyper["num_tokens"]), expected)
        video = VideoFeatures(frames.flatten(0, 1), (count, 7, 7))
        reduced = TSLlavaTokens(retention=hyper["num_tokens"] / (count * places)).reduce(video)
        assert torch.equal(reduced.source, expected)
        assert torch.equal(reduced.embeddings, tensors["out.sampled_tokens"])


def test_default_is_the_authors_budget() -> None:
    assert ts_llava_tokens_count(50 * 576, TSLlavaTokens().retention) == 2880


def test_budget_is_a_truncated_share() -> None:
    assert [ts_llava_tokens_count(9, retention) for retention in (1e-6, 0.2, 0.33, 0.34, 1.0)] == [1, 1, 2, 3, 9]
    for percent in range(1, 101):
        assert ts_llava_tokens_count(100, percent / 100) == percent


def test_samples_run_across_frames() -> None:
    video = VideoFeatures(torch.arange(12.0)[:, None], (3, 2, 2))
    reduced = TSLlavaTokens(retention=1 / 3).reduce(video)
    assert reduced.source.tolist() == [0, 4, 7, 11] and reduced.embeddings[:, 0].tolist() == [0, 4, 7, 11]
    assert (reduced.assignment >= 0).nonzero()[:, 0].tolist() == [0, 4, 7, 11]
    assert TSLlavaTokens(retention=0.05).reduce(video).source.tolist() == [0]
    assert TSLlavaTokens(retention=1.0).reduce(video).embeddings is video.embeddings
