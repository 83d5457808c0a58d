"""Dividing budgets between frames and tiles."""

from __future__ import annotations

import pytest
import torch

from spatiotoken.tokens.budgets import (
    apportion,
    even_quotas,
    first_picks,
    group_sums,
    ranks,
    top_of_groups,
    whole_share,
)
from spatiotoken.tokens.merging import question_direction
from spatiotoken.tokens.views import tile_of_joined, tile_of_whole


def test_whole_share() -> None:
    assert [whole_share(100, ratio) for ratio in (0.29, 0.999, 0.001, 1.0)] == [29, 99, 1, 100]


@pytest.mark.parametrize(
    ("budget", "weights", "capacity", "expected"),
    [
        (6, [1, 1, 1], 9, [2, 2, 2]),
        (5, [1, 1, 1], 9, [2, 2, 1]),
        (1, [1, 3, 3], 9, [0, 1, 0]),
        (8, [4, 2, 1, 1], 9, [4, 2, 1, 1]),
        (8, [4, 2, 1, 1], 3, [3, 3, 1, 1]),
        (6, [1, 0, 0], 2, [2, 2, 2]),
        (9, [7, 0, 1], 3, [3, 3, 3]),
    ],
)
def test_apportion(budget: int, weights: list[float], capacity: int, expected: list[int]) -> None:
    assert apportion(budget, torch.tensor(weights), capacity).tolist() == expected


def test_what_is_left_over_goes_to_the_highest_scores() -> None:
    scores = torch.tensor([0.1, 0.9, 0.5, 0.9])
    assert ranks(scores).tolist() == [3, 0, 2, 1]
    assert even_quotas(6, scores, 4).tolist() == [1, 2, 1, 2]
    assert even_quotas(1, scores, 4).tolist() == [0, 1, 0, 0]


def test_first_picks() -> None:
    order = torch.tensor([[2, 0], [1, 3], [3, 2]])
    assert first_picks(order, torch.tensor([2, 0, 1]), 4, 3).tolist() == [0, 2, 8 + 3]


def test_top_of_groups() -> None:
    scores = torch.tensor([0.1, 0.5, 0.5, 0.9, 0.5, 0.2])
    group = torch.tensor([2, 0, 0, 2, 0, 2])
    assert top_of_groups(scores, group, torch.tensor([2, 5, 1])).nonzero()[:, 0].tolist() == [1, 2, 3]
    assert top_of_groups(scores, group, torch.tensor([0, 0, 3])).nonzero()[:, 0].tolist() == [0, 3, 5]


def test_group_sums() -> None:
    values, group = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([2, 0, 2])
    assert group_sums(values, group, 3).tolist() == [[3, 4], [0, 0], [6, 8]]


def test_direction_of_an_empty_question() -> None:
    assert question_direction(torch.zeros(0, 3)).tolist() == [0, 0, 0]
    assert question_direction(torch.tensor([[1.0, 4.0], [5.0, 4.0]])).tolist() == pytest.approx([0.6, 0.8])


def test_tiles_of_a_joined_picture() -> None:
    rows = tile_of_joined((4, 4), (2, 2), (2, 2)).view(4, 4)
    assert rows.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    # Three tiles of 4 lines, of whose 12 lines 2 at either end were padding.
    padded = tile_of_joined((8, 4), (3, 1), (4, 4)).view(8, 4)[:, 0]
    assert padded.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    # The same, halved afterwards.
    halved = tile_of_joined((4, 2), (3, 1), (4, 4)).view(4, 2)[:, 0]
    assert halved.tolist() == [0, 1, 1, 2]


def test_tiles_of_the_whole_view() -> None:
    tile = tile_of_joined((8, 4), (3, 1), (4, 4))
    # Each of the 4 lines shows 2 of the 8: the outer tiles are worth one line each, for half of them is padding.
    assert tile_of_whole((4, 4), (8, 4), tile).view(4, 4)[:, 0].tolist() == [0, 1, 1, 2]
    square = tile_of_joined((24, 24), (2, 2), (12, 12))
    quarters = tile_of_whole((12, 12), (24, 24), square).view(12, 12)
    assert (quarters[:6, :6] == 0).all() and (quarters[:6, 6:] == 1).all()
    assert (quarters[6:, :6] == 2).all() and (quarters[6:, 6:] == 3).all()
