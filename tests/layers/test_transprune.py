"""TransPrune: the authors' vectors, and transitions whose right answer is evident."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from spatiotoken.layers.transprune import TransPrune, question_attention, transition_weights, transprune_scores
from spatiotoken.structures import LayerTokens
from tests.layers.test_pyramiddrop import attention_of
from tests.vectors import cases

PART = nn.Identity()


def test_authors_results() -> None:
    for hyper, tensors in cases("TransPrune"):
        start, count, layers = hyper["image_index"], hyper["image_tokens"], hyper["acc_layers"]
        length = tensors["in.q"].shape[1]
        # As many layers are observed before the last stage as the authors have accumulated.
        method = TransPrune(layers=(1, layers), keep=(1.0, hyper["keep"] / count))
        assert method.observed_layers(28) == tuple(range(layers))
        parts = [
            method.observe(name, PART, before, after)
            for name, before, after in zip(
                ["attention", "mlp"] * layers, tensors["in.before"], tensors["in.after"], strict=True
            )
        ]
        noted = torch.stack(parts).unflatten(0, (layers, 2))
        torch.testing.assert_close(noted.sum(dim=1), tensors["out.transf_weight"], atol=1e-6, rtol=1e-5)
        places, text = torch.arange(start, start + count), torch.arange(length)
        text = text[(text < start) | (text >= start + count)]
        tokens = LayerTokens(
            layers,
            count,
            depth=28,
            length=length,
            places=places,
            text=text,
            asking=text >= start + count,
            weights=attention_of(tensors["in.q"], tensors["in.k"]),
            observed={layer: noted[layer][:, places] for layer in range(layers)},
        )
        torch.testing.assert_close(method.scores(tokens), tensors["out.score"], atol=1e-6, rtol=1e-5)
        assert torch.equal(places[method.reduce(tokens, None).kept], tensors["out.kept_abs"].long())


def test_layers_of_the_paper() -> None:
    method = TransPrune()
    assert method.prune_layers(28) == (7, 9, 12)
    assert method.observed_layers(28) == (6, 7, 8, 9, 10, 11)
    assert TransPrune(layers=(7, 9, 12)).prune_layers(32) == (7, 9, 12)


def test_transition_is_growth_times_turn() -> None:
    before = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    # Kept as it is, half as long and turned back, twice as long at a right angle.
    after = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [2.0, 0.0]])
    total = math.exp(0) + math.exp(2) + math.exp(1)
    expected = torch.tensor([1.0, 0.5 * math.exp(2), 2 * math.exp(1)]) / total
    torch.testing.assert_close(transition_weights(before, after), expected)
    halves = transition_weights(before.bfloat16(), after.bfloat16())
    assert halves.dtype == torch.float32
    torch.testing.assert_close(halves, expected)
    assert torch.isfinite(transition_weights(torch.zeros(3, 4), torch.randn(3, 4))).all()


def tokens_with(transition: Tensor, attention: Tensor, layer: int = 1) -> LayerTokens:
    """One word, ``n`` tokens, then ``Q`` words that give them ``attention [heads, Q, n]``."""
    questions, count = attention.shape[1:]
    given = torch.nn.functional.pad(attention, (1, questions))
    text = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(1 + count, 1 + count + questions)])

    def weights(rows: Tensor, entering: bool) -> Tensor:
        assert entering and 0 < rows.shape[0] <= 32
        # The word before the tokens sees none, but what it is given here must not count.
        return torch.cat([torch.full_like(given[:, :1], 9.0), given], dim=1)[:, (rows - count).clamp(min=0)]

    return LayerTokens(
        layer,
        count,
        depth=4,
        length=1 + count + questions,
        places=torch.arange(1, 1 + count),
        text=text,
        asking=text > 0,
        weights=weights,
        observed={0: torch.stack([transition, torch.zeros_like(transition)])},
    )


@pytest.mark.parametrize("questions", [1, 31, 32, 75])
def test_question_attention_is_the_mean_of_the_words_that_ask(questions: int) -> None:
    attention = torch.rand(2, questions, 5, generator=torch.Generator().manual_seed(questions))
    got = question_attention(tokens_with(torch.ones(5), attention))
    torch.testing.assert_close(got, attention.mean(dim=(0, 1)))


def test_both_shares_count_alike() -> None:
    transition, attention = torch.tensor([80.0, 10.0, 5.0, 5.0]), torch.tensor([0.0, 0.0, 0.001, 0.004])
    torch.testing.assert_close(transprune_scores(transition, attention), torch.tensor([0.8, 0.1, 0.25, 0.85]))
    method = TransPrune(layers=(1,), keep=(0.5,))
    tokens = tokens_with(transition, attention.expand(3, 2, 4))
    assert method.reduce(tokens, None).kept.tolist() == [0, 3]


def test_ties_go_to_the_lowest_index_and_one_is_left() -> None:
    method = TransPrune(layers=(1,), keep=(0.01,))
    assert method.reduce(tokens_with(torch.ones(6), torch.ones(1, 3, 6)), None).kept.tolist() == [0]
    assert method.reduce(tokens_with(torch.ones(1), torch.ones(1, 3, 1)), None).kept.tolist() == [0]
    half = TransPrune(layers=(1,), keep=(0.5,))
    assert half.reduce(tokens_with(torch.zeros(6), torch.zeros(1, 3, 6)), None).kept.tolist() == [0, 1, 2]


def test_keeping_all() -> None:
    method = TransPrune(layers=(1, 2, 3), keep=(1.0, 1.0, 1.0))
    for layer in (1, 2, 3):
        tokens = tokens_with(torch.arange(5.0), torch.ones(1, 2, 5), layer)
        assert torch.equal(method.reduce(tokens, None).kept, torch.arange(5))
