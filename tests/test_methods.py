"""Methods without a test file of their own, on hand-made examples, and bad input.

What holds of all is in ``tests/tokens/test_properties.py`` and ``tests/layers/test_properties.py``.
"""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from spatiotoken.frames.kmeans import KMeans, kmeans_keyframes
from spatiotoken.frames.uniform import Uniform, uniform_indices
from spatiotoken.layers.fastv import FastV
from spatiotoken.registry import METHODS, STAGES, Method
from spatiotoken.structures import FrameChoice, Frames, LayerTokens, ReducedTokens, VideoFeatures
from spatiotoken.tokens.divprune import DivPrune, divprune_order
from spatiotoken.tokens.downsample import Downsample, pooled_grid
from spatiotoken.tokens.evs import EVS, evs_mask
from spatiotoken.tokens.merging import mean_by_assignment
from spatiotoken.tokens.random import Random, random_selection


def video(grid: tuple[int, int, int], dim: int = 16, seed: int = 0) -> VideoFeatures:
    tokens = grid[0] * grid[1] * grid[2]
    return VideoFeatures(torch.randn(tokens, dim, generator=torch.Generator().manual_seed(seed)), grid)


def test_random_is_uniform_and_seeded() -> None:
    hits = sum(torch.bincount(random_selection(20, 5, seed), minlength=20) for seed in range(400))
    assert hits.sum() == 2000 and 60 < hits.min() and hits.max() < 145  # 100 expected, sigma 8.7
    assert not torch.equal(Random(seed=1).reduce(video((4, 7, 7))).source, Random().reduce(video((4, 7, 7))).source)


def test_downsample_averages_cells() -> None:
    values = torch.arange(16.0).view(16, 1)
    reduced = Downsample(retention=0.25).reduce(VideoFeatures(values, (1, 4, 4)))
    assert reduced.embeddings[:, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    assert reduced.source.tolist() == [0, 2, 8, 10]
    assert reduced.assignment.view(4, 4)[0].tolist() == [0, 0, 1, 1]


def test_downsample_keeps_the_shape_of_the_picture() -> None:
    assert pooled_grid(8, 16, 0.25) == (4, 8)
    assert pooled_grid(9, 9, 1.0) == (9, 9)
    assert pooled_grid(1, 9, 0.5) == (1, 4)


def test_mean_by_assignment() -> None:
    values = torch.tensor([[1.0], [3.0], [10.0], [7.0]])
    merged = mean_by_assignment(values, torch.tensor([0, 0, -1, 2]), 3)
    assert merged[:, 0].tolist() == [2.0, 0.0, 7.0]
    exact = torch.randn(5, 4).half()
    assert torch.equal(mean_by_assignment(exact, torch.arange(5), 5), exact)


def test_divprune_prefers_what_is_different() -> None:
    east, north, west = torch.eye(2)[0], torch.eye(2)[1], -torch.eye(2)[0]
    crowd = torch.stack([east, east, east, north, west])
    assert set(divprune_order(crowd, 3).tolist()) == {0, 3, 4}


def test_divprune_never_picks_twice() -> None:
    same = torch.ones(6, 4)
    assert divprune_order(same, 6).sort().values.tolist() == list(range(6))
    assert DivPrune(retention=0.5).reduce(VideoFeatures(same, (1, 2, 3))).source.tolist() == [0, 1, 2]


def test_evs_keeps_the_first_frame_and_what_changes() -> None:
    frame = torch.randn(6, 8)
    clip = torch.stack([frame, frame.clone(), frame.clone()])
    clip[1, 4] += 1.0  # appears in frame 1 and is gone in frame 2
    features = clip.flatten(0, 1)
    mask = evs_mask(features, (3, 2, 3), 8)
    assert mask.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6 + 4, 12 + 4]
    assert int(mask.sum()) == 8
    assert EVS(retention=0.01).reduce(VideoFeatures(features, (3, 2, 3))).source.tolist() == list(range(6))


def test_fastv_ranks_by_head_mean() -> None:
    attention = torch.tensor([[0.1, 0.5, 0.1, 0.3], [0.5, 0.0, 0.1, 0.4]])
    assert FastV(retention=0.5).select(LayerTokens(2, 4, attention)).tolist() == [0, 3]
    assert FastV(retention=1.0).select(LayerTokens(2, 4, attention)).tolist() == [0, 1, 2, 3]
    tied = torch.ones(2, 5)
    assert FastV(retention=0.4).select(LayerTokens(2, 5, tied)).tolist() == [0, 1]
    with pytest.raises(ValueError, match="28"):
        FastV(layer=28).prune_layers(28)


def test_uniform_indices() -> None:
    assert uniform_indices(10, 5) == (1, 3, 5, 7, 9)
    assert uniform_indices(3, 8) == (0, 1, 2)
    assert uniform_indices(7, 1) == (3,)
    frames = Frames(torch.arange(9.0), torch.zeros(9, 2))
    assert Uniform(num_frames=3).select(frames) == FrameChoice((1, 4, 7))


def test_kmeans_finds_the_scenes() -> None:
    generator = torch.Generator().manual_seed(0)
    scenes = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]]).repeat_interleave(torch.tensor([6, 3, 5]), dim=0)
    features = scenes + 0.1 * torch.randn(14, 2, generator=generator)
    chosen = kmeans_keyframes(features, 3, 10)
    assert [bool(low <= index < high) for index, low, high in zip(chosen, (0, 6, 9), (6, 9, 14), strict=True)] == [
        True
    ] * 3
    for index, members in zip(chosen, (features[:6], features[6:9], features[9:]), strict=True):
        nearest = (features - members.mean(dim=0)).norm(dim=1).argmin()
        assert index == nearest
    assert torch.equal(kmeans_keyframes(features, 3, 10), chosen)


def test_kmeans_gives_as_many_as_asked_of_a_still_picture() -> None:
    still = Frames(torch.arange(9.0), torch.ones(9, 4))
    assert len(KMeans(num_frames=4).select(still).indices) == 4
    assert KMeans(num_frames=9).select(still).indices == tuple(range(9))


@pytest.mark.parametrize(
    "method", [m for stage in STAGES for m in METHODS[stage].items().values()], ids=lambda m: m.name
)
def test_bad_settings_are_refused(method: type[Method]) -> None:
    if "retention" in method.model_fields:
        for retention in (0, -0.1, 1.5, float("nan"), "a lot", True):
            with pytest.raises(ValidationError):
                method(retention=retention)
    with pytest.raises(ValidationError):
        method(retentoin=0.5)


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="grid"):
        VideoFeatures(torch.zeros(5, 2), (1, 2, 3))
    with pytest.raises(ValueError, match="grid"):
        VideoFeatures(torch.zeros(0, 2), (0, 2, 3))
    with pytest.raises(ValueError, match="at least one"):
        ReducedTokens(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="increasing"):
        FrameChoice((2, 2))
    with pytest.raises(ValueError, match="increasing"):
        FrameChoice(())
    with pytest.raises(ValueError, match="T >= 1"):
        Frames(torch.zeros(0), torch.zeros(0, 3))
