"""VidCom2: the authors' vectors, and where the budget goes."""

from __future__ import annotations

import torch

from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens.vidcom2 import VidCom2, steady_channels, vidcom2_counts, vidcom2_mask, vidcom2_scores
from tests.vectors import cases


def test_authors_results() -> None:
    for hyper, tensors in cases("VidCom2"):
        frames = tensors["in.features"].float()
        channels = steady_channels(frames.flatten(0, 1), hyper["channel_ratio"])
        assert torch.equal(channels.int(), tensors["out.channels_sorted"])
        to_video, to_frame = vidcom2_scores(frames[:, :, channels])
        torch.testing.assert_close(to_video, tensors["out.video_score"], atol=2e-4, rtol=0)
        torch.testing.assert_close(to_frame, tensors["out.frame_score"], atol=2e-4, rtol=0)
        counts = vidcom2_counts(to_video, hyper["base_scale"], hyper["temp"])
        assert torch.equal(counts.int(), tensors["out.per_frame_k"])
        expected = tensors["out.kept"].long()
        assert torch.equal(vidcom2_mask(to_video + to_frame, counts).flatten().nonzero()[:, 0], expected)

        method = VidCom2(retention=hyper["base_scale"], channels=hyper["channel_ratio"], temperature=hyper["temp"])
        reduced = method.reduce(VideoFeatures(frames.flatten(0, 1), (frames.shape[0], 1, frames.shape[1])))
        assert torch.equal(reduced.source, expected)


def test_the_odd_frame_gets_more_and_the_odd_token_stays() -> None:
    east, north = torch.eye(8)[0], torch.eye(8)[1]
    clip = east.repeat(4, 10, 1)
    clip[2] = north
    clip[0, 7] = north
    to_video, to_frame = vidcom2_scores(clip)
    counts = vidcom2_counts(to_video, 0.4, 0.01)
    # The softmax gives frame 2 everything: 0.4 * (1 + 1 - 1/4) of its ten tokens, 0.4 * (1 - 1/4) of the others'.
    assert counts.tolist() == [3, 3, 7, 3]
    mask = vidcom2_mask(to_video + to_frame, counts)
    assert mask[0].nonzero()[:, 0].tolist() == [0, 1, 7] and mask[1].nonzero()[:, 0].tolist() == [0, 1, 2]


def test_a_frame_keeps_between_one_token_and_all() -> None:
    scores = torch.tensor([[5.0, 5.0, 5.0], [0.0, 0.0, 0.0]])
    assert vidcom2_counts(scores, 0.9, 0.01).tolist() == [1, 3]
    assert vidcom2_counts(scores, 0.01, 0.01).tolist() == [1, 1]


def test_steady_channels() -> None:
    values = torch.tensor([[1.0, 5.0, 0.0, 100.0], [2.0, 5.0, 9.0, 101.0]])
    assert steady_channels(values, 0.75).tolist() == [0, 1, 3]
    assert steady_channels(values[:, :1], 0.5).tolist() == [0], "a single channel is not halved"
    many = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1, 5, 2, 4, 6]) + 50
    assert steady_channels(many, 0.5).tolist() == [0, 1, 3], "more tokens than a chunk"


def test_full_retention_keeps_ordinary_frames_whole() -> None:
    clip = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    video = VideoFeatures(clip, (4, 2, 5))
    assert VidCom2(retention=1.0).reduce(video).embeddings is clip
    assert VidCom2(retention=0.999).reduce(video).source.shape[0] < 40
