"""What many methods share: pairs, the best of a row with ties to the lowest index, and shares of a budget."""

from __future__ import annotations

import pytest
import torch

from spatiotoken.tokens.budgets import apportion
from spatiotoken.tokens.divprune import divprune_order, loneliest
from spatiotoken.tokens.merging import (
    mean_by_assignment,
    nearest,
    paired_cosine,
    paired_dot,
    previous_cosine,
    top_indices,
    top_mask,
    true_indices,
)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("count", [0, 1, 4, 9, 12])
def test_best_of_each_row(count: int, largest: bool) -> None:
    scores = torch.randint(0, 4, (20, 12), generator=torch.Generator().manual_seed(count)).float()
    order = scores.argsort(dim=1, descending=largest, stable=True)[:, :count].sort(dim=1).values
    mask = top_mask(scores, count, largest=largest)
    assert torch.equal(top_indices(scores, count, largest=largest), order)
    assert torch.equal(true_indices(mask, count), order) and (mask.sum(dim=1) == count).all()


def test_what_is_not_a_number_comes_last() -> None:
    scores = torch.tensor([torch.nan, 1.0, 3.0, torch.nan, 2.0, -torch.inf])
    assert top_indices(scores, 3).tolist() == [1, 2, 4]
    assert top_indices(scores, 2, largest=False).tolist() == [1, 5]


def test_pairs() -> None:
    frames = torch.randn(5, 7, 16)
    expected = torch.cosine_similarity(frames[1:], frames[:-1], dim=-1)
    torch.testing.assert_close(paired_cosine(frames[1:], frames[:-1]), expected)
    torch.testing.assert_close(previous_cosine(frames), expected)
    torch.testing.assert_close(paired_dot(frames[::2], frames[::2]), frames[::2].square().sum(dim=-1))
    torch.testing.assert_close(paired_dot(frames, frames[:1]), (frames * frames[:1]).sum(dim=-1))
    still = torch.randn(1, 7, 16).expand(3, -1, -1).contiguous()
    assert (previous_cosine(still) == 1).all() and (previous_cosine(torch.zeros(3, 2, 4)) == 0).all()


def test_nearest_is_by_angle() -> None:
    anchors = torch.tensor([[1.0, 0.0], [0.0, 5.0], [0.0, 1.0]])
    queries = torch.tensor([[9.0, 1.0], [0.1, 0.2], [3.0, 3.1]])
    assert nearest(queries, anchors).tolist() == nearest(queries, anchors, chunk=1).tolist() == [0, 1, 1]


def test_means_of_many() -> None:
    values, assignment = torch.randn(500, 8), torch.randint(-1, 40, (500,))
    merged = mean_by_assignment(values, assignment, 40)
    for survivor in range(40):
        torch.testing.assert_close(merged[survivor], values[assignment == survivor].mean(dim=0))


def test_loneliest_has_the_farthest_neighbour() -> None:
    for seed, size in enumerate((1, 2, 50, 700)):
        unit = torch.nn.functional.normalize(torch.randn(size, 6, generator=torch.Generator().manual_seed(seed)), dim=1)
        likeness = (unit @ unit.T).fill_diagonal_(-torch.inf)
        assert loneliest(unit).tolist() == [int(likeness.amax(dim=1).argmin())]


def test_without_waiting_the_search_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randn(900, 12, generator=torch.Generator().manual_seed(0))
    expected = divprune_order(tokens, 300)
    for module in ("divprune", "todre"):
        monkeypatch.setattr(f"spatiotoken.tokens.{module}.waits_are_free", lambda device: False)
    assert torch.equal(divprune_order(tokens, 300), expected)
    assert divprune_order(torch.ones(5, 3), 5).tolist() == [0, 1, 2, 3, 4]
    assert divprune_order(torch.ones(1, 3), 1).tolist() == [0]


def test_shares_of_a_budget() -> None:
    assert apportion(10, torch.tensor([3.0, 1.0, 1.0]), 10).tolist() == [6, 2, 2]
    assert apportion(10, torch.tensor([3.0, 1.0, 1.0]), 4).tolist() == [4, 3, 3]
    assert apportion(1, torch.ones(3), 5).tolist() == [1, 0, 0]
