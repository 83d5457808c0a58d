"""Features of pictures and the tokens that stand for them, also after newlines and beam search."""

from __future__ import annotations

import pytest
import torch

from spatiotoken.layout import at_places, bearers_at

ITEMS = (torch.tensor([0, 0, 2]), torch.tensor([0, -1]), torch.tensor([1, 1]))


def places(*counts: int) -> torch.Tensor:
    return torch.arange(9) < torch.tensor(counts)[:, None]


def test_items_go_to_their_samples() -> None:
    assert [len(item) for item in at_places(ITEMS, places(5, 2))] == [3, 2, 2]
    assert bearers_at(ITEMS, places(5, 2)).tolist() == [0, 0, 2, 3, -1, 6, 6]
    # Newlines that come later bear themselves.
    assert bearers_at(ITEMS, places(7, 3)).tolist() == [0, 0, 2, 3, 4, -1, 6, 8, 8, 9]
    # Two beams a sample, one after the other.
    assert [len(item) for item in at_places(ITEMS, places(5, 5, 2, 2))] == [3, 2, 3, 2, 2, 2]


@pytest.mark.parametrize("counts", [(4, 2), (6, 1), (1, 6), (2, 5)])
def test_what_does_not_fit_is_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        at_places(ITEMS, places(*counts))
