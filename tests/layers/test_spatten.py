"""Tokens go by what they have received since the first layer."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from spatiotoken.layers.spatten import SpAtten, spatten_count
from spatiotoken.structures import LayerTokens


def run(method: SpAtten, received: list[list[float]], words: int = 1) -> list[list[int]]:
    """Tokens left before each layer from 1 on, by their first index; ``received`` holds what each got in the layer
    before, had it stayed."""
    depth, num_initial = len(received) + 1, len(received[0])
    left, memory = torch.arange(num_initial), None
    walked: list[list[int]] = []
    for layer, all_received in enumerate(received, start=1):
        if layer in method.prune_layers(depth):
            got = partial(torch.index_select, torch.tensor(all_received), 0, left)
            length = left.shape[0] + words
            tokens = LayerTokens(layer, num_initial, received=got, depth=depth, length=length)
            reduction = method.reduce(tokens, memory)
            assert reduction.memory == method.reduce(tokens, memory).memory
            memory, left = reduction.memory, left[reduction.kept]
        walked.append(left.tolist())
    return walked


RECEIVED = [[0.5, 0.1, 0.3, 0.1], [0.1, 0.4, 0.1, 0.2], [0.1, 0.2, 0.1, 0.3]]


def test_importance_adds_up() -> None:
    # Sums before layer 2: 0.6, 0.5, 0.4, 0.3; before layer 3: 0.7, 0.7 and less.
    method = SpAtten(layer=2, shares=(0.75, 0.5))
    assert method.prune_layers(4) == (1, 2, 3)
    assert run(method, RECEIVED) == [[0, 1, 2, 3], [0, 1, 2], [0, 1]]
    # Without the first layer: 0.1, 0.4, 0.1, 0.2 before layer 2.
    assert run(method.model_copy(update={"accumulate": False}), RECEIVED) == [[0, 1, 2, 3], [0, 1, 3], [1, 3]]


def test_longer_sequences_have_more_queries() -> None:
    # Token 1 gets 0.30 of 5 rows before layer 1, the others less; the 0.55 of token 2 before layer 2 is of 3 rows only.
    method = SpAtten(layer=1, shares=(0.75, 0.25))
    received = [[0.0, 0.3, 0.1, 0.2], [0.0, 0.1, 0.35, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert run(method, received) == [[1, 2, 3], [1, 2], [1]]
    # 1.5 + 0.4 against 0.5 + 1.4, but 0.4 against 0.45 if means were added up.
    assert 5 * 0.3 + 4 * 0.1 == pytest.approx(5 * 0.1 + 4 * 0.35)


def test_stride() -> None:
    method = SpAtten(layer=1, shares=(0.5, 0.25), stride=2)
    assert method.prune_layers(5) == (1, 2, 3)
    assert method.model_copy(update={"accumulate": False}).prune_layers(5) == (1, 3)
    received = [[0.1] * 4, [0.1] * 4, [0.1] * 4, [0.1] * 4]
    assert run(method, received) == [[0, 1], [0, 1], [0], [0]]


def test_counts_go_in_equal_steps() -> None:
    assert [spatten_count(100, (0.8, 0.2), step, 4) for step in range(4)] == [80, 60, 40, 20]
    assert spatten_count(100, (0.8, 0.2), 0, 1) == 80
    assert spatten_count(1, (0.5, 0.1), 3, 4) == 1
    assert [spatten_count(7, (1.0, 1.0), step, 3) for step in range(3)] == [7, 7, 7]


def test_edges() -> None:
    assert SpAtten(shares=(1, 1)).prune_layers(28) == ()
    assert SpAtten().prune_layers(28) == tuple(range(1, 28))
    assert SpAtten(accumulate=False).prune_layers(28)[0] == 4
    assert run(SpAtten(layer=1, shares=(0.5, 0.1)), [[0.3], [0.2]]) == [[0], [0]]
    with pytest.raises(ValueError, match="must not rise"):
        SpAtten(shares=(0.2, 0.8))
