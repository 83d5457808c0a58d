"""D-CoDe's tokens: the authors' vectors, which tokens lead, and what becomes of clusters that the authors lose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.dcode_tokens import DCoDeTokens, dcode_tokens_count
from tests.vectors import cases

EAST, NORTH = torch.eye(2)


def clip(frames: Tensor) -> VideoFeatures:
    return VideoFeatures(frames.flatten(0, 1), (frames.shape[0], 1, frames.shape[1]))


def authors(case: int) -> tuple[dict[str, Any], Tensor, dict[str, Tensor]]:
    """Our settings, the frames that the authors selected, and their results."""
    hyper, tensors = cases("D-CoDe")[case]
    frames = tensors["in.features"].float()[tensors["out.frame_indices"].long()]
    settings = {
        "retention": hyper["top_k"] / frames.shape[1],
        "threshold": hyper["similarity_threshold"],
        "weighted": hyper["merge_strategy"] == "weighted_mean",
    }
    assert dcode_tokens_count(frames[..., 0].numel(), settings["retention"]) == frames.shape[0] * hyper["top_k"]
    return settings, frames, tensors


def by_length(frames: Tensor, reduced: ReducedTokens) -> Tensor:
    """Survivors of each frame from the longest on, as the authors leave them."""
    order = frames.flatten(0, 1).norm(dim=1)[reduced.source].argsort(descending=True, stable=True)
    return reduced.embeddings[order[(reduced.source // frames.shape[1])[order].argsort(stable=True)]]


@pytest.mark.parametrize(("case", "lost"), [(0, 32), (1, 1), (2, 51)])
def test_authors_results(case: int, lost: int) -> None:
    settings, frames, expected = authors(case)
    reduced = DCoDeTokens(**settings, reference=True).reduce(clip(frames))
    kept = torch.bincount(reduced.source // frames.shape[1])
    assert torch.equal(kept, expected["out.tokens_per_frame"].long())
    torch.testing.assert_close(by_length(frames, reduced), expected["out.tokens"], atol=2e-4, rtol=0)
    # As many have no neighbour left as were counted when the vectors were made.
    budget = dcode_tokens_count(frames[..., 0].numel(), settings["retention"])
    assert int((reduced.assignment >= 0).sum()) == budget - lost


@pytest.mark.parametrize("case", [0, 1, 2])
def test_nothing_that_goes_on_is_lost(case: int) -> None:
    """Tokens that the authors keep are kept, and equal theirs where no other cluster has a share in them."""
    settings, frames, _ = authors(case)
    ours, theirs = (DCoDeTokens(**settings, reference=flag).reduce(clip(frames)) for flag in (False, True))
    places, tokens = frames.shape[1], frames.flatten(0, 1)
    went_on = ours.assignment >= 0
    assert int(went_on.sum()) == dcode_tokens_count(tokens.shape[0], settings["retention"])
    assert torch.isin(theirs.source, ours.source).all() and theirs.source.shape[0] < ours.source.shape[0]
    agreeing = 0
    for leader, mean in zip(theirs.source, theirs.embeddings, strict=True):
        place = int((ours.source == leader).nonzero())
        beside = torch.arange(tokens.shape[0]) // places == leader // places
        similar = torch.cosine_similarity(tokens, tokens[leader], dim=1) >= settings["threshold"]
        if torch.equal(similar & beside & went_on, ours.assignment == place):
            torch.testing.assert_close(ours.embeddings[place], mean, atol=2e-4, rtol=0)
            agreeing += 1
    assert agreeing > theirs.source.shape[0] // 2


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("threshold", [-0.2, 0.3, 0.8])
def test_clusters_one_after_the_other(threshold: float, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(3, 30, 3, generator=generator) * torch.rand(3, 30, 1, generator=generator)
    reduced = DCoDeTokens(retention=0.7, threshold=threshold, weighted=weighted).reduce(clip(frames))
    expected = {}
    for frame, tokens in enumerate(frames):
        left = tokens.norm(dim=1).argsort(descending=True).tolist()[:21]
        while left:
            similar = torch.cosine_similarity(tokens[left[0]][None], tokens[left]) >= threshold
            members = [index for index, alike in zip(left, similar, strict=True) if alike]
            weight = tokens[members].norm(dim=1, keepdim=True) ** weighted
            mean = (weight * tokens[members]).sum(dim=0) / weight.sum()
            expected[30 * frame + left[0]] = ([30 * frame + index for index in members], mean)
            left = [index for index in left if index not in members]
    assert reduced.source.tolist() == sorted(expected)
    for place, source in enumerate(reduced.source.tolist()):
        members, mean = expected[source]
        assert (reduced.assignment == place).nonzero()[:, 0].tolist() == sorted(members)
        torch.testing.assert_close(reduced.embeddings[place], mean)


def test_a_chain_of_neighbours() -> None:
    """Each is like the next only: the first takes the second; the authors' code then loses the third."""
    degrees = torch.deg2rad(torch.tensor([40.0, 0.0, 80.0, 120.0]))
    length = torch.tensor([2.0, 3.0, 1.0, 0.1])
    frames = (length * torch.stack([degrees.cos(), degrees.sin()])).T[None]
    ours = DCoDeTokens(retention=0.75, threshold=0.7).reduce(clip(frames))
    assert ours.source.tolist() == [1, 2] and ours.assignment.tolist() == [0, 0, 1, -1]
    torch.testing.assert_close(ours.embeddings, torch.stack([frames[0, :2].mean(dim=0), frames[0, 2]]))
    theirs = DCoDeTokens(retention=0.75, threshold=0.7, reference=True).reduce(clip(frames))
    assert theirs.source.tolist() == [1] and theirs.assignment.tolist() == [0, 0, -1, -1]
    torch.testing.assert_close(theirs.embeddings, ours.embeddings[:1])


