"""Segments and trees on examples whose answer is evident."""

from __future__ import annotations

import torch

from spatiotoken.tokens.segments import (
    frame_similarities,
    segment_bounds,
    segment_frames,
    tree_links,
    tree_roots,
)


def test_cuts_below_the_threshold_and_then_at_the_least_similar() -> None:
    similarities = torch.tensor([0.99, 0.5, 0.97, 0.95, 0.98])
    assert segment_frames(similarities, 1, 0.9).tolist() == [0, 0, 1, 1, 1, 1]
    assert segment_frames(similarities, 3, 0.9).tolist() == [0, 0, 1, 1, 2, 2]
    assert segment_frames(similarities, 1, 0.96).tolist() == [0, 0, 1, 1, 2, 2]


def test_equal_frames_are_cut_at_the_first() -> None:
    assert segment_frames(torch.ones(4), 3, 0.9).tolist() == [0, 1, 2, 2, 2]


def test_fewer_frames_than_segments_get_one_each() -> None:
    for frames in (1, 2, 5):
        similarities = frame_similarities(torch.eye(frames) + 1)
        assert segment_frames(similarities, 8, -1.0).tolist() == list(range(frames))


def test_zero_frames_are_like_nothing() -> None:
    assert frame_similarities(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])).tolist() == [0, 0]


def test_bounds() -> None:
    first, stop = segment_bounds(torch.tensor([0, 0, 1, 2, 2, 2]))
    assert first.tolist() == [0, 0, 2, 3, 3, 3]
    assert stop.tolist() == [2, 2, 3, 6, 6, 6]


def test_trees_follow_an_object_but_not_across_a_cut() -> None:
    """The same three tokens, one place further in each frame; the fourth frame begins a segment."""
    unit = torch.stack([torch.eye(3).roll(shift, 0) for shift in (0, 1, 2, 3)])
    links = tree_links(unit, torch.tensor([0, 0, 0, 1]), 0.8, 0)
    assert links.tolist() == [[-1, -1, -1], [2, 0, 1], [2, 0, 1], [-1, -1, -1]]
    assert tree_roots(links).tolist() == [0, 1, 2, 2, 0, 1, 1, 2, 0, 9, 10, 11]


def test_long_chains_have_one_root() -> None:
    for frames in (2, 3, 17, 64):
        links = torch.zeros(frames, 1, dtype=torch.int64)
        links[0] = -1
        assert not tree_roots(links).any()


def test_links_never_leave_fewer_roots_than_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    scene = torch.nn.functional.normalize(torch.randn(1, 12, 16, generator=generator), dim=-1)
    unit = torch.nn.functional.normalize(scene + 0.1 * torch.randn(7, 12, 16, generator=generator), dim=-1)
    segments = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    for least in (0, 3, 11):
        roots = (tree_links(unit, segments, 0.5, least) < 0).sum(dim=1)
        for segment, frames in enumerate((4, 2, 1)):
            # Twelve trees without a limit; where it has to rise, it excludes the link that it is taken from as well.
            asked = least * frames
            assert roots[segments == segment].sum() == (12 if asked <= 12 else asked + 1)
