"""FlashVID against the authors' vectors, as far as these are not defective."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens.flashvid import FlashVID, event_relevance, flashvid_budget, select_diverse
from spatiotoken.tokens.merging import mean_by_assignment, top_indices
from spatiotoken.tokens.segments import cluster_trees, frame_similarities, segment_bounds, segment_frames, tree_links
from tests.vectors import cases


def method_of(hyper: dict[str, Any]) -> FlashVID:
    return FlashVID(
        retention=hyper["retention_ratio"] * hyper["expansion"],
        selected=hyper["alpha"],
        selection=hyper["token_selection_method"],
        segments=hyper["min_segment_num"],
        segment_threshold=hyper["segment_threshold"],
        temporal_threshold=hyper["temporal_threshold"],
    )


def video_of(tensors: dict[str, Tensor]) -> VideoFeatures:
    features = tensors["in.features"].float()
    side = int(features.shape[1] ** 0.5)
    grid = (features.shape[0], side, side)
    return VideoFeatures(features.flatten(0, 1), grid, saliency=tensors["in.attn"].flatten()[None])


def segments_of(hyper: dict[str, Any], video: VideoFeatures) -> Tensor:
    similarities = frame_similarities(video.frames.mean(dim=1))
    return segment_frames(similarities, hyper["min_segment_num"], hyper["segment_threshold"])


def test_authors_segments() -> None:
    for hyper, tensors in cases("FlashVID"):
        segments = segments_of(hyper, video_of(tensors))
        assert torch.equal(segments.bincount().int(), tensors["out.segment_lengths"])


def authors_sums(values: Tensor, links: Tensor) -> Tensor:
    """``[T, F, D]`` trees as the authors average them: the sum over one plus the number of the root's children."""
    values, children = values.clone(), torch.ones(links.shape)
    for frame in range(links.shape[0] - 1, 0, -1):
        linked = links[frame] >= 0
        values[frame - 1].index_add_(0, links[frame][linked], values[frame][linked])
        children[frame - 1].index_add_(0, links[frame][linked], torch.ones(int(linked.sum())))
    return values / children[..., None]


def test_authors_tokens_with_their_sums() -> None:
    """With their way to average a tree put in, all that they got outside segments of one frame."""
    compared = 0
    for hyper, tensors in cases("FlashVID"):
        video, method = video_of(tensors), method_of(hyper)
        places = video.tokens_per_frame
        segments = segments_of(hyper, video)
        selected, merged = flashvid_budget(places, method.retention, method.selected)
        unit = torch.nn.functional.normalize(video.frames, dim=-1)
        weight = tensors["in.attn"]
        if method.selection == "attn_div_v2":
            weight = weight * event_relevance(video.frames, segments)
        chosen = select_diverse(unit, weight, selected)
        rest = top_indices(torch.ones_like(weight).scatter(1, chosen, 0), places - selected)
        time = torch.arange(video.grid[0])[:, None]
        links = tree_links(unit[time, rest], segments, method.temporal_threshold, merged)
        trees = authors_sums(video.frames[time, rest], links)
        for frame, roots in enumerate(links < 0):
            inside = segments == segments[frame]
            if inside.sum() == 1:
                continue
            size, total = int(roots.sum()), int((links[inside] < 0).sum())
            count = math.ceil(size * (merged * int(inside.sum()) / total))
            cluster, centre = cluster_trees(trees[frame][roots], [size], [count], method.neighbours)
            means = mean_by_assignment(trees[frame][roots], cluster, count)
            source = torch.cat([chosen[frame], rest[frame][roots][centre]])
            tokens = torch.cat([video.frames[frame][chosen[frame]], means])
            theirs = tensors["out.indices"] // places == frame
            indices, values = tensors["out.indices"][theirs] - frame * places, tensors["out.tokens"][theirs]
            if count == 1:  # the trees' densities, each taken from itself alone, are equal: any is the centre
                assert set(indices.tolist()) - set(source[:-1].tolist()) <= set(rest[frame][roots].tolist())
                source[-1] = next(iter(set(indices.tolist()) - set(source[:-1].tolist())))
            assert torch.equal(source.sort().values.int(), indices)
            torch.testing.assert_close(tokens[source.argsort()], values, atol=2e-4, rtol=1e-5)
            compared += len(indices)
    assert compared == (263 - 16) + 200 + 204


