"""DTD: the authors' vectors, and what is dropped of a clip that hardly moves."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens.dtd import DTD, dtd_count, dtd_mask, dtd_selection
from spatiotoken.tokens.merging import paired_cosine
from tests.vectors import cases


def test_authors_results() -> None:
    for hyper, tensors in cases("DTD"):
        frames = tensors["in.features"].float()
        count, places = frames.shape[:2]
        if hyper["absolute"]:
            kept = dtd_mask(frames, hyper["threshold"]).flatten().nonzero()[:, 0]
            method = DTD(threshold=hyper["threshold"])
        else:
            retention = 1 - hyper["threshold"]
            kept = dtd_selection(frames, dtd_count(places, retention))
            method = DTD(retention=retention)
        expected = tensors["out.kept"].long()
        assert torch.equal(kept, expected)
        assert torch.equal(method.reduce(VideoFeatures(frames.flatten(0, 1), (count, 1, places))).source, expected)


@pytest.mark.parametrize("places", [1, 10, 49, 64, 110, 196, 730])
def test_relative_count_is_the_authors(places: int) -> None:
    for percent in range(100):
        dropped = percent / 100
        assert places - dtd_count(places, 1 - dropped) == int(places * dropped)
        assert dtd_count(places, round(1 - dropped, 2)) == dtd_count(places, 1 - dropped)


def test_compares_with_the_frame_just_before() -> None:
    east, north = torch.eye(2)
    # Place 0 turns once and stays; place 1 turns in every frame; place 2 turns back after one frame.
    clip = torch.stack(
        [
            torch.stack([east, east, east]),
            torch.stack([north, north, north]),
            torch.stack([5 * north, east, east]),
        ]
    )
    assert dtd_mask(clip, 0.5).tolist() == [[True] * 3, [True] * 3, [False, True, True]]
    assert dtd_selection(clip, 2).tolist() == [0, 1, 2, 3, 4, 7, 8]  # all equal in frame 1: the lowest come first


def test_threshold_itself_is_kept_and_one_keeps_all() -> None:
    still = VideoFeatures(torch.ones(3, 4).repeat(4, 1), (4, 1, 3))
    assert DTD(threshold=0.99).reduce(still).source.tolist() == [0, 1, 2]
    assert DTD(threshold=1).reduce(still).embeddings is still.embeddings
    assert DTD(retention=0.01).reduce(still).source.shape == (3 + 3 * 1,)  # int(3 * 0.99) of three are dropped
    blank = torch.zeros(2, 3, 4)
    assert paired_cosine(blank[0], blank[1]).tolist() == [0, 0, 0]
    assert bool(dtd_mask(blank, 0.0).all()) and dtd_mask(blank, -0.1).tolist() == [[True] * 3, [False] * 3]


def test_retention_replaces_the_threshold() -> None:
    clip = VideoFeatures(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), (4, 2, 4))
    for threshold in (-1.0, 0.5, 1.0):
        assert DTD(threshold=threshold, retention=0.5).reduce(clip).source.shape == (8 + 3 * 4,)
    for bad in ({"retention": 0}, {"retention": 1.5}, {"threshold": 1.1}, {"threshold": -2}, {"retention": True}):
        with pytest.raises(ValidationError):
            DTD(**bad)  # type: ignore[arg-type]
