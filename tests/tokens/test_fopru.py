"""FoPru: single tokens against whole rows."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens.fopru import FoPru, fopru_count, fopru_order, fopru_selection

SALIENCY = torch.tensor([[[9.0, 0, 0], [4, 3, 5], [0, 8, 0]]])  # rows sum to 9, 12, 8


def test_rank_and_row() -> None:
    assert fopru_order(SALIENCY, "rank").tolist() == [[0, 7, 5, 3, 4, 1, 2, 6, 8]]
    assert fopru_order(SALIENCY, "row").tolist() == [[5, 3, 4, 0, 1, 2, 7, 6, 8]]
    assert fopru_selection(SALIENCY, "rank", 3).tolist() == [0, 5, 7]
    assert fopru_selection(SALIENCY, "row", 3).tolist() == [3, 4, 5]
    assert fopru_selection(SALIENCY, "row", 6).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_broken_row_gives_its_most_salient_tokens() -> None:
    assert fopru_selection(SALIENCY, "row", 2).tolist() == [3, 5]
    assert fopru_selection(SALIENCY, "row", 4).tolist() == [0, 3, 4, 5]


def test_every_frame_has_its_own_rows() -> None:
    saliency = torch.cat([SALIENCY, SALIENCY.flip(1), torch.ones(1, 3, 3)])
    video = VideoFeatures(torch.randn(27, 4), (3, 3, 3), saliency=saliency.flatten()[None])
    reduced = FoPru(retention=1 / 3, granularity="row").reduce(video)
    assert reduced.source.tolist() == [3, 4, 5, 12, 13, 14, 18, 19, 20]
    assert fopru_count(video.grid, 1 / 3) == 9
    assert torch.equal(reduced.embeddings, video.embeddings[reduced.source])


def test_the_layer_before_the_last() -> None:
    assert FoPru().saliency_layers(24) == (22,) and FoPru().saliency_layers(2) == (0,)
    assert FoPru().saliency_layers(1) == (0,)
    assert FoPru().attention == "received"
    with pytest.raises(ValidationError, match="granularity"):
        FoPru(granularity="column")
