"""Large sets of tokens are compared by bounds first: whatever is left out by these, the result is the same."""

from __future__ import annotations

import pytest
import torch

from spatiotoken.tokens import components
from spatiotoken.tokens.components import connected_components, nearest_from, sketch, sketch_basis
from spatiotoken.tokens.density_peaks import (
    assign_to_centres,
    density_peak_centres,
    density_peak_scores,
    scaled_distances,
)
from spatiotoken.tokens.merging import nearest
from spatiotoken.tokens.segments import cluster_trees


def clustered(count: int, dim: int, noise: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    centres = torch.randn(40, dim, generator=generator)
    rows = centres[torch.randint(40, (count,), generator=generator)]
    values = rows + noise * torch.rand(count, 1, generator=generator) * torch.randn(count, dim, generator=generator)
    values[5] = 0  # similar to nothing
    values[7] = values[6]
    return values * torch.rand(count, 1, generator=generator).add(0.1)


@pytest.mark.parametrize(("dim", "noise"), [(8, 0.2), (200, 0.3), (200, 1.0)])
def test_bounds_are_above_products(dim: int, noise: float) -> None:
    values = clustered(500, dim, noise)
    unit = torch.nn.functional.normalize(values, dim=1)
    basis = sketch_basis(unit)
    for left in (unit, values):
        assert (sketch(left, basis) @ sketch(unit, basis).T >= left @ unit.T).all()


@pytest.mark.parametrize("threshold", [0.97, 0.8, 0.5, -1.0])
@pytest.mark.parametrize(("dim", "noise"), [(8, 0.2), (200, 0.3), (200, 1.0)])
def test_large_sets(monkeypatch: pytest.MonkeyPatch, dim: int, noise: float, threshold: float) -> None:
    values = clustered(500, dim, noise)
    small = connected_components(values[None], threshold)
    anchors = values[::2].contiguous()
    guess = torch.arange(500) // 2
    best = nearest(values, anchors)
    monkeypatch.setattr(components, "_LARGE", 100)
    monkeypatch.setattr(components, "_ROWS", 64)
    large = connected_components(values[None], threshold)
    assert torch.equal(small[0], large[0]) and torch.equal(small[1], large[1])
    found = nearest_from(values, anchors, guess)
    # Nearly parallel anchors may change places.
    unit = torch.nn.functional.normalize(anchors, dim=1)
    torch.testing.assert_close((values * unit[found]).sum(1), (values * unit[best]).sum(1), atol=1e-5, rtol=1e-5)
    assert found[5] == best[5] == 0


@pytest.mark.parametrize("count", [3, 100, 129, 200])
def test_distances_and_their_smallest(count: int) -> None:
    values = torch.randn(2, count, 24, generator=torch.Generator().manual_seed(count)) + 5
    expected = torch.cdist(values.double(), values.double()) / 24**0.5
    distances = scaled_distances(values)
    torch.testing.assert_close(distances, expected.float(), atol=1e-5, rtol=1e-5)
    assert (distances.diagonal(dim1=1, dim2=2) == 0).all()
    nearby = distances.sort(dim=-1).values[..., : min(7, count)]
    density = (-nearby.square().mean(dim=-1)).exp()
    denser = density[:, None] > density[:, :, None]
    limit = distances.amax(dim=(1, 2))[:, None, None]
    scores = density * torch.where(denser, distances, limit).amin(dim=-1)
    torch.testing.assert_close(density_peak_scores(distances, 7), scores)


def test_trees_of_frames_are_clustered_by_themselves() -> None:
    """For tests/tokens/test_segments.py: frames of unlike sizes are padded, which changes nothing."""
    sizes, counts = [30, 1, 0, 17, 5, 140, 9, 2, 16, 16], [7, 1, 0, 17, 2, 40, 1, 1, 3, 9]
    trees = torch.randn(sum(sizes), 12, generator=torch.Generator().manual_seed(0))
    cluster, centre = cluster_trees(trees, sizes, counts, 5)
    assert torch.equal(cluster[centre], torch.arange(sum(counts)))
    begun = done = 0
    for size, count in zip(sizes, counts, strict=True):
        if size:
            alone, middle = cluster_trees(trees[begun : begun + size], [size], [count], 5)
            assert torch.equal(cluster[begun : begun + size], alone + done)
            assert torch.equal(centre[done : done + count], middle + begun)
            distances = scaled_distances(trees[begun : begun + size])
            expected = density_peak_centres(density_peak_scores(distances, min(count, 5)), count)
            assert torch.equal(middle, expected)
            assert torch.equal(alone, assign_to_centres(distances, expected))
        begun, done = begun + size, done + count
