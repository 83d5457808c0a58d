"""VisionZip: the authors' vectors, and what is merged into what."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens.visionzip import VisionZip, evenly_spaced, visionzip_count, visionzip_selection
from tests.vectors import cases


def authors_source(tensors: dict[str, Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    """``[T, dominant]`` and ``[T, contextual]`` places, ascending, that the authors keep of each frame."""
    dominant = (tensors["out.all_indices"].long().sort(dim=1).values - 1)[:, 1:]  # without CLS
    others = [[place for place in range(tokens) if place not in kept] for kept in dominant.tolist()]
    return dominant, torch.tensor(others)[:, tensors["out.target_indices"].long()]


def test_authors_results() -> None:
    for hyper, tensors in cases("VisionZip"):
        hidden, keys = (tensors[name].float()[:, 1:] for name in ("in.hidden", "in.metric"))
        saliency = tensors["in.cls_attn"][:, :, 1:].mean(dim=1)
        frames, tokens = saliency.shape
        kept = hyper["dominant_num"] + hyper["contextual_num"]
        share = hyper["contextual_num"] / kept
        source, assignment = visionzip_selection(saliency, keys, frames * kept, share)
        dominant, target = authors_source(tensors, tokens)
        start = torch.arange(frames)[:, None] * tokens
        expected = torch.cat([start + dominant, start + target], dim=1)
        assert torch.equal(source, expected.flatten().sort().values)

        video = VideoFeatures(
            hidden.flatten(0, 1), (frames, 1, tokens), saliency=saliency.flatten()[None], keys=keys.flatten(0, 1)
        )
        reduced = VisionZip(retention=kept / tokens, contextual=share).reduce(video)
        assert torch.equal(reduced.source, source) and torch.equal(reduced.assignment, assignment)
        for frame in range(frames):
            inside = torch.ones(tokens, dtype=torch.bool)
            inside[torch.cat([dominant[frame], target[frame]])] = False
            absorbed = source[assignment.view(frames, tokens)[frame, inside]] - frame * tokens
            assert torch.equal(absorbed, target[frame, tensors["out.assign"][frame].long()])
            survivors = torch.searchsorted(source, expected[frame])
            ours = reduced.embeddings[survivors]
            # The authors' sum, target + mean(absorbed), from our mean of both.
            for slot in range(hyper["contextual_num"]):
                place = target[frame, slot]
                members = int((absorbed == place).sum())
                mean = ours[len(dominant[frame]) + slot]
                if members:
                    others = (mean * (members + 1) - hidden[frame, place]) / members
                    ours[len(dominant[frame]) + slot] = hidden[frame, place] + others
            torch.testing.assert_close(ours, tensors["out.tokens"][frame, 1:], atol=2e-4, rtol=0)


def test_the_others_go_to_the_contextual_token_with_the_most_similar_key() -> None:
    east, north = torch.eye(2)
    saliency = torch.tensor([[0.1, 0.9, 0.0, 0.0, 0.0]])
    keys = torch.stack([east, east, 3 * north, 2 * north, east])[None]
    source, assignment = visionzip_selection(saliency, keys, 3, 2 / 3)
    assert source.tolist() == [0, 1, 3] and assignment.tolist() == [0, 1, 2, 2, 0]
    video = VideoFeatures(torch.arange(5.0)[:, None], (1, 1, 5), saliency=saliency, keys=keys[0])
    reduced = VisionZip(retention=0.6, contextual=2 / 3).reduce(video)
    assert reduced.embeddings[:, 0].tolist() == [2.0, 1.0, 2.5]


def test_evenly_spaced() -> None:
    candidates = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]]).bool().expand(3, -1)
    spaced = evenly_spaced(candidates, torch.tensor([3, 0, 7]))
    assert [row.nonzero()[:, 0].tolist() for row in spaced] == [[0, 3, 5], [], [0, 1, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("retention", [0.02, 0.1, 0.3, 0.5, 0.99])
def test_frames_that_differ_in_their_number_of_contextual_tokens(retention: float) -> None:
    grid, generator = (5, 3, 3), torch.Generator().manual_seed(0)
    saliency, keys = torch.rand(5, 9, generator=generator), torch.randn(5, 9, 4, generator=generator)
    count = visionzip_count(grid, retention)
    source, assignment = visionzip_selection(saliency, keys, count, 0.3)
    assert source.shape == (count,) and torch.equal(assignment[source], torch.arange(count))
    absorbed = assignment >= 0
    assert torch.equal(source[assignment[absorbed]] // 9, torch.arange(45)[absorbed] // 9), "never across frames"


def test_without_contextual_tokens_the_others_are_dropped() -> None:
    saliency = torch.tensor([[0.0, 0.5, 0.5, 0.5]])
    _, assignment = visionzip_selection(saliency, torch.ones(1, 4, 2), 2, 0.0)
    assert assignment.tolist() == [-1, 0, 1, -1]