def test_authors_survivors() -> None:
    """The class agrees with them in the last two frames of a segment, where trees have no grandchildren."""
    for hyper, tensors in cases("FlashVID"):
        video = video_of(tensors)
        places = video.tokens_per_frame
        first, stop = segment_bounds(segments_of(hyper, video))
        reduced = method_of(hyper).reduce(video)
        for frame in range(video.grid[0]):
            mine, theirs = reduced.source // places == frame, tensors["out.indices"] // places == frame
            if stop[frame] - first[frame] > 1:
                assert mine.sum() == theirs.sum()
                alone = theirs.sum() == 1 + flashvid_budget(places, method_of(hyper).retention, hyper["alpha"])[0]
                if stop[frame] - frame <= 2 and not alone:  # any tree may be the centre of a lone cluster
                    assert torch.equal(reduced.source[mine].int(), tensors["out.indices"][theirs])
                    values = tensors["out.tokens"][theirs]
                    torch.testing.assert_close(reduced.embeddings[mine], values, atol=2e-4, rtol=0)
            else:
                assert mine.sum() == sum(flashvid_budget(places, method_of(hyper).retention, hyper["alpha"]))


def scene(frames: int, places: int = 9, noise: float = 0.0) -> VideoFeatures:
    """A still scene of unlike tokens, with a saliency that falls from place to place."""
    generator = torch.Generator().manual_seed(places)
    first = torch.nn.functional.normalize(torch.randn(1, places, 32, generator=generator), dim=-1)
    tokens = first + noise * torch.randn(frames, places, 32, generator=generator)
    saliency = torch.arange(places, 0, -1.0).repeat(frames)[None]
    return VideoFeatures(tokens.flatten(0, 1), (frames, 1, places), saliency=saliency)


def test_a_still_clip_is_its_first_frame() -> None:
    """Twelve trees of four equal tokens for a budget of twelve. The authors' are twice as long."""
    tokens = torch.eye(12).repeat(4, 1)
    video = VideoFeatures(tokens, (4, 3, 4), saliency=torch.ones(1, 48))
    reduced = FlashVID(retention=0.25, selected=0, segments=1).reduce(video)
    assert torch.equal(reduced.embeddings, tokens[:12])
    assert torch.equal(reduced.source, torch.arange(12))
    assert torch.equal(reduced.assignment, torch.arange(48) % 12)


def test_diverse_picks() -> None:
    """Two pairs of twins and one token between: one of each pair first, whatever attention says about the other."""
    unit = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.0, 1.0]]))
    unit = unit[None]
    weight = torch.tensor([[1.0, 2.0, 1.0, 3.0, 1.0]])
    assert select_diverse(unit, weight, 1).tolist() == [[2]]  # the only one without a twin
    assert select_diverse(unit, weight, 3).tolist() == [[1, 2, 3]]
    assert select_diverse(unit, weight, 5).tolist() == [[0, 1, 2, 3, 4]]


def test_nothing_is_picked_twice_where_relevance_is_negative() -> None:
    generator = torch.Generator().manual_seed(1)
    unit = torch.nn.functional.normalize(torch.randn(3, 20, 4, generator=generator), dim=-1)
    picked = select_diverse(unit, torch.randn(3, 20, generator=generator), 15)
    assert (picked.diff(dim=1) > 0).all()


def test_blocks_of_frames_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    video = scene(7, 16, noise=0.1)
    method = FlashVID(retention=0.5, segments=2, segment_threshold=0)
    whole = method.reduce(video)
    monkeypatch.setattr("spatiotoken.tokens.flashvid._BLOCK", 3 * 16**2)
    monkeypatch.setattr("spatiotoken.tokens.segments._BLOCK", 2 * 16**2)
    parts = method.reduce(video)
    assert torch.equal(whole.source, parts.source)
    assert torch.equal(whole.embeddings, parts.embeddings)


def test_an_image_meets_its_budget_exactly() -> None:
    for places in (2, 3, 9, 49, 60):
        for retention in (0.01, 0.2, 0.5, 0.9):
            reduced = FlashVID(retention=retention).reduce(scene(1, places))
            assert reduced.source.shape[0] == math.ceil(places * retention)


def test_a_clip_keeps_at_most_one_token_per_frame_more() -> None:
    for frames, segments in ((2, 1), (5, 2), (9, 8), (16, 1)):
        for selected in (0.0, 0.5, 1.0):
            method = FlashVID(retention=0.4, segments=segments, segment_threshold=0, selected=selected)
            kept = method.reduce(scene(frames, 15, noise=0.15)).source.shape[0]
            assert 6 * frames <= kept < 7 * frames


def test_trees_stay_inside_their_segment() -> None:
    video = scene(6, 12, noise=0.05)
    reduced = FlashVID(retention=0.3, segments=3, segment_threshold=0).reduce(video)
    segments = segment_frames(frame_similarities(video.frames.mean(dim=1)), 3, 0).repeat_interleave(12)
    assert torch.equal(segments[reduced.source[reduced.assignment]], segments)
    assert (reduced.source[reduced.assignment] // 12 <= torch.arange(72) // 12).all()
