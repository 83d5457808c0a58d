"""The greedy choice by determinants is the one that computing every determinant gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spatiotoken.frames.determinantal import FLOOR, greedy_determinant


def kernel(items: int, rank: int, seed: int) -> Tensor:
    vectors = torch.randn(items, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return vectors @ vectors.T


def brute_force(full: Tensor, count: int, quality: Tensor, given: list[int]) -> tuple[list[int], list[float]]:
    """Of the items that are not given, by a determinant for each possible choice."""
    order: list[int] = []
    gains: list[float] = []
    for _ in range(count):
        before = torch.linalg.slogdet(full[given + order][:, given + order]).logabsdet
        values = [
            float(torch.linalg.slogdet(full[rows][:, rows]).logabsdet - before + quality[item])
            for item in range(full.shape[0])
            for rows in [given + order + [item]]
            if item not in given + order
        ]
        free = [item for item in range(full.shape[0]) if item not in given + order]
        best = max(range(len(free)), key=values.__getitem__)
        order.append(free[best])
        gains.append(values[best])
    return order, gains


@pytest.mark.parametrize("seed", range(8))
def test_as_by_determinants(seed: int) -> None:
    full = kernel(9, 12, seed)
    quality = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 100))
    for own in (torch.zeros_like(quality), quality):
        order, gains = greedy_determinant(full.__getitem__, full.diagonal()[None], 6, own)
        expected, values = brute_force(full, 6, own, [])
        assert order[0].tolist() == expected
        assert gains[0].tolist() == pytest.approx(values, abs=1e-9)
    plain, _ = greedy_determinant(full.__getitem__, full.diagonal()[None], 6)
    assert plain.tolist() == greedy_determinant(full.__getitem__, full.diagonal()[None], 6, quality * 0)[0].tolist()
    chosen = plain[0]
    _, gains = greedy_determinant(full.__getitem__, full.diagonal()[None], 6)
    assert gains.sum().item() == pytest.approx(torch.linalg.slogdet(full[chosen][:, chosen]).logabsdet.item(), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_given_what_was_chosen_before(seed: int) -> None:
    full = kernel(10, 12, seed)
    given = torch.tensor([2, 7])
    factor = torch.linalg.cholesky(full[given][:, given])
    rows = torch.linalg.solve_triangular(factor, full[given], upper=False)
    barred = torch.zeros(10, dtype=torch.float64).index_fill_(0, given, -torch.inf)
    order, gains = greedy_determinant(full.__getitem__, full.diagonal()[None], 5, barred, rows[None])
    expected, values = brute_force(full, 5, torch.zeros(10), given.tolist())
    assert order[0].tolist() == expected
    assert gains[0].tolist() == pytest.approx(values, abs=1e-9)


def test_several_kernels_at_once() -> None:
    kernels = torch.stack([kernel(8, 10, seed) for seed in range(3)])
    rows = torch.arange(3)
    order, gains = greedy_determinant(
        lambda index: kernels[rows, index], kernels.diagonal(dim1=1, dim2=2).contiguous(), 5
    )
    for row in rows.tolist():
        one = kernels[row]
        alone = greedy_determinant(one.__getitem__, one.diagonal()[None], 5)
        assert order[row].tolist() == alone[0][0].tolist()
        assert gains[row].tolist() == pytest.approx(alone[1][0].tolist(), abs=1e-9)


def test_first_of_equals_and_copies_last() -> None:
    ones = torch.ones(1, 5, dtype=torch.float64)
    same = torch.ones(5, 5, dtype=torch.float64)
    assert greedy_determinant(same.__getitem__, ones, 5)[0].tolist() == [[0, 1, 2, 3, 4]]
    apart = torch.eye(5, dtype=torch.float64)
    assert greedy_determinant(apart.__getitem__, ones, 5)[0].tolist() == [[0, 1, 2, 3, 4]]
    pairs = torch.kron(torch.eye(2), torch.ones(2, 2)).double()  # 0 is 1, and 2 is 3
    order, gains = greedy_determinant(pairs.__getitem__, ones[:, :4], 4)
    assert order.tolist() == [[0, 2, 1, 3]]
    assert gains[0].exp().tolist() == pytest.approx([1, 1, FLOOR, FLOOR])


def test_zero_kernel() -> None:
    nothing = torch.zeros(4, 4, dtype=torch.float64)
    assert greedy_determinant(nothing.__getitem__, nothing[:1], 4)[0].tolist() == [[0, 1, 2, 3]]
