"""ToDRE: both searches on points whose order is evident, and the search in rounds against one pick by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens.todre import ToDRE, farthest_first, max_sum_first, todre_count


def on_circle(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def naive(unit: Tensor, first: int, count: int, total: bool) -> list[int]:
    picks = [first]
    while len(picks) < count:
        likeness = unit @ unit[picks].T
        worst = likeness.sum(dim=1) if total else likeness.amax(dim=1)
        worst[picks] = torch.inf
        picks.append(int(worst.argmin()))
    return picks


def test_order_on_a_circle() -> None:
    # 195 is 175 degrees from 10; 90 is 80 from it; then 180 is 15 from 195 and 0 only 10 from 10.
    assert farthest_first(on_circle(0, 10, 90, 180, 195), torch.tensor([1]), 5).tolist() == [1, 4, 2, 3, 0]
    # 160 is farthest from 0. After both, 75 is farthest from the nearer, but 150 is the least like them in sum.
    clip = VideoFeatures(on_circle(0, 150, 75, 160), (1, 2, 2), saliency=torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert ToDRE(retention=0.75).reduce(clip).source.tolist() == [0, 2, 3]
    assert ToDRE(retention=0.75, objective="max-sum").reduce(clip).source.tolist() == [0, 1, 3]


@pytest.mark.parametrize("seed", range(6))
def test_same_as_one_by_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # More tokens than candidates of a round, in double precision, where no two paths round differently.
    unit = normalize(torch.randn(700, 12, generator=generator, dtype=torch.float64), dim=-1)
    first = torch.randint(700, (1,), generator=generator)
    count = [1, 2, 40, 350, 699, 700][seed]
    assert farthest_first(unit, first, count).tolist() == naive(unit, int(first), count, total=False)
    assert max_sum_first(unit, first, count).tolist() == naive(unit, int(first), count, total=True)


def test_copies_are_picked_last_and_once() -> None:
    unit = on_circle(0, 90, 180).repeat(40, 1)
    order = farthest_first(unit, torch.tensor([2]), 120)
    assert order[:3].tolist() == [2, 0, 1]
    assert order[3:].tolist() == [i for i in range(120) if i > 2]
    assert max_sum_first(unit, torch.tensor([2]), 120).unique().shape == (120,)


def test_begins_with_the_most_salient_token_of_the_last_row() -> None:
    embeddings = on_circle(0, 20, 40, 60) * torch.tensor([[3.0], [1.0], [1.0], [9.0]])
    saliency = torch.tensor([[9.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.4, 0.3]])
    clip = VideoFeatures(embeddings, (2, 1, 2), saliency=saliency)
    assert ToDRE(retention=0.3).reduce(clip).source.tolist() == [2]
    assert ToDRE(retention=0.5).reduce(clip).source.tolist() == [0, 2]
    assert ToDRE(retention=1.0).reduce(clip).embeddings is embeddings
    assert todre_count(4, 0.5) == 2 and todre_count(4, 0.01) == 1
