"""CATP: the greedy search against the paper's formulas, written out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens.catp import CATP, catp_count, catp_order


def objective(unit: Tensor, alignment: Tensor, picks: list[int], weight: float) -> float:
    """Facility location plus weighted alignment, of one frame."""
    similarity = (unit @ unit.T + 1) / 2
    return float(similarity[picks].amax(dim=0).sum() + weight * alignment[picks].sum())


def test_each_pick_gains_most() -> None:
    generator = torch.Generator().manual_seed(0)
    unit = normalize(torch.randn(3, 14, 6, generator=generator, dtype=torch.float64), dim=-1)
    alignment = torch.rand(3, 14, generator=generator, dtype=torch.float64)
    for weight in (0.0, 0.7, 5.0):
        order = catp_order(unit, alignment, 10, weight)
        for frame in range(3):
            picks: list[int] = []
            for _ in range(10):
                rest = [i for i in range(14) if i not in picks]
                gains = [objective(unit[frame], alignment[frame], [*picks, i], weight) for i in rest]
                picks.append(rest[gains.index(max(gains))])
            assert order[frame].tolist() == picks


def test_covers_both_crowds() -> None:
    east, north = torch.eye(2)
    unit = torch.stack([east, east, east, north, north])[None]
    assert catp_order(unit, torch.zeros(1, 5), 3, 0.7).tolist() == [[0, 3, 1]]
    # With all weight on alignment, it is a ranking.
    alignment = torch.tensor([[0.1, 0.5, 0.9, 0.2, 0.6]])
    assert catp_order(unit, alignment, 5, 1e4).tolist() == [[2, 4, 1, 3, 0]]


def test_question_decides_between_equal_covers() -> None:
    east, north = torch.eye(2)
    tokens = torch.stack([east, north] * 2)
    for question, kept in ((east, [0, 2]), (north, [1, 3])):
        clip = VideoFeatures(tokens, (2, 1, 2), question=question[None])
        assert CATP(retention=0.5).reduce(clip).source.tolist() == kept


def test_budgets() -> None:
    assert catp_count(576, CATP().retention) == 351  # the paper's floor(576 * (1 - .778 / 2))
    clip = VideoFeatures(torch.eye(6), (3, 1, 2), question=torch.eye(6)[4:5])
    # Less than a token per frame: the frame that aligns best with the question, and there what aligns best.
    assert CATP(retention=0.2).reduce(clip).source.tolist() == [4]
    assert CATP(retention=0.7).reduce(clip).source.tolist() == [0, 2, 4, 5]
