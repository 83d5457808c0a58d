"""HoliTom's inner merge: the authors' result, and the same folded token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spatiotoken.layers.holitom_merge import HoliTomMerge, folded, holitom_merge, holitom_merge_count
from spatiotoken.structures import LayerTokens
from tests.vectors import cases


def test_authors_results() -> None:
    for hyper, tensors in cases("HoliTom", "inner"):
        first, count = hyper["image_start"], hyper["image_len"]
        own = slice(first, first + count)
        hidden = tensors["in.hidden"].float()
        attention = tensors["in.last_query_attn_head_mean"][None, own]
        method = HoliTomMerge(layer=18, retention=1 - hyper["HOLITOM_r"])
        left = method.reduce(LayerTokens(18, count, attention=attention, hidden=hidden[own], depth=28), None)
        assert torch.equal(first + left.kept, tensors["out.top_idx_unsorted"].long().sort().values)
        assert left.hidden is not None and left.assignment is not None
        assert torch.equal(left.assignment[left.kept], torch.arange(len(left.kept)))
        # Their rows hold the words as well.
        kept = tensors["out.keep_indices"].long()
        visual = (kept >= first) & (kept < first + count)
        assert torch.equal(kept[visual], first + left.kept)
        torch.testing.assert_close(left.hidden, tensors["out.hidden_merged"][visual], atol=2e-4, rtol=0)


def one_by_one(hidden: Tensor, scores: Tensor, count: int) -> tuple[list[int], Tensor]:
    """The mean of two, token after token."""
    order = sorted(range(len(scores)), key=lambda token: (-scores[token].item(), token))
    kept = sorted(order[:count])
    values = {token: hidden[token].double() for token in kept}
    for token in sorted(order[count:]):
        best = torch.cosine_similarity(hidden[token][None], hidden[kept], dim=1).argmax()
        values[kept[int(best)]] = (values[kept[int(best)]] + hidden[token]) / 2
    return kept, torch.stack([values[token] for token in kept])


@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (2, 1), (9, 4), (50, 25), (300, 2), (60, 59), (60, 60)])
def test_equals_folding_one_by_one(tokens: int, count: int) -> None:
    generator = torch.Generator().manual_seed(tokens + count)
    hidden = torch.randn(tokens, 5, generator=generator)
    scores = torch.rand(tokens, generator=generator)
    kept, merged, assignment = holitom_merge(hidden, scores, count)
    expected, values = one_by_one(hidden, scores, count)
    assert kept.tolist() == expected
    torch.testing.assert_close(merged.double(), values, atol=1e-5, rtol=1e-5)
    assert torch.equal(assignment[kept], torch.arange(count)) and assignment.min() >= 0
    lone = torch.bincount(assignment, minlength=count) == 1
    assert torch.equal(merged[lone], hidden[kept[lone]])


def test_each_fold_halves_what_came_before() -> None:
    # Three ones into a nought: the authors' 0.875, where the mean of all would be 0.75.
    hidden = torch.tensor([[1.0], [0.0], [1.0], [1.0]])
    merged, assignment = folded(hidden, torch.tensor([1]), torch.tensor([0, 2, 3]), torch.tensor([0, 0, 0]))
    assert merged.tolist() == [[0.875]] and assignment.tolist() == [0, 0, 0, 0]
    hidden = torch.tensor([[16.0], [0.0], [8.0], [32.0], [5.0]])
    merged, assignment = folded(hidden, torch.tensor([1, 4]), torch.tensor([0, 2, 3]), torch.tensor([0, 1, 0]))
    assert merged.tolist() == [[(16 / 2 + 32) / 2], [6.5]] and assignment.tolist() == [0, 0, 1, 0, 1]


def test_layers_and_counts() -> None:
    assert HoliTomMerge().prune_layers(28) == (18,)
    assert [holitom_merge_count(tokens, 0.5) for tokens in (1, 3, 5, 7, 64)] == [1, 2, 2, 4, 32]
    with pytest.raises(ValueError, match=r"layers\.layer"):
        HoliTomMerge(layer=0).prune_layers(4)


def test_small_level_and_all() -> None:
    hidden = torch.randn(6, 3, generator=torch.Generator().manual_seed(4)).bfloat16()
    level = LayerTokens(2, 6, attention=torch.full((2, 6), 0.1), hidden=hidden, depth=4)
    left = HoliTomMerge(layer=2).reduce(level, None)
    assert left.kept.tolist() == [0, 1, 2]
    assert left.hidden is not None and left.hidden.dtype == torch.bfloat16
    everything = HoliTomMerge(layer=2, retention=1.0).reduce(level, None)
    assert everything.kept.tolist() == list(range(6)) and everything.hidden is None
    one = LayerTokens(2, 1, attention=torch.ones(2, 1), hidden=hidden[:1], depth=4)
    assert HoliTomMerge(layer=2, retention=0.1).reduce(one, None).kept.tolist() == [0]
