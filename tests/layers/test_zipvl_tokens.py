"""As many tokens as a layer's attention asks for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spatiotoken.layers.zipvl_tokens import ZipVLTokens, probe_rows, zipvl_selection
from spatiotoken.structures import LayerTokens
from tests.layers.test_todre_drop import causal

CPU = torch.device("cpu")


def entering(weights: Tensor, places: list[int], layer: int = 0) -> LayerTokens:
    def of(rows: Tensor, about_to_enter: bool) -> Tensor:
        assert about_to_enter and 0 < len(rows) <= 32
        return weights[:, rows]

    length = weights.shape[1]
    return LayerTokens(layer, len(places), depth=4, length=length, places=torch.tensor(places), weights=of)


def test_probes() -> None:
    assert probe_rows(10, 2, 4, CPU).tolist() == [1, 3, 5, 7, 8, 9]
    assert probe_rows(10, 2, 0, CPU).tolist() == [8, 9]
    assert probe_rows(5, 64, 64, CPU).tolist() == [0, 1, 2, 3, 4]
    assert probe_rows(70, 64, 64, CPU).tolist() == list(range(70))


def test_sum_decides_how_many_and_mean_which() -> None:
    places = torch.tensor([1, 2, 3])
    mass, probes = torch.tensor([4.0, 3.0, 1.0, 2.0, 0.0]), torch.tensor([4, 4, 4, 2, 1])
    # Two rows hold 7 of 10, three 9; by the mean the order is 0 and 3, which tie, then 1.
    assert zipvl_selection(mass, probes, places, 0.7).tolist() == [2]
    assert zipvl_selection(mass, probes, places, 0.9).tolist() == [0, 2]
    assert zipvl_selection(mass, probes, places, 0.95).tolist() == [0, 1, 2]
    # The word alone is enough, but one token stays.
    assert zipvl_selection(mass, probes, places, 0.4).tolist() == [2]


def test_equal_weights_keep_the_first() -> None:
    mass, probes = torch.ones(8), torch.ones(8, dtype=torch.int64)
    assert zipvl_selection(mass, probes, torch.arange(2, 8), 0.5).tolist() == [0, 1]


@pytest.mark.parametrize(("length", "recent", "spread"), [(12, 3, 4), (90, 40, 20), (90, 64, 64), (1, 4, 4)])
def test_equals_the_definition(length: int, recent: int, spread: int) -> None:
    weights = causal(2, length)
    places = list(range(length // 4, max(1, length // 2)))
    rows = probe_rows(length, recent, spread, CPU).tolist()
    mass = [sum(weights[:, row, key].sum().item() for row in rows) for key in range(length)]
    mean = [mass[key] / sum(row >= key for row in rows) for key in range(length)]
    needed, held = 0, 0.0
    for value in sorted(mass, reverse=True):
        if held >= 0.6 * sum(mass):
            break
        needed, held = needed + 1, held + value
    important = sorted(range(length), key=lambda key: (-mean[key], key))[:needed]
    expected = [token for token, place in enumerate(places) if place in important]
    best = max(range(len(places)), key=lambda token: mean[places[token]])
    method = ZipVLTokens(tau=0.6, recent=recent, spread=spread)
    assert method.reduce(entering(weights, places), None).kept.tolist() == sorted({*expected, best})


def test_layers() -> None:
    assert ZipVLTokens().prune_layers(4) == (0, 1, 2, 3)
    assert ZipVLTokens(layer=0.5).prune_layers(4) == (2, 3)
    assert ZipVLTokens(tau=1).prune_layers(4) == ()
