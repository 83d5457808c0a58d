"""SparseVLM: the authors' ranking and clusters, and who goes where on hand-made attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spatiotoken.layers.mustdrop import ROWS
from spatiotoken.layers.sparsevlm import (
    SparseVLM,
    recycled_counts,
    sparsevlm_clusters,
    sparsevlm_relevance,
    text_raters,
)
from spatiotoken.structures import LayerTokens
from spatiotoken.tokens.merging import mean_by_assignment, top_mask
from tests.vectors import cases


def entering(layer: int, given: Tensor, hidden: Tensor, depth: int = 32, first: int = 0) -> LayerTokens:
    """``n`` visual tokens, then ``t`` words that gave them attention ``given [heads, t, n]``.

    Args:
        hidden: ``[n + t, D]``.
        first: how many tokens there were at the start; ``n`` by default.
    """
    heads, words, count = given.shape
    whole = torch.zeros(heads, count + words, count + words)
    whole[:, count:, :count] = given
    return LayerTokens(
        layer,
        first or count,
        hidden=hidden[:count],
        depth=depth,
        length=count + words,
        places=torch.arange(count),
        text=torch.arange(count, count + words),
        asking=torch.ones(words, dtype=torch.bool),
        rows=lambda rows: hidden[rows],
        weights=lambda rows, entering: whole[:, rows],
    )


def test_authors_ranking() -> None:
    for hyper, tensors in cases("SparseVLM", "rank"):
        given = tensors["in.attn_rows"].float()
        raters = torch.ones(given.shape[1], dtype=torch.bool)
        relevance = sparsevlm_relevance(given.sum(dim=1), raters, heads=1.0)
        torch.testing.assert_close(relevance, tensors["out.relation"], atol=2e-4, rtol=0)
        assert hyper["keep"] == "min(66,99)"
        assert torch.equal(top_mask(relevance, 66), tensors["out.mask"])
        method = SparseVLM(layers=(3,), keep=(0.66,), recycle=0)
        tokens = entering(3, given, torch.zeros(given.shape[2] + len(raters), 4))
        left = method.reduce(tokens, raters)
        assert torch.equal(left.kept, tensors["out.mask"].nonzero()[:, 0]) and left.hidden is None


def test_authors_clusters() -> None:
    for hyper, tensors in cases("SparseVLM", "merge"):
        values, count = tensors["in.features"][0].float(), hyper["cluster_num"]
        _, owner = sparsevlm_clusters(values, count)
        merged = mean_by_assignment(values, owner, count)
        torch.testing.assert_close(merged, tensors["out.merged"][0], atol=2e-4, rtol=0)


def test_raters_are_the_words_that_the_pictures_speak_to() -> None:
    visual = torch.tensor([[4.0, 0.0, 0.0], [4.0, 0.0, 1.0]])
    words = torch.tensor([[9.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [1.0, 0, 1.0]])
    asking = torch.tensor([False, True, True, True])
    # The first is not asked; of the others' shares, (0.42, 0.01, 0.57), two are above a third.
    assert text_raters(visual, words, asking).tolist() == [False, True, False, True]
    # None is above the average, as with a single word, for which the authors get NaN.
    assert text_raters(visual, words[:2], asking[:2]).tolist() == [False, True]
    assert text_raters(visual, torch.ones(4, 3), asking).tolist() == asking.tolist()


def test_raters_are_those_of_the_entry() -> None:
    hidden = torch.tensor([[1.0, 0], [1.0, 0], [1.0, 0], [5.0, 0], [0, 1.0]])
    given = torch.tensor([[[0.1, 0.3, 0.2], [0.4, 0.0, 0.0]]])
    method = SparseVLM(layers=(2,), keep=(0.34,), recycle=0)
    entry = method.reduce(entering(0, given, hidden, depth=4), None)
    assert entry.kept.tolist() == [0, 1, 2] and entry.memory.tolist() == [True, False]
    # What they have become since does not matter.
    later = method.reduce(entering(2, given, hidden.flip(0), depth=4), entry.memory)
    assert later.kept.tolist() == [1] and later.assignment is None and later.hidden is None


def test_heads_that_look_at_pictures() -> None:
    mass = torch.tensor([[0.1, 0.2, 0.1], [0.9, 0.1, 0.2], [0.0, 0.9, 0.1], [0.0, 0.0, 0.5]])
    raters = torch.tensor([True, False, True])
    assert sparsevlm_relevance(mass, raters, 0.25).tolist() == pytest.approx([0.45, 0.05, 0.1])
    assert sparsevlm_relevance(mass, raters, 0.5).tolist() == pytest.approx([0.225, 0.25, 0.075])
    assert sparsevlm_relevance(mass, raters, 1.0).tolist() == pytest.approx([0.125, 0.15, 0.1125])


def test_counts() -> None:
    assert [recycled_counts(dropped, 0.3) for dropped in (0, 1, 3, 276)] == [(0, 0), (1, 1), (1, 1), (83, 9)]
    assert recycled_counts(40, 1.0) == (40, 5)
    assert recycled_counts(40, 0.0) == (0, 0)


def test_recycled_tokens_take_the_place_of_their_centre() -> None:
    generator = torch.Generator().manual_seed(0)
    # Of 25 dropped tokens 24 come back, as three groups around -5, 0 and 5.
    middle = torch.tensor([0.0, 5.0, 0.0, -5.0]).repeat(7)[:25, None]
    hidden = torch.cat([torch.zeros(2, 3), middle + 0.1 * torch.randn(25, 3, generator=generator), torch.ones(1, 3)])
    relevance = torch.tensor([0.9, 0.8, 0.0, *(0.1 + 0.01 * torch.arange(24)).tolist()])
    method = SparseVLM(layers=(2,), keep=(2.1 / 27,), recycle=0.92)
    left = method.reduce(entering(2, relevance[None, None], hidden, depth=4), torch.tensor([True]))
    assert left.kept.shape[0] == 5 and left.kept[:2].tolist() == [0, 1]
    assert left.assignment is not None and left.hidden is not None
    assert left.assignment[2] == -1, "the least relevant one is gone"
    assert torch.equal(left.assignment[left.kept], torch.arange(5))
    assert torch.equal(left.hidden[:2], hidden[:2])
    for survivor in (2, 3, 4):
        members = (left.assignment == survivor).nonzero()[:, 0]
        assert len(set(middle[members - 2, 0].tolist())) == 1 and len(members) >= 6
        torch.testing.assert_close(left.hidden[survivor], hidden[members].mean(dim=0))
    assert (left.assignment[3:] >= 2).all()


def test_rank_sets_the_count() -> None:
    generator = torch.Generator().manual_seed(1)
    # Two raters of which one repeats the other's attention, among more words than are computed at a time.
    base = torch.rand(1, 1, 20, generator=generator)
    given = torch.rand(1, ROWS + 3, 20, generator=generator)
    given[:, 5], given[:, ROWS + 1] = base[0, 0], 2 * base[0, 0]
    raters = torch.zeros(ROWS + 3, dtype=torch.bool)
    raters[[5, ROWS + 1]] = True
    tokens = entering(2, given, torch.zeros(20 + ROWS + 3, 4), depth=4)
    method = SparseVLM(layers=(2,), keep=(1.0,), scale=4.5, recycle=0)
    assert torch.equal(method.reduce(tokens, raters).kept, top_mask(base[0, 0], 4).nonzero()[:, 0])
    raters[7] = True
    assert method.reduce(tokens, raters).kept.shape[0] == 9
    assert method.model_copy(update={"scale": 0.01}).reduce(tokens, raters).kept.shape[0] == 1
    assert method.model_copy(update={"scale": 13.5}).reduce(tokens, raters).kept.tolist() == list(range(20))


def test_stages() -> None:
    method = SparseVLM()
    assert method.prune_layers(32) == (0, 3, 7, 16) and method.prune_layers(28) == (0, 3, 6, 14)
    generator = torch.Generator().manual_seed(2)
    memory, count = None, 576
    counts = []
    for layer in method.prune_layers(32):
        given = torch.rand(2, 4, count, generator=generator)
        tokens = entering(layer, given, torch.randn(count + 4, 8, generator=generator), first=576)
        left = method.reduce(tokens, memory)
        memory, count = left.memory, left.kept.shape[0]
        counts.append(count)
    # The authors' 300, 200, 110, and the clusters of 83, 33 (of 109), and 30 (of 98) tokens.
    assert counts == [576, 300 + 9, 200 + 4, 110 + 3]
    with pytest.raises(ValueError, match="share for each"):
        SparseVLM(layers=(2, 3))


@pytest.mark.parametrize("recycle", [0.0, 0.3, 1.0])
def test_small_and_level(recycle: float) -> None:
    level = torch.full((1, 2, 6), 0.1)
    method = SparseVLM(layers=(1,), keep=(0.5,), recycle=recycle)
    raters = torch.tensor([True, True])
    left = method.reduce(entering(1, level, torch.ones(8, 2), depth=2), raters)
    assert left.kept.tolist() == ([0, 1, 2] if not recycle else [0, 1, 2, 3])
    one = method.reduce(entering(1, level[..., :1], torch.ones(3, 2), depth=2), raters)
    assert one.kept.tolist() == [0]
    everything = method.model_copy(update={"keep": (1.0,)})
    tokens = entering(1, level, torch.ones(8, 2), depth=2)
    assert everything.reduce(tokens, raters).kept.tolist() == list(range(6))
    assert everything.reduce(replace(tokens, num_initial=9), raters).hidden is None


def test_nobody_asks() -> None:
    silent = entering(1, torch.zeros(2, 0, 4), torch.ones(4, 2), depth=2)
    assert SparseVLM(layers=(1,), keep=(0.5,)).reduce(silent, None).kept.tolist() == [0, 1, 2, 3]
