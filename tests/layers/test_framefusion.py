"""FrameFusion's tensor functions: the authors' vectors, and the same done token by token over several layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spatiotoken.layers.framefusion import (
    FrameFusionState,
    framefusion_plan,
    framefusion_prune_count,
    framefusion_sparsity,
)
from spatiotoken.layers.runs import NO_PARTNER, framefusion_merge, framefusion_similarity
from tests.vectors import cases


def test_authors_results() -> None:
    for hyper, tensors in cases("FrameFusion"):
        features = tensors["in.features"].float()
        frames, places = features.shape[:2]
        hidden, place = features.flatten(0, 1), torch.arange(places).repeat(frames)
        merges, state = framefusion_plan(
            framefusion_similarity(hidden, place),
            FrameFusionState(),
            cost=hyper["cost"],
            similarity_bound=hyper["similarity_lower_bound"],
            ratio_bound=hyper["ratio_lower_bound"],
            num_layers=hyper["num_layers"],
        )
        assert state == FrameFusionState((), "done")
        merged, kept, assignment = framefusion_merge(hidden, place, merges)
        prefix, suffix = hyper["n_prefix"], hyper["n_suffix"]
        assert torch.equal(prefix + kept, tensors["out.kept_pos_0"][prefix:-suffix].long())
        torch.testing.assert_close(merged, tensors["out.hidden_0"][prefix:-suffix], atol=2e-4, rtol=0)
        assert torch.equal(assignment[kept], torch.arange(kept.shape[0]))


def walk(hidden: Tensor, place: Tensor, bound: float) -> tuple[list[list[int]], list[bool]]:
    """Members of each survivor, by its first, and which tokens merge: token by token along each place."""
    members: dict[int, list[int]] = {}
    merges = [False] * len(place)
    for where in place.unique().tolist():
        head = before = -1
        for token in (place == where).nonzero()[:, 0].tolist():
            if before >= 0 and torch.cosine_similarity(hidden[token], hidden[before], dim=0) >= bound:
                merges[token] = True
                members[head].append(token)
            else:
                head = token
                members[head] = [token]
            before = token
    return [members[head] for head in sorted(members)], merges


@pytest.mark.parametrize(("frames", "places"), [(1, 1), (1, 6), (2, 5), (7, 1), (6, 9)])
def test_layer_after_layer_equals_a_walk_along_each_place(frames: int, places: int) -> None:
    generator = torch.Generator().manual_seed(frames)
    hidden = torch.randn(places, 6, generator=generator).repeat(frames, 1)
    hidden = hidden + 0.9 * torch.randn(hidden.shape, generator=generator)
    place = torch.arange(places).repeat(frames)
    state, layers = FrameFusionState(), 12
    while state.phase == "merge":
        similarity = framefusion_similarity(hidden, place)
        expected, expected_merges = walk(hidden, place, 0.6)
        budget = {"cost": 0.1, "similarity_bound": 0.6, "ratio_bound": 0.1}
        merges, after = framefusion_plan(similarity, state, **budget, num_layers=layers)
        merged, kept, assignment = framefusion_merge(hidden, place, merges)
        share = sum(expected_merges) / len(place)
        if after.phase != "done":
            assert merges.tolist() == expected_merges
            assert after.sparsities == (*state.sparsities, share)
            assert (after.phase == "prune") == (share < 0.1)
            assert kept.tolist() == [group[0] for group in expected]
            for value, group, name in zip(merged, expected, range(len(expected)), strict=True):
                torch.testing.assert_close(value, hidden[group].mean(dim=0))
                assert all(assignment[token] == name for token in group)
        # Something else happens in the layer, so that other tokens become alike.
        hidden, place = merged + 0.5 * torch.randn(merged.shape, generator=generator), place[kept]
        state = after
    assert len(state.sparsities) > 1 or frames < 3
    count = framefusion_prune_count(len(place), state, 0.1, layers)
    assert 1 <= count <= len(place)


def test_sparsity_spends_the_budget() -> None:
    assert framefusion_sparsity((), 0.3, 28) == pytest.approx(0.7)
    assert framefusion_sparsity((), 1.0, 28) == 0.0
    # Four layers of which the first works on a half: 1.5 of the budget of 2 is left, for three layers of a half each.
    assert framefusion_sparsity((0.5,), 0.5, 4) == 0.0
    for met in ((0.2,), (0.2, 0.3), (0.1, 0.0, 0.4)):
        left, spent = 1.0, 0.0
        for sparsity in met:
            left *= 1 - sparsity
            spent += left
        rest = left * (1 - framefusion_sparsity(met, 0.4, 10))
        assert spent + (10 - len(met)) * rest == pytest.approx(0.4 * 10)
    assert framefusion_sparsity((0.1,), 0.01, 28) == 1.0  # spent already: the authors' code raises an error
    assert framefusion_sparsity((0.0,) * 4, 0.5, 4) == 0.0  # no layer is to come


def test_tokens_meet_the_last_one_left_at_their_place() -> None:
    east, north = torch.eye(2)
    # Places 0, 1 in frame 0, only place 1 in frame 1, both in frame 2.
    place = torch.tensor([0, 1, 1, 0, 1])
    hidden = torch.stack([east, east, north, 2 * east, 3 * north])
    similarity = framefusion_similarity(hidden, place)
    assert similarity.tolist() == pytest.approx([NO_PARTNER, NO_PARTNER, 0, 1, 1])
    merged, kept, assignment = framefusion_merge(hidden, place, similarity > 0.5)
    assert kept.tolist() == [0, 1, 2] and assignment.tolist() == [0, 1, 2, 0, 2]
    assert merged.tolist() == [[1.5, 0], [1, 0], [0, 2]]


def plan(values: list[float], state: FrameFusionState, cost: float) -> tuple[list[bool], FrameFusionState]:
    merges, after = framefusion_plan(
        torch.tensor(values), state, cost=cost, similarity_bound=0.6, ratio_bound=0.3, num_layers=10
    )
    return merges.tolist(), after


def test_phases() -> None:
    start = FrameFusionState()
    similarity = [NO_PARTNER, 0.7, 0.9, 0.6, 0.9]
    # 80 % could go and less is asked for: the most similar merge, of equals the first, and that is all.
    assert plan(similarity, start, 0.75) == ([False, False, True, False, False], FrameFusionState((), "done"))
    assert plan(similarity, start, 0.5) == ([False, False, True, False, True], FrameFusionState((), "done"))
    # More is asked for: go on, unless nothing much is alike.
    assert plan(similarity, start, 0.1) == ([False, True, True, True, True], FrameFusionState((0.8,), "merge"))
    assert plan([NO_PARTNER, 0.7, 0.0, 0.0, 0.0], start, 0.1)[1] == FrameFusionState((0.2,), "prune")
    still_image = [NO_PARTNER] * 3
    assert plan(still_image, start, 0.5) == ([False] * 3, FrameFusionState((0.0,), "prune"))
    assert plan(similarity, start, 1.0) == ([False] * 5, FrameFusionState((), "done"))


def test_keeping_all_changes_nothing() -> None:
    hidden = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    merged, kept, assignment = framefusion_merge(hidden, torch.arange(3).repeat(2), torch.zeros(6, dtype=torch.bool))
    assert torch.equal(merged, hidden) and merged.dtype == hidden.dtype
    assert kept.tolist() == assignment.tolist() == list(range(6))


def test_prune_keeps_what_is_looked_at() -> None:
    # Four of ten layers' work is to be done; the one behind took all tokens, so nine share three.
    state = FrameFusionState((0.0,), "prune")
    assert framefusion_prune_count(9, state, 0.4, 10) == 3
    assert framefusion_prune_count(9, state, 0.01, 10) == 1