def test_survivors_are_in_order_of_place() -> None:
    frame = torch.stack([1 * EAST, 5 * NORTH, 3 * EAST, 4 * NORTH, 0 * EAST, 0.5 * NORTH])
    reduced = DCoDeTokens(retention=0.5).reduce(clip(frame[None]))
    assert reduced.source.tolist() == [1, 2] and reduced.assignment.tolist() == [-1, 0, 1, 0, -1, -1]
    assert reduced.embeddings.tolist() == [[0, 4.5], [3, 0]]
    weighted = DCoDeTokens(retention=0.5, weighted=True).reduce(clip(frame[None]))
    torch.testing.assert_close(weighted.embeddings, torch.tensor([[0, 41 / 9], [3, 0]]))


def test_frames_do_not_mix_and_share_a_small_budget() -> None:
    frames = torch.stack([EAST, NORTH]).expand(5, 2, 2)
    reduced = DCoDeTokens(retention=0.3, threshold=-1).reduce(clip(frames))
    assert reduced.source.tolist() == [2, 6, 8], "three frames keep a token"
    assert DCoDeTokens(retention=0.01).reduce(clip(frames)).source.shape == (1,)
    assert DCoDeTokens(retention=1.0, threshold=-1).reduce(clip(frames)).source.tolist() == [0, 2, 4, 6, 8]


def test_zero_tokens_and_equal_tokens() -> None:
    for reference in (False, True):
        blank = DCoDeTokens(retention=1.0, weighted=True, reference=reference).reduce(clip(torch.zeros(2, 4, 3)))
        assert blank.source.tolist() == list(range(8)) and not blank.embeddings.any(), "they are like nothing"
        equal = DCoDeTokens(retention=1.0, reference=reference).reduce(clip(torch.full((2, 4, 3), 0.1)))
        assert equal.source.tolist() == [0, 4] and equal.assignment.tolist() == [0] * 4 + [1] * 4
    kept = DCoDeTokens(retention=0.5, threshold=1).reduce(clip(torch.full((2, 4, 3), 0.1)))
    assert kept.source.tolist() == [0, 1, 4, 5] and int((kept.assignment >= 0).sum()) == 4
