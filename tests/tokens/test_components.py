"""Connected components of similar tokens."""

from __future__ import annotations

import pytest
import torch

from spatiotoken.tokens import components
from spatiotoken.tokens.components import best_in_group, connected_components


def by_search(features: torch.Tensor, threshold: float) -> tuple[list[int], list[int]]:
    unit = torch.nn.functional.normalize(features, dim=-1)
    near = (unit @ unit.T > threshold) | torch.eye(len(unit), dtype=torch.bool)
    roots = [-1] * len(unit)
    for root in range(len(unit)):
        stack = [root] if roots[root] < 0 else []
        while stack:
            node = stack.pop()
            if roots[node] < 0:
                roots[node] = root
                stack += near[node].nonzero()[:, 0].tolist()
    return roots, near.sum(dim=1).tolist()


@pytest.mark.parametrize("pairs", [1, 500, 1 << 23])
def test_equals_a_search(monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    """Whatever the size of the blocks: one row, some, all."""
    monkeypatch.setattr(components, "_PAIRS", pairs)
    generator = torch.Generator().manual_seed(0)
    for dim, threshold in ((2, 0.9999), (3, 0.98), (3, 0.9), (8, 0.7), (3, -1.0)):
        features = torch.randn(2, 60, dim, generator=generator)
        roots, degree = connected_components(features, threshold)
        for got, connected, graph in zip(roots, degree, features, strict=True):
            assert (got.tolist(), connected.tolist()) == by_search(graph, threshold)


@pytest.mark.parametrize("pairs", [200, 1 << 23])
def test_long_chain(monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    """Tokens on a half circle, each near its neighbours only, in mixed order; and one apart."""
    monkeypatch.setattr(components, "_PAIRS", pairs)
    angle = torch.linspace(0, 3, 100)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    chain = torch.stack([angle.cos(), angle.sin(), torch.zeros(100)], dim=1)
    roots, degree = connected_components(torch.cat([chain, torch.tensor([[0.0, 0.0, 1.0]])])[None], 0.9992)
    assert roots[0].tolist() == [0] * 100 + [100]
    assert degree[0].sort().values.tolist() == [1, 2, 2] + [3] * 98


def test_zero_vectors_stay_alone() -> None:
    roots, degree = connected_components(torch.zeros(1, 3, 4), 0.5)
    assert roots.tolist() == [[0, 1, 2]] and degree.tolist() == [[1, 1, 1]]


def test_best_in_group() -> None:
    scores = torch.tensor([[1.0, 5.0, 5.0, 2.0], [4.0, 3.0, 2.0, 1.0]])
    group = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]])
    assert best_in_group(scores, group, 2).tolist() == [[3, 1], [2, 0]]
