"""MustDrop's filter, done token by token, and its key tokens from layer to layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spatiotoken.layers.mustdrop import MustDrop, mustdrop_mask, mustdrop_scores
from spatiotoken.structures import LayerTokens


def entering(layer: int, given: Tensor, asking: list[bool], depth: int = 32) -> LayerTokens:
    """``t`` words, then ``n`` visual tokens (never mind causality); attention ``given [heads, t, n]``."""
    heads, words, count = given.shape
    whole = torch.full((heads, words + count, words + count), 9.0)
    whole[:, :words, words:] = given
    return LayerTokens(
        layer,
        count,
        depth=depth,
        length=words + count,
        places=torch.arange(words, words + count),
        text=torch.arange(words),
        asking=torch.tensor(asking),
        weights=lambda rows, entering: whole[:, rows] if not entering else whole[:, :0],
    )


def test_scores_are_those_of_words_that_ask() -> None:
    generator = torch.Generator().manual_seed(0)
    given = torch.rand(3, 70, 11, generator=generator)
    asking = torch.arange(70) >= 20
    total, peak = mustdrop_scores(given.split(32, dim=1), asking.split(32))
    for token in range(11):
        mean = given[:, 20:, token].mean(dim=0)
        assert total[token] == pytest.approx(mean.sum().item(), abs=1e-5)
        assert peak[token] == pytest.approx(mean.max().item())


def test_both_must_be_small() -> None:
    total, peak = torch.tensor([0.1, 0.1, 0.5, 0.3]), torch.tensor([0.05, 0.1, 0.05, 0.05])
    nobody = torch.zeros(4, dtype=torch.bool)
    # Only the first and the last have less than 0.35 of 1 and nobody who looks at them with 0.1.
    assert mustdrop_mask(total, peak, nobody, 0.35, 0.1).tolist() == [False, True, True, False]
    key = torch.tensor([True, False, False, False])
    assert mustdrop_mask(total, peak, key, 0.35, 0.1).tolist() == [True, True, True, False]
    assert mustdrop_mask(total, peak, nobody, 0.35, 0.0).all()
    assert mustdrop_mask(total, peak, nobody, 0.0, 1.0).all()


def test_thresholds_count_from_the_average() -> None:
    # Four tokens of 1, 2, 3 and 10 sixteenths of two words' attention; the word before the pictures does not count.
    share = torch.tensor([1.0, 2.0, 3.0, 10.0]) / 16
    given = torch.stack([torch.tensor([0.9, 0.0, 0.0, 0.1]), 0.8 * share, 0.2 * share])[None]
    tokens = entering(2, given, [False, True, True], depth=4)
    # Of the average of a quarter: below a half go two of them, below one three, below three all but the key token.
    for overall, kept in ((0.2, [0, 1, 2, 3]), (0.4, [1, 2, 3]), (0.51, [2, 3]), (1.0, [3]), (9.0, [3])):
        method = MustDrop(layers=(2,), overall=overall, individual=4.0)
        assert method.reduce(tokens, None).kept.tolist() == kept
    # The second token's best is 0.1, 0.4 of a quarter.
    assert MustDrop(layers=(2,), overall=1.0, individual=0.39).reduce(tokens, None).kept.tolist() == [1, 2, 3]


def test_key_tokens_stay_for_good() -> None:
    method = MustDrop(layers=(1, 2), overall=9.0, individual=9.0, key_share=0.3)
    first = method.reduce(entering(1, torch.tensor([[[0.1, 0.4, 0.1, 0.3, 0.2]]]), [True], depth=4), None)
    assert first.kept.tolist() == [1, 3] and first.memory.tolist() == [True, True]
    milder = MustDrop(layers=(1, 2), overall=0.9, individual=9.0, key_share=0.2)
    first = milder.reduce(entering(1, torch.tensor([[[0.1, 0.4, 0.1, 0.3, 0.2]]]), [True], depth=4), None)
    assert first.kept.tolist() == [1, 3, 4] and first.memory.tolist() == [True, False, False]
    second = milder.reduce(entering(2, torch.tensor([[[0.0, 0.5, 0.0]]]), [True], depth=4), first.memory)
    assert second.kept.tolist() == [0, 1] and second.memory.tolist() == [True, False]


def test_authors_setting() -> None:
    method = MustDrop()
    assert method.prune_layers(32) == (3, 7, 11, 15) and method.prune_layers(28) == (3, 6, 10, 13)
    assert method.trims_cache() and not MustDrop(trim=False).trims_cache()
    generator = torch.Generator().manual_seed(3)
    given = 0.0004 * torch.rand(4, 9, 576, generator=generator) ** 3
    given[..., ::5] *= 20
    left = method.reduce(entering(3, given, [True] * 9), None)
    mean = given.mean(dim=0)
    total = mean.sum(dim=0)
    dropped = (total < 0.001 * total.sum()) & (mean.amax(dim=0) < 0.001)
    dropped[total.argsort(descending=True)[:47]] = False  # 8 % of 576, rounded up
    assert torch.equal(left.kept, (~dropped).nonzero()[:, 0])
    assert 47 < left.kept.shape[0] < 300


def test_small_and_level() -> None:
    one = entering(1, torch.full((1, 1, 1), 0.5), [True], depth=2)
    assert MustDrop(layers=(1,), overall=9.0, individual=9.0).reduce(one, None).kept.tolist() == [0]
    level = entering(1, torch.full((2, 2, 8), 0.125), [True, True], depth=2)
    assert MustDrop(layers=(1,), overall=2.0, individual=9.0).reduce(level, None).kept.tolist() == [0]
    assert MustDrop(layers=(1,), overall=0.0).reduce(level, None).kept.tolist() == list(range(8))
    assert MustDrop(layers=(1,), overall=9.0, individual=0.0).reduce(level, None).kept.tolist() == list(range(8))


def test_nobody_asks() -> None:
    silent = entering(1, torch.zeros(2, 0, 4), [], depth=2)
    assert MustDrop(layers=(1,), overall=9.0, individual=9.0).reduce(silent, None).kept.tolist() == [0, 1, 2, 3]
