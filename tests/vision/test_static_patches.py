"""Static patches against plain loops, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spatiotoken.vision.base import TowerShape, TowerTokens
from spatiotoken.vision.static_patches import StaticPatches, changed_patches, latest_kept, most_changed, static_count

SHAPE = TowerShape(4, (0, 1, 2, 3), False)


def tokens_of(pixels: Tensor, height: int) -> TowerTokens:
    """``[T, P, F]`` pixels as the first layer's."""
    frames, patches, _ = pixels.shape
    flat = pixels.flatten(0, 1)
    places, sizes = torch.arange(len(flat)), torch.ones(len(flat))
    grid = (frames, height, patches // height)
    return TowerTokens(flat, sizes, places, (patches,) * frames, grid, 0, SHAPE, pixels=flat)


def test_compared_with_the_latest_kept() -> None:
    """A slow change is seen when it has added up; the patch after that is compared with the new one."""
    pixels = torch.tensor([0.0, 0.04, 0.08, 0.12, 0.12, 0.0]).view(6, 1, 1)
    assert changed_patches(pixels, 0.05)[:, 0].tolist() == [True, False, True, False, False, True]
    assert latest_kept(changed_patches(pixels, 0.05))[:, 0].tolist() == [0, 0, 2, 2, 2, 5]


def test_not_a_number_differs() -> None:
    pixels = torch.zeros(3, 2, 1)
    pixels[1, 0] = torch.nan
    assert changed_patches(pixels, 1.0).tolist() == [[True, True], [True, False], [True, False]]


def test_not_a_number_differs_most() -> None:
    pixels = torch.zeros(4, 2, 1)
    pixels[1, 1], pixels[2:, 0] = torch.nan, 1.0
    # A patch also differs from what was not a number before it.
    assert most_changed(pixels, 4).tolist() == [[True, True], [False, True], [False, True], [False, False]]
    assert most_changed(pixels, 5).tolist() == [[True, True], [False, True], [True, True], [False, False]]


@pytest.mark.parametrize("retention", [0.1, 0.3, 0.55, 0.99])
def test_budget(retention: float) -> None:
    pixels = torch.rand(7, 9, 4, generator=torch.Generator().manual_seed(1))
    count = static_count(7, 9, retention)
    kept = most_changed(pixels, count)
    assert kept.sum() == count == max(9, int(63 * retention)) and kept[0].all()
    change = (pixels[1:] - pixels[:-1]).abs().mean(-1)
    left, gone = change[kept[1:]], change[~kept[1:]]
    assert not len(left) or left.min() >= gone.max()
    found = StaticPatches(retention=retention).reduce(tokens_of(pixels, 3))
    assert found is not None and torch.equal(found.survivors, kept.flatten().nonzero()[:, 0])
    assert len(found.survivors) == count


def test_ties_go_to_the_first() -> None:
    pixels = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(4, 1, 1).expand(4, 3, 2)
    assert most_changed(pixels, 5).nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]


def test_who_stands_for_the_others() -> None:
    """The latest patch at the same place that was kept."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(6, 8, 3, generator=generator)
    pixels[2, :4], pixels[4, 2:] = pixels[1, :4], pixels[3, 2:]
    pixels[5] = pixels[4]
    found = StaticPatches(threshold=0.0).reduce(tokens_of(pixels, 2))
    assert found is not None and found.weights is None
    kept = set(found.survivors.tolist())
    for row in range(48):
        latest = max(other for other in kept if other % 8 == row % 8 and other <= row)
        assert found.survivors[found.assignment[row]] == latest
        assert torch.equal(pixels.flatten(0, 1)[latest], pixels.flatten(0, 1)[row])
    assert len(kept) == 48 - 4 - 6 - 8


def test_nothing_to_leave_out() -> None:
    assert StaticPatches(retention=1.0).layers(SHAPE) == ()
    assert StaticPatches().layers(SHAPE) == (0,)
    assert StaticPatches().reduce(tokens_of(torch.zeros(1, 4, 2), 2)) is None, "one frame, so an image"
