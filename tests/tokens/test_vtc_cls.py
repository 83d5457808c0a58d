"""VTC-CLS: which layers are summed, and how the budget is shared between frames."""

from __future__ import annotations

import pytest
import torch

from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens.budgets import frame_budgets
from spatiotoken.tokens.vtc_cls import VtcCls, vtc_cls_count, vtc_cls_selection


def test_layers_from_a_share_of_the_depth() -> None:
    assert VtcCls(start=0.5).saliency_layers(24) == tuple(range(12, 24))
    assert VtcCls(start=0).saliency_layers(3) == (0, 1, 2)
    assert VtcCls(start=0.9).saliency_layers(5) == (4,)
    assert VtcCls(start=0.9999999999999999).saliency_layers(24) == (23,)
    assert VtcCls().saliency_layers(1) == (0,)


def test_the_layers_are_summed() -> None:
    # No layer alone would choose tokens 2 and 3 of frame 0.
    saliency = torch.tensor([[9.0, 0, 5, 5, 1, 1, 1, 0], [0, 9.0, 5, 5, 0, 0, 3, 1]])
    video = VideoFeatures(torch.randn(8, 4), (2, 2, 2), saliency=saliency)
    assert VtcCls(retention=0.5).reduce(video).source.tolist() == [2, 3, 4, 6]
    reduced = VtcCls(retention=0.5).reduce(video)
    assert torch.equal(reduced.embeddings, video.embeddings[reduced.source])


@pytest.mark.parametrize("frames", [1, 2, 7, 64])
@pytest.mark.parametrize("count", [1, 5, 64, 1000])
def test_budgets_differ_by_one_at_most(count: int, frames: int) -> None:
    budgets = frame_budgets(count, frames)
    assert sum(budgets) == count and max(budgets) - min(budgets) <= 1 and len(budgets) == frames


def test_count() -> None:
    assert vtc_cls_count((1, 24, 24), 64 / 576) == 64
    assert vtc_cls_count((1, 10, 10), 0.29) == 29  # 0.29 * 100 is 28.999999999999996
    assert vtc_cls_count((8, 7, 7), 0.25) == 98
    assert vtc_cls_count((4, 3, 3), 0.01) == 1


def test_ties_and_less_than_a_token_a_frame() -> None:
    assert vtc_cls_selection(torch.ones(2, 4), 4).tolist() == [0, 1, 4, 5]
    assert vtc_cls_selection(torch.tensor([[0.0, 1], [2, 0], [0, 3], [4, 0]]), 2).tolist() == [2, 6]
