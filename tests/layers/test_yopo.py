"""No visual tokens in the last layers."""

from __future__ import annotations

import pytest
import torch

from spatiotoken.layers.yopo import YOPO
from spatiotoken.structures import LayerTokens


@pytest.mark.parametrize(("retention", "depth", "layer"), [(0.625, 32, 20), (0.5, 4, 2), (0.01, 28, 1), (0.9, 28, 25)])
def test_drops_all_before_one_layer(retention: float, depth: int, layer: int) -> None:
    method = YOPO(retention=retention)
    assert method.prune_layers(depth) == (layer,)
    left = method.reduce(LayerTokens(layer, 5, depth=depth, length=9, places=torch.arange(2, 7)), None)
    assert left.kept.shape == (0,) and left.kept.dtype == torch.int64 and left.hidden is None


@pytest.mark.parametrize("depth", [1, 4, 28])
def test_keeping_all_asks_for_no_layer(depth: int) -> None:
    assert YOPO(retention=1).prune_layers(depth) == ()
