"""Fewer tokens at each of several layers."""

from __future__ import annotations

import pytest
import torch

from spatiotoken.layers.lazyllm import LazyLLM
from spatiotoken.structures import LayerTokens


def entering(attention: list[list[float]], layer: int, depth: int = 4) -> LayerTokens:
    return LayerTokens(layer, 10, attention=torch.tensor(attention), depth=depth)


def test_keeps_the_most_attended_of_those_left() -> None:
    method = LazyLLM(layers=(1, 3), shares=(0.75, 0.5))
    assert method.prune_layers(4) == (1, 3)
    # Means 0.3, 0.1, 0.25, 0.15: three quarters go on.
    heads = [[0.2, 0.1, 0.4, 0.1], [0.4, 0.1, 0.1, 0.2]]
    assert method.reduce(entering(heads, 1), None).kept.tolist() == [0, 2, 3]
    # Half of these three, truncated.
    assert method.reduce(entering([[0.1, 0.2, 0.3]], 3), None).kept.tolist() == [2]


def test_edges() -> None:
    method = LazyLLM(layers=(1,), shares=(0.5,))
    assert method.reduce(entering([[0.25] * 5], 1), None).kept.tolist() == [0, 1]
    assert method.reduce(entering([[0.25]], 1), None).kept.tolist() == [0]
    everything = LazyLLM(layers=(1, 2), shares=(1, 1))
    assert everything.reduce(entering([[0.1, 0.3, 0.2]], 2), None).kept.tolist() == [0, 1, 2]
    assert LazyLLM().prune_layers(28) == (8, 17, 25)


def test_layers_and_shares_go_together() -> None:
    with pytest.raises(ValueError, match="2 layers need as many shares, got 1"):
        LazyLLM(layers=(1, 2), shares=(0.5,))
    with pytest.raises(ValueError, match="shares"):
        LazyLLM(layers=(1,), shares=(0.0,))
    with pytest.raises(ValueError, match="layers"):
        LazyLLM(layers=(), shares=())
