"""STTM's tensor functions: the authors' vectors, and the same trees built cell by cell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spatiotoken.layers.quadtree import sttm_levels, sttm_spatial
from spatiotoken.layers.sttm import sttm_merge, sttm_temporal
from tests.vectors import cases

Box = tuple[int, int, int, int]


def moving_picture(frames: int, height: int, width: int, noise: float = 0.3, dim: int = 6) -> Tensor:
    """``[T, H, W, D]``: a smooth picture with a stripe of detail, hardly changing."""
    generator = torch.Generator().manual_seed(frames + 10 * height + 100 * width)
    coarse = torch.randn(1, dim, 3, 3, generator=generator)
    picture = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0].permute(1, 2, 0)
    picture[:, : width // 3] += torch.randn(height, width // 3, dim, generator=generator)
    return picture + noise * torch.randn(frames, height, width, dim, generator=generator)


def test_authors_results() -> None:
    for hyper, tensors in cases("STTM"):
        frames, height, width = hyper["grid"]
        hidden = tensors["in.features"].float().view(frames, height, width, -1)
        merged, source, assignment = sttm_merge(
            hidden, hyper["threshold"], hyper["temporal_thresh"], root_level=hyper["root_level"]
        )
        time, row, column = tensors["out.tyxyx"].long().T[:3]
        assert torch.equal(source, (time * height + row) * width + column)
        torch.testing.assert_close(merged, tensors["out.tokens"], atol=2e-4, rtol=0)
        assert torch.equal(torch.bincount(assignment), tensors["out.num_patches"].long())
        assert torch.equal(assignment[source], torch.arange(source.shape[0]))


def test_levels() -> None:
    assert sttm_levels(14, 14, 0) == [(2, 2), (4, 4), (7, 7), (14, 14)]
    assert sttm_levels(14, 14, 1) == [(4, 4), (7, 7), (14, 14)]
    assert sttm_levels(8, 15, 1) == [(4, 8), (8, 15)]
    assert sttm_levels(14, 14, 9) == sttm_levels(14, 14, 3) == [(14, 14)]
    assert sttm_levels(2, 9, 1) == [(2, 9)] and sttm_levels(1, 1, 1) == [(1, 1)]


def tree(picture: Tensor, threshold: float, root_level: int, reference: bool) -> list[tuple[int, Tensor, list[int]]]:
    """Upper left token, feature and tokens of each node of one frame ``[H, W, D]``, from each root downwards."""
    sizes = sttm_levels(picture.shape[0], picture.shape[1], root_level)
    cells = {
        (y, x): (picture[y, x], [y * picture.shape[1] + x]) for y in range(sizes[-1][0]) for x in range(sizes[-1][1])
    }
    levels = [cells]
    children: list[dict[tuple[int, int], list[tuple[int, int]]]] = []
    for h, w in reversed(sizes[1:]):
        below: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for y in range(h):
            for x in range(w):
                below.setdefault(((y + h % 2) // 2, (x + w % 2) // 2), []).append((y, x))
        children.append(below)
        levels.append(
            {
                parent: (
                    torch.stack([levels[-1][part][0] for part in parts]).mean(dim=0),
                    [token for part in parts for token in levels[-1][part][1]],
                )
                for parent, parts in below.items()
            }
        )
    nodes = []

    def visit(level: int, cell: tuple[int, int]) -> None:
        feature, tokens = levels[level][cell]
        parts = children[level - 1][cell] if level else []
        compared = parts + ([(0, 0)] if reference and len(parts) < 4 else [])
        if level == 0 or all(
            torch.cosine_similarity(feature, levels[level - 1][part][0], dim=0) >= threshold for part in compared
        ):
            nodes.append((min(tokens), feature, tokens))
            return
        for part in parts:
            visit(level - 1, part)

    for root in levels[-1]:
        visit(len(levels) - 1, root)
    return sorted(nodes, key=lambda node: node[0])


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize(
    ("height", "width", "root_level"), [(1, 1, 1), (1, 7, 1), (4, 4, 0), (7, 7, 1), (5, 8, 0), (9, 14, 0), (11, 6, 1)]
)
def test_spatial_equals_trees_built_cell_by_cell(height: int, width: int, root_level: int, reference: bool) -> None:
    hidden = moving_picture(3, height, width)
    nodes, source, assignment = sttm_spatial(hidden, 0.8, root_level=root_level, reference=reference)
    count = 0
    for time in range(3):
        for first, feature, tokens in tree(hidden[time], 0.8, root_level, reference):
            offset = time * height * width
            assert source[count] == offset + first
            torch.testing.assert_close(nodes[count], feature)
            assert all(assignment[offset + token] == count for token in tokens)
            count += 1
    assert count == nodes.shape[0] == source.shape[0]
    if min(height, width) > 4:
        assert count < assignment.shape[0]  # the example does merge something


def test_border_regions_are_compared_with_their_own_parts_if_mended() -> None:
    """A 5 x 5 grid of equal tokens but for the upper left one: no region that holds another is to be split for it."""
    hidden = torch.tensor([1.0, 0.0]).repeat(1, 5, 5, 1)
    hidden[0, 0, 0] = torch.tensor([0.0, 1.0])
    for reference, expected in ((True, 1 + 4 * 2 + 4), (False, 9)):
        _, source, _ = sttm_spatial(hidden, 0.9, root_level=1, reference=reference)
        assert source.shape == (expected,), reference


def linked_pairs(nodes: Tensor, source: Tensor, assignment: Tensor, frames: int, threshold: float) -> set[Box]:
    owner = assignment.view(frames, -1)
    met = {
        pair for time in range(frames - 1) for pair in zip(owner[time].tolist(), owner[time + 1].tolist(), strict=True)
    }
    return {(a, b) for a, b in met if torch.cosine_similarity(nodes[a], nodes[b], dim=0) >= threshold}


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 6, 6), (2, 1, 1), (9, 1, 4), (6, 7, 7), (5, 8, 11)])
def test_temporal_mended_finds_all_that_is_linked(frames: int, height: int, width: int) -> None:
    hidden = moving_picture(frames, height, width)
    parts = sttm_spatial(hidden, 0.9, root_level=0)
    merged, source, assignment = sttm_temporal(*parts, frames, 0.93, reference=False)
    group = list(range(parts[0].shape[0]))
    for a, b in sorted(linked_pairs(*parts, frames, 0.93)):
        low, high = sorted((group[a], group[b]))
        group = [low if name == high else name for name in group]
    names = sorted(set(group))
    assert source.tolist() == [int(parts[1][name]) for name in names]
    for position, name in enumerate(names):
        members = [node for node, its in enumerate(group) if its == name]
        torch.testing.assert_close(merged[position], parts[0][members].mean(dim=0))
    assert assignment.tolist() == [names.index(group[node]) for node in parts[2].tolist()]
    authors = sttm_temporal(*parts, frames, 0.93)
    assert authors[1].shape[0] >= source.shape[0]  # theirs stops early: never fewer groups
    assert bool(torch.isin(source, authors[1]).all())


def test_the_search_of_the_authors_leaves_groups_apart() -> None:
    """There are 175 of theirs where linked nodes form 172 groups."""
    hyper, tensors = cases("STTM")[0]
    hidden = tensors["in.features"].float().view(*hyper["grid"], -1)
    parts = sttm_spatial(hidden, hyper["threshold"])
    for reference, expected in ((True, 175), (False, 172)):
        merged, _, _ = sttm_temporal(*parts, hidden.shape[0], hyper["temporal_thresh"], reference=reference)
        assert merged.shape[0] == expected


def test_a_still_scene_becomes_its_regions() -> None:
    """Left half one thing, right half another; in the last frame the right half is new."""
    east, north = torch.eye(2)
    hidden = torch.stack([east, east, north, north])[None, None].repeat(3, 4, 1, 1).clone()
    hidden[2, :, 2:] = -north
    merged, source, assignment = sttm_merge(hidden, 0.9, 0.9, root_level=0)
    assert source.tolist() == [0, 2, 8, 10, 32 + 2, 32 + 10]
    assert merged.tolist() == [[1, 0], [0, 1], [1, 0], [0, 1], [0, -1], [0, -1]]
    assert assignment.view(3, 4, 4)[:, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 4, 4]]


def test_thresholds_out_of_reach_keep_all() -> None:
    hidden = moving_picture(2, 5, 7).bfloat16()
    for reference in (True, False):
        merged, source, assignment = sttm_merge(hidden, 1.1, 1.1, reference=reference)
        assert torch.equal(merged, hidden.flatten(0, 2)) and merged.dtype == hidden.dtype
        assert torch.equal(source, assignment) and torch.equal(source, torch.arange(2 * 5 * 7))
