"""AIM's PageRank: the authors' importance and selection, and a walk over the whole matrix step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spatiotoken.layers.aim_prune import AIMPrune, aim_count, aim_importance
from spatiotoken.structures import LayerTokens
from tests.vectors import cases


def causal(logits: Tensor) -> Tensor:
    """Softmax ``[heads, L, L]`` over no later rows."""
    later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.float().masked_fill(later, -torch.inf).softmax(dim=-1)


def entering(layer: int, attention: Tensor, places: Tensor, num_initial: int, depth: int = 28) -> LayerTokens:
    return LayerTokens(
        layer,
        num_initial,
        depth=depth,
        length=attention.shape[1],
        places=places,
        weights=lambda rows, entering: attention[:, :0] if entering else attention[:, rows],
    )


def test_authors_results() -> None:
    for hyper, tensors in cases("AIM", "rank"):
        attention = causal(tensors["in.attn_logits"])
        first, last, length = hyper["boundaries"]
        importance = aim_importance(
            lambda rows, given=attention: given[:, rows],  # type: ignore[misc]
            torch.arange(length),
            hyper["tau_imp"],
            hyper["iters"],
        )
        torch.testing.assert_close(importance, tensors["out.importance"], atol=2e-4, rtol=0)
        # They say what the layer's attention leaves to the next.
        tokens = entering(hyper["layer"] + 1, attention, torch.arange(first, last), last - first)
        kept = first + AIMPrune().reduce(tokens, None).kept
        words = torch.cat([torch.arange(first), torch.arange(last, length)])
        assert torch.equal(torch.cat([kept, words]).sort().values, tensors["out.kept_positions"].long())


@pytest.mark.parametrize(("length", "steps"), [(1, 3), (31, 1), (32, 4), (33, 5), (100, 5), (100, 1)])
def test_one_pass_equals_steps_over_the_whole_matrix(length: int, steps: int) -> None:
    logits = 2 * torch.randn(3, length, length, generator=torch.Generator().manual_seed(length))
    attention = causal(logits)
    chances = causal(logits / 0.5)
    where = torch.full((3, 1, length), 1 / length)
    for _ in range(steps):
        where = where @ chances
    importance = aim_importance(lambda rows: attention[:, rows], torch.arange(length), 0.5, steps)
    torch.testing.assert_close(importance, where[:, 0].square().mean(dim=0).sqrt(), atol=1e-5, rtol=1e-4)


def test_most_are_led_to_the_same_token() -> None:
    # All look at the third row; those before it can not, and lead to themselves.
    logits = torch.eye(6)[None].repeat(2, 1, 1)
    logits[:, 2:, 2] = 3.0
    attention = causal(logits)
    importance = aim_importance(lambda rows: attention[:, rows], torch.arange(6), 0.01, 5)
    assert importance.tolist() == pytest.approx([1 / 6, 1 / 6, 4 / 6, 0, 0, 0], abs=1e-5)
    method = AIMPrune(start=1, end=3)
    assert method.reduce(entering(2, attention, torch.arange(1, 5), 4, 4), None).kept.tolist() == [0, 1]
    assert method.reduce(entering(2, attention, torch.arange(1, 5), 3, 4), None).kept.tolist() == [1]


def test_schedule() -> None:
    method = AIMPrune()
    assert method.prune_layers(28) == tuple(range(15, 23))
    assert method.prune_layers(32) == tuple(range(17, 26))
    assert [aim_count(64, layer, 14, 22, 0.0) for layer in (14, 15, 18, 21, 22, 27)] == [64, 56, 32, 8, 0, 0]
    assert [aim_count(10, layer, 0, 3, 0.0) for layer in range(5)] == [10, 6, 3, 0, 0]
    assert [aim_count(10, layer, 0, 3, 0.5) for layer in range(5)] == [10, 6, 5, 5, 5]
    with pytest.raises(ValueError, match="not after"):
        AIMPrune(start=2, end=2).prune_layers(4)


def test_none_one_and_all() -> None:
    level = causal(torch.zeros(1, 5, 5))
    last = entering(3, level, torch.tensor([1, 2, 3]), 3, 4)
    left = AIMPrune(start=1, end=3).reduce(last, None).kept
    assert left.dtype == torch.int64 and left.shape == (0,)
    assert AIMPrune(start=1, end=3, least=1.0).reduce(last, None).kept.tolist() == [0, 1, 2]
    one = entering(2, causal(torch.zeros(1, 1, 1)), torch.tensor([0]), 1, 4)
    assert AIMPrune(start=1, end=3).reduce(one, None).kept.tolist() == []
    assert AIMPrune(start=1, end=3, least=1.0).reduce(one, None).kept.tolist() == [0]
    # Equal ones, since all look at the first row only: the first stay.
    away = torch.zeros(1, 5, 5)
    away[..., 0] = 1.0
    assert AIMPrune(start=1, end=3, least=0.7).reduce(entering(2, away, torch.tensor([1, 2, 3]), 3, 4), None).kept[
        :2
    ].tolist() == [0, 1]
