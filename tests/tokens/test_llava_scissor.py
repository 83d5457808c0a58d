"""LLaVA-Scissor against the authors' results, where their components are exact."""

from __future__ import annotations

import torch

from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens.llava_scissor import LLaVAScissor, scissor_merge, semantic_components
from spatiotoken.tokens.merging import mean_by_assignment
from tests.vectors import cases


def test_authors_vectors() -> None:
    for hyper, tensors in cases("LLaVA-Scissor"):
        frames = tensors["in.features"].float()
        standing, component = semantic_components(frames, hyper["tau"])
        counts = tensors["out.frame_component_count"].long()
        assert torch.equal(torch.bincount(standing // frames.shape[1]), counts)
        before = (counts.cumsum(0) - counts)[:, None]
        assert torch.equal(component - before, tensors["out.frame_component_label"].long())
        means = mean_by_assignment(frames.flatten(0, 1), component.flatten(), standing.shape[0])
        _, again = semantic_components(means[None], hyper["tau"])
        assert torch.equal(again[0].int(), tensors["out.temporal_component_label"])
        _, _, owner = scissor_merge(frames, hyper["tau"])
        assert torch.equal(owner.int(), tensors["out.assign"])
        video = VideoFeatures(frames.flatten(0, 1), (frames.shape[0], 1, frames.shape[1]))
        reduced = LLaVAScissor(threshold=hyper["tau"]).reduce(video)
        torch.testing.assert_close(reduced.embeddings, tensors["out.tokens"], atol=2e-4, rtol=0)
        differs = reduced.assignment != owner
        assert not differs[~torch.isin(torch.arange(len(owner)), reduced.source)].any()


def test_one_scene_and_one_object() -> None:
    """A static background, and an object that is there in one of three frames."""
    background, thing = torch.eye(4)[0], torch.eye(4)[1]
    tokens = background.repeat(3, 4, 1)
    tokens[1, 2] = thing
    reduced = LLaVAScissor().reduce(VideoFeatures(tokens.flatten(0, 1), (3, 2, 2)))
    assert reduced.source.tolist() == [0, 6]
    assert reduced.assignment.tolist() == [0] * 6 + [1] + [0] * 5
    torch.testing.assert_close(reduced.embeddings, torch.stack([background, thing]))


def test_survivor_stands_at_the_most_connected_token() -> None:
    """Of a fan of tokens only the middle one is near all."""
    angle = torch.tensor([0.0, 0.4, 0.8, 2.5])
    tokens = torch.stack([angle.cos(), angle.sin()], dim=1)
    standing, component = semantic_components(tokens[None], 0.9)
    assert standing.tolist() == [1, 3] and component.tolist() == [[0, 0, 0, 1]]


def test_nothing_alike_keeps_everything() -> None:
    video = VideoFeatures(torch.eye(6), (2, 1, 3))
    reduced = LLaVAScissor().reduce(video)
    assert torch.equal(reduced.embeddings, video.embeddings) and reduced.assignment.tolist() == list(range(6))
    equal = VideoFeatures(torch.ones(6, 2), (2, 1, 3))
    assert LLaVAScissor(threshold=1).reduce(equal).source.tolist() == list(range(6))
