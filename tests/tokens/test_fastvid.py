"""FastVID against the authors' vectors, and what their code cannot do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens.density_peaks import density_peak_scores, scaled_distances
from spatiotoken.tokens.fastvid import FastVID, anchor_counts, fastvid_budget, fastvid_count, merge_into_anchors
from spatiotoken.tokens.merging import top_indices
from spatiotoken.tokens.segments import frame_similarities, segment_frames
from tests.vectors import cases


def method_of(hyper: dict[str, Any]) -> FastVID:
    return FastVID(
        retention=hyper["retention_ratio"],
        segments=hyper["c"],
        segment_threshold=hyper["tau"],
        contextual=hyper["d"],
        stride=hyper["p"],
        anchor_weight=hyper["beta"],
    )


def random_video(frames: int, places: int, **more: Tensor) -> VideoFeatures:
    generator = torch.Generator().manual_seed(frames * 100 + places)
    embeddings = torch.randn(frames * places, 8, generator=generator)
    features = torch.randn(frames, 8, generator=generator)
    saliency = torch.rand(1, frames * places, generator=generator)
    return VideoFeatures(embeddings, (frames, 1, places), **({"saliency": saliency, "frame_features": features} | more))


def test_authors_parts() -> None:
    for hyper, tensors in cases("FastVID"):
        features, attention = tensors["in.features"].float(), tensors["in.attn"]
        places = features.shape[1]
        segments = segment_frames(frame_similarities(tensors["in.frame_global"]), hyper["c"], hyper["tau"])
        assert torch.equal(segments.bincount().int(), tensors["out.segment_sizes"])
        salient, budget = fastvid_budget(places, hyper["retention_ratio"], hyper["d"])
        chosen = top_indices(attention, salient)
        assert torch.equal(chosen.int(), tensors["out.salient_idx_unsorted"].sort(dim=1).values)
        rest = top_indices(torch.ones_like(attention).scatter(1, chosen, 0), places - salient)
        members = torch.stack([frame[index] for frame, index in zip(features, rest, strict=True)])
        scores = density_peak_scores(scaled_distances(members), 4)
        torch.testing.assert_close(scores, tensors["out.density_score"], atol=2e-4, rtol=0)
        counts = anchor_counts(segments, budget, places - salient, hyper["p"])
        assert torch.equal(counts.int(), tensors["out.frame_context_num"])


def test_authors_survivors() -> None:
    for hyper, tensors in cases("FastVID"):
        features = tensors["in.features"].float()
        side = int(features.shape[1] ** 0.5)
        video = VideoFeatures(
            features.flatten(0, 1),
            (features.shape[0], side, side),
            saliency=tensors["in.attn"].flatten()[None],
            frame_features=tensors["in.frame_global"].float(),
        )
        reduced = method_of(hyper).reduce(video)
        start, stop = hyper["video_start_idx"], -hyper["n_post"]
        assert torch.equal(reduced.source.int(), tensors["out.keep_indices"][start:stop] - start)
        torch.testing.assert_close(reduced.embeddings, tensors["out.hidden_kept"], atol=2e-4, rtol=0)
        assert reduced.source.shape[0] == fastvid_count(video.grid, hyper["retention_ratio"])


def test_what_does_not_divide_evenly_is_not_lost() -> None:
    """Seven frames with anchors in the 7th and 3rd: 21 anchors are 10 and 11, the authors' are 10 and 10."""
    assert anchor_counts(torch.zeros(7, dtype=torch.int64), 3, 50, 4).tolist() == [0, 0, 10, 0, 0, 0, 11]


def test_more_frames_hold_anchors_where_one_has_no_room() -> None:
    one = torch.zeros(4, dtype=torch.int64)
    assert anchor_counts(one, 5, 20, 4).tolist() == [0, 0, 0, 20]
    assert anchor_counts(one, 5, 19, 4).tolist() == [10, 0, 0, 10]
    assert anchor_counts(one, 5, 5, 4).tolist() == [5, 5, 5, 5]


def test_two_clusters_around_two_anchors() -> None:
    members = torch.tensor([[1.0, 0.0], [4.0, 0.0], [0.0, 2.0], [0.0, 6.0], [0.0, 4.0]])
    merged, goal, share = merge_into_anchors(members, members[[0, 2]], 0.6)
    assert goal.tolist() == [0, 0, 1, 1, 1]
    torch.testing.assert_close(merged, torch.tensor([[0.6 * 1 + 0.4 * 2.5, 0.0], [0.0, 0.6 * 2 + 0.4 * 4]]))
    torch.testing.assert_close(share, torch.tensor([0.2, 0.2, 0.4 / 3, 0.4 / 3, 0.4 / 3]))


def test_twin_anchors() -> None:
    """The second of two equal anchors gets no members and stays as it is."""
    members = torch.tensor([[1.0, 1.0], [1.0, 1.0], [3.0, 3.0]])
    merged, _, share = merge_into_anchors(members, members[:2], 0.0)
    torch.testing.assert_close(merged, torch.tensor([[1.5, 1.5], [1.0, 1.0]]))
    torch.testing.assert_close(share, torch.full((3,), 0.25))


@pytest.mark.parametrize("frames", [1, 2, 7, 9, 33])
@pytest.mark.parametrize("retention", [0.01, 0.1, 0.3, 0.7, 0.95])
def test_the_budget_is_met_exactly(frames: int, retention: float) -> None:
    for segments, stride in ((1, 4), (8, 4), (2, 1)):
        method = FastVID(retention=retention, segments=segments, segment_threshold=-1, stride=stride)
        video = random_video(frames, 11)
        assert method.reduce(video).source.shape[0] == fastvid_count(video.grid, retention)


def test_less_than_a_token_per_frame() -> None:
    saliency = torch.zeros(1, 20)
    saliency[0, [3, 17]] = 1
    reduced = FastVID(retention=0.1).reduce(random_video(5, 4, saliency=saliency))
    assert reduced.source.tolist() == [3, 17]


def test_every_token_of_a_segment_is_absorbed_within_it() -> None:
    video = random_video(8, 12, frame_features=torch.eye(2).repeat_interleave(4, dim=0))
    reduced = FastVID(retention=0.5, segments=1).reduce(video)
    frame = torch.arange(96) // 12
    assert (reduced.assignment >= 0).all()
    assert torch.equal(frame[reduced.source[reduced.assignment]] // 4, frame // 4)


def test_anchors_alone() -> None:
    """With ``anchor_weight`` 1 nothing is merged, so what is not kept is dropped."""
    video = random_video(8, 12)
    reduced = FastVID(retention=0.5, anchor_weight=1).reduce(video)
    assert torch.equal(reduced.embeddings, video.embeddings[reduced.source])
    assert (reduced.assignment >= 0).sum() == reduced.source.shape[0]
