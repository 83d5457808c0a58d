"""What methods share that leave out patches of a tower."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spatiotoken.vision import pruning
from spatiotoken.vision.pruning import nearest_layers, pruned, stand_ins, vote
from tests.vision.pruners import attended, left, patches, plain_owners


def test_layers_are_the_nearest_ones() -> None:
    assert nearest_layers((0.0, 1 / 3, 2 / 3), range(12), 12) == (0, 4, 8)
    assert nearest_layers((0.25, 0.5, 0.75), range(27), 27) == (7, 13, 20)  # 6.75, 13.5 and 20.25
    # Qwen2.5-VL's; 16 is as far from 15 as 8 is from 7, and 24 from 23.
    assert nearest_layers((0.25, 0.5, 0.75), (7, 15, 23, 31), 32) == (7, 15, 23)
    assert nearest_layers((0.75, 0.25, 0.5), (7, 15, 23, 31), 32) == (7, 15, 23)
    assert nearest_layers((0.25, 0.5, 0.75), (2,), 3) == (2,)
    assert nearest_layers((0.5,), (1, 3), 4) == (1,)
    with pytest.raises(ValueError, match="supported are towers that have some"):
        nearest_layers((0.5,), (), 4)


def plain_votes(
    query: Tensor, key: Tensor, scale: float, signal: Tensor, rounds: int, first: Tensor | None, real: Tensor
) -> Tensor:
    """Vote after vote, in double precision, without what is not real."""
    found = []
    for graph in range(len(query)):
        keys = key[graph][real[graph]].double()
        votes, places = signal[graph].double(), real[graph].nonzero()[:, 0]
        for number in range(rounds):
            next_votes = torch.zeros(key.shape[1], dtype=torch.float64)
            for voter in range(query.shape[1]):
                next_votes[places] += votes[voter] * (keys @ query[graph, voter].double() * scale).softmax(dim=0)
            votes = next_votes if number or first is None else next_votes + first[graph].double()
        found.append(votes)
    return torch.stack(found).float()


@pytest.mark.parametrize("held", [1 << 25, 3 * 49, 20, 1])
@pytest.mark.parametrize("rounds", [1, 4])
def test_votes_of_any_number_of_pairs_at_a_time(held: int, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "PAIRS", held)
    generator = torch.Generator().manual_seed(held + rounds)
    query, key = (torch.randn(5, 7, 6, generator=generator) for _ in range(2))
    signal, first = (torch.rand(5, 7, generator=generator) for _ in range(2))
    everything = torch.ones(5, 7, dtype=torch.bool)
    found = vote(query, key, 0.4, signal, rounds)
    torch.testing.assert_close(found, plain_votes(query, key, 0.4, signal, rounds, None, everything))
    torch.testing.assert_close(found.sum(dim=1), signal.sum(dim=1))
    found = vote(query, key, 0.4, signal, rounds, first=first)
    torch.testing.assert_close(found, plain_votes(query, key, 0.4, signal, rounds, first, everything))
    real = torch.arange(7) < torch.tensor([[7], [1], [3], [7], [6]])
    signal = signal * real
    found = vote(query, key, 0.4, signal, rounds, real=real)
    torch.testing.assert_close(found, plain_votes(query, key, 0.4, signal, rounds, None, real))
    assert (found[~real] == 0).all()
    found = vote(query[:, :2], key, 0.4, signal[:, :2], 1)
    torch.testing.assert_close(found, plain_votes(query[:, :2], key, 0.4, signal, 1, None, everything))


@pytest.mark.parametrize("held", [1 << 25, 60, 1])
def test_stand_ins_are_the_most_similar_of_the_frame(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "PAIRS", held)
    for seed in range(6):
        tokens = patches((3, 2, 4), seed)
        kept = torch.rand(3, 8, generator=torch.Generator().manual_seed(seed)) < 0.4
        kept[:, seed] = True
        counts = tuple(kept.sum(dim=1).tolist())
        merge = pruned(tokens, attended(tokens).key.mean(dim=1).unflatten(0, (3, 8)), kept, counts)
        survivors = kept.flatten().nonzero()[:, 0]
        assert torch.equal(merge.survivors, survivors) and merge.counts == counts
        assert survivors[merge.assignment].tolist() == plain_owners(tokens, survivors.tolist())
        left(tokens, merge)


def test_stand_ins_of_frames_of_different_lengths() -> None:
    tokens = replace(patches((1, 1, 10), 3), counts=(4, 1, 5), grid=(3, 1, 5))
    rows, real = tokens.rows_by_frame()
    mask = torch.tensor([0, 1, 0, 1, 1, 1, 0, 0, 0, 1], dtype=torch.bool)
    merge = pruned(tokens, attended(tokens).key.mean(dim=1)[rows], mask[rows] & real, (2, 1, 2), real)
    assert merge.survivors.tolist() == [1, 3, 4, 5, 9]
    assert merge.survivors[merge.assignment].tolist() == plain_owners(tokens, [1, 3, 4, 5, 9])
    left(tokens, merge)


def test_ties_and_what_is_not_a_number() -> None:
    same = torch.ones(1, 4, 3)
    kept = torch.tensor([[False, True, True, False]])
    assert stand_ins(same, kept).tolist() == [[1, 1, 2, 1]]
    assert stand_ins(torch.zeros(1, 4, 3), kept).tolist() == [[1, 1, 2, 1]]
    odd = same.clone()
    odd[0, 0] = torch.nan
    assert stand_ins(odd, kept).tolist() == [[1, 1, 2, 1]], "only what is kept stands in"
    odd[0, 2] = torch.inf
    assert set(stand_ins(odd, kept)[0].tolist()) <= {1, 2}
