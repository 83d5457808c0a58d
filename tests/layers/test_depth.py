"""Layers by number and as a share of the depth."""

from __future__ import annotations

import pytest

from spatiotoken.layers.depth import layer_index, layer_indices


def test_shares_fit_models_of_any_depth() -> None:
    assert [layer_indices((0.25, 0.5, 0.75), depth) for depth in (28, 32, 36)] == [
        (7, 14, 21),
        (8, 16, 24),
        (9, 18, 27),
    ]
    assert [layer_index(0.0715, depth) for depth in (4, 24, 28, 36)] == [1, 2, 2, 3]
    assert layer_indices((0.0625, 0.1875, 0.47), 4) == (1, 2, 3)
    assert layer_indices((2, 0.5), 28) == (2, 14)
    assert layer_indices((0.3, 0.6, 0.9), 4) == (1, 2, 3) and layer_index(0.999, 28) == 27


@pytest.mark.parametrize(
    ("places", "depth"), [((0,), 4), ((2, 2), 4), ((3, 1), 4), ((4,), 4), ((0.1, 0.2, 0.3, 0.4), 4), ((0.5,), 1)]
)
def test_what_is_no_rising_series_of_layers_is_refused(places: tuple[float, ...], depth: int) -> None:
    with pytest.raises(ValueError, match=r"layers\.layers: .*(model has only|no rising layers)"):
        layer_indices(places, depth)
