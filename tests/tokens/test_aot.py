"""AOT's choice of anchors against the authors' results, and the whole."""

from __future__ import annotations

import torch

from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens.aot import AOT, aot_anchors, aot_count, aot_counts, local_anchors
from spatiotoken.tokens.transport import merge_clips, merge_into_anchors
from tests.vectors import cases


def clip(grid: tuple[int, int, int], dim: int = 16, seed: int = 0) -> VideoFeatures:
    generator = torch.Generator().manual_seed(seed)
    tokens = grid[0] * grid[1] * grid[2]
    saliency = torch.rand(2, tokens, generator=generator)
    return VideoFeatures(torch.randn(tokens, dim, generator=generator), grid, saliency=saliency)


def test_authors_vectors_of_windows() -> None:
    for hyper, tensors in cases("AOT", "window"):
        windows = 27 // hyper["window_size"]
        mask = local_anchors(tensors["in.attn"], (27, 27), windows, hyper["visual_token_num"] // windows**2)
        chosen = mask.nonzero()[:, 1].view(2, -1)
        assert torch.equal(chosen, tensors["out.local_indices"].long().sort(dim=1).values)


def test_anchors_are_local_and_global() -> None:
    early = torch.tensor([[1.0, 0.0, 0.0, 0.0, 3.0, 2.0, 0.0, 0.0, 4.0, 0.0, 0.0, 0.0]])
    late = torch.tensor([[0.0, 1.0, 5.0, 2.0, 0.0, 9.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0]])
    # 2 x 6 places, two windows each way: (0 1 2)(3 4 5) above (6 7 8)(9 10 11).
    assert local_anchors(early, (2, 6), 2, 1).nonzero()[:, 1].tolist() == [0, 4, 8, 9]
    assert aot_anchors(early, late, (2, 6), 6, 0.7, 2).tolist() == [[0, 2, 4, 5, 8, 9]]
    # Too few for the windows: all are global, of equals the first.
    assert aot_anchors(early, late, (2, 6), 3, 0.5, 2).tolist() == [[2, 5, 8]]


def test_counts() -> None:
    # The authors' clips; 41 of 196 anchors and 12 of a later frame: (41 + 3 * 12) / (4 * 196) = 0.098.
    assert aot_counts((32, 14, 14), 0.1, 0.3, 8) == (4, 41, 12)
    assert aot_counts((64, 14, 14), 0.1, 0.3, 8)[0] == 8
    assert aot_counts((10, 3, 3), 0.5, 0.3, 8) == (2, 7, 2)
    assert aot_counts((1, 5, 5), 0.2, 0.3, 8) == (1, 5, 2)
    # All tokens are anchors and the budget is not spent: later frames keep more.
    assert aot_counts((16, 2, 2), 0.9, 0.3, 8) == (2, 4, 3)
    # Less than a token for each clip: fewer clips.
    assert aot_count((32, 2, 2), 0.03, 0.3, 8) == 3
    for retention in (0.001, 0.1, 0.37, 0.99):
        for grid in ((1, 1, 1), (7, 3, 5), (33, 4, 4), (64, 1, 9)):
            total = grid[0] * grid[1] * grid[2]
            assert 1 <= aot_count(grid, retention, 0.3, 8) <= max(1, total * retention)


def test_reduce_is_the_parts_in_place() -> None:
    """A last clip that is shorter, anchors of several frames, and what later frames keep."""
    video = clip((7, 4, 5))
    method = AOT(retention=0.3, clips=3)
    length, count, kept = aot_counts(video.grid, 0.3, 0.3, 3)
    assert 7 % length and 0 < kept < count < 20
    reduced = method.reduce(video)
    assert video.saliency is not None
    early, late = video.saliency.view(2, 7, 20)
    anchors = aot_anchors(early, late, (4, 5), count, 0.5, 3)
    values, owner = merge_into_anchors(video.frames, anchors, 4, 5)
    merged, stays, heir = merge_clips(values, length, kept)
    frame, place = stays.nonzero(as_tuple=True)
    assert torch.equal(reduced.source, frame * 20 + anchors[frame, place])
    for row, (at, anchor) in enumerate(zip(frame.tolist(), place.tolist(), strict=True)):
        expected = values[at, anchor] if at % length else merged[at // length, anchor]
        assert torch.equal(reduced.embeddings[row], expected)
    for at in range(7):
        for token in range(20):
            anchor = int(owner[at, token])
            if stays[at, anchor]:
                expected = at * 20 + int(anchors[at, anchor])
            else:
                first = at - at % length
                expected = first * 20 + int(anchors[first, heir[at, anchor]])
            assert reduced.source[reduced.assignment[at * 20 + token]] == expected


def test_a_still_scene_becomes_its_first_frame() -> None:
    frame = clip((1, 3, 3))
    assert frame.saliency is not None
    video = VideoFeatures(frame.embeddings.repeat(4, 1), (4, 3, 3), saliency=frame.saliency.repeat(1, 4))
    reduced = AOT(retention=0.25, keep=0.0, clips=1).reduce(video)
    assert reduced.source.tolist() == list(range(9))
    assert torch.equal(reduced.assignment, torch.arange(9).repeat(4))


def test_wants_an_early_and_a_late_layer() -> None:
    assert AOT().saliency_layers(26) == (5, 25)
    assert AOT().saliency_layers(1) == (0, 0)
