"""PyramidDrop: the authors' vectors, and stages whose right answer is evident."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spatiotoken.layers.pyramiddrop import PyramidDrop
from spatiotoken.layers.staged import staged_count
from spatiotoken.structures import LayerTokens
from spatiotoken.tokens.merging import top_indices
from tests.vectors import cases


def attention_of(query: Tensor, key: Tensor) -> Callable[[Tensor, bool], Tensor]:
    """Causal softmax weights of chosen rows of ``[heads, L, d]``, for the layer about to be entered only."""

    def weights(rows: Tensor, entering: bool) -> Tensor:
        assert entering
        logits = query[:, rows].float() @ key.float().mT / query.shape[-1] ** 0.5
        later = torch.arange(key.shape[1]) > rows[:, None]
        return logits.masked_fill(later, -torch.inf).softmax(dim=-1)

    return weights


def looking(attention: Tensor, layer: int, num_initial: int, depth: int = 4) -> LayerTokens:
    """Tokens after two words and before one, which gives them ``attention [heads, n]``."""
    places = torch.arange(2, 2 + attention.shape[1])
    row = torch.nn.functional.pad(attention, (2, 1))

    def weights(rows: Tensor, entering: bool) -> Tensor:
        assert entering and rows.tolist() == [attention.shape[1] + 2]
        return row[:, None]

    return LayerTokens(layer, num_initial, depth=depth, length=row.shape[1], places=places, weights=weights)


def test_authors_results() -> None:
    stages = []
    for hyper, tensors in cases("PyramidDrop"):
        start, count = hyper["image_index"], hyper["cur_image_tokens"]
        places = torch.arange(start, start + count)
        weights = attention_of(tensors["in.q"], tensors["in.k"])
        method = PyramidDrop()
        counts = [staged_count(count, hyper["original_image_tokens"], share) for share in method.keep]
        stage = counts.index(hyper["keep"])
        tokens = LayerTokens(
            method.prune_layers(32)[stage],
            hyper["original_image_tokens"],
            depth=32,
            length=hyper["prompt_total_len"],
            places=places,
            weights=weights,
        )
        scores = method.scores(tokens)
        torch.testing.assert_close(scores, tensors["out.image_attn"], atol=1e-6, rtol=1e-5)
        reduction = method.reduce(tokens, None)
        assert torch.equal(places[reduction.kept], tensors["out.kept_abs"].long())
        assert torch.equal(top_indices(scores, hyper["keep"]), reduction.kept)
        stages.append(stage)
    assert stages == [0, 1]


def test_layers_of_the_paper() -> None:
    assert PyramidDrop().prune_layers(32) == (8, 16, 24)
    assert PyramidDrop().prune_layers(28) == (7, 14, 21)
    assert PyramidDrop(layers=(3, 20), keep=(0.5, 0.5)).prune_layers(28) == (3, 20)


def test_heads_are_averaged_and_shares_are_of_the_original_number() -> None:
    # The first head alone would choose 0 and 1.
    attention = torch.tensor([[0.5, 0.3, 0.1, 0.0, 0.0], [0.0, 0.1, 0.0, 0.0, 0.8]])
    method = PyramidDrop(layers=(1, 2, 3), keep=(0.8, 0.5, 0.25))
    # A quarter of 8, though only 5 are left.
    assert method.reduce(looking(attention, 3, 8), None).kept.tolist() == [0, 4]
    assert method.reduce(looking(attention, 2, 8), None).kept.tolist() == [0, 1, 2, 4]
    # More than are left would stay: all do.
    assert method.reduce(looking(attention, 1, 8), None).kept.tolist() == [0, 1, 2, 3, 4]


def test_ties_go_to_the_lowest_index_and_one_is_left() -> None:
    equal = torch.full((3, 6), 0.1)
    method = PyramidDrop(layers=(1,), keep=(0.5,))
    assert method.reduce(looking(equal, 1, 6), None).kept.tolist() == [0, 1, 2]
    assert method.reduce(looking(equal[:, :1], 1, 1), None).kept.tolist() == [0]
    assert PyramidDrop(layers=(1,), keep=(0.01,)).reduce(looking(equal, 1, 6), None).kept.tolist() == [0]


def test_keeping_all_asks_for_no_attention() -> None:
    def never(rows: Tensor, entering: bool) -> Tensor:
        raise AssertionError

    method = PyramidDrop(keep=(1.0, 1.0, 1.0))
    for layer in method.prune_layers(4):
        tokens = LayerTokens(layer, 7, depth=4, length=9, places=torch.arange(1, 8), weights=never)
        assert torch.equal(method.reduce(tokens, None).kept, torch.arange(7))


@pytest.mark.parametrize("keep", [(0.5,), (0.5, 0.25, 0.125, 0.1), (0.25, 0.5, 0.125)])
def test_shares_must_fit(keep: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="keep must"):
        PyramidDrop(keep=keep)
