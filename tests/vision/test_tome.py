"""ToMe within a tower."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spatiotoken.vision import pairs
from spatiotoken.vision.pairs import mean_keys, merge_patches, steps_left
from spatiotoken.vision.tome import ToMe, tome_count
from tests.vectors import cases
from tests.vision.towers import applied, drawn, shape, through, tokens_of


def plain_step(keys: Tensor, reduction: int) -> list[int]:
    """Which token each of ``keys [n, d]`` goes to: the rule, one token at a time."""
    unit = keys / keys.norm(dim=-1, keepdim=True)
    best = []
    for even in range(0, len(keys), 2):
        alike = [(float(unit[even] @ unit[odd]), -odd) for odd in range(1, len(keys), 2)]
        if alike:
            similarity, odd = max(alike)
            best.append((-similarity, even, -odd))
    owner = list(range(len(keys)))
    for _, even, odd in sorted(best)[:reduction]:
        owner[even] = odd
    return owner


def test_authors_vectors() -> None:
    """Sizes, owners and means of one layer; theirs with a class token has other even tokens than ours."""
    compared = 0
    for hyper, tensors in cases("ToMe"):
        features = tensors["in.features"].float()
        if hyper["class_token"]:
            continue
        frames, places, _ = features.shape
        count = places - hyper["r"]
        tokens = tokens_of(features.flatten(0, 1)[:, None].repeat(1, 2, 1), (frames, 1, places))
        merge = merge_patches(tokens, mean_keys(tokens), count)
        owner = tensors["out.owner"].long()
        # Theirs are in another order: each of ours goes to the place in which theirs have the surviving patch.
        survivors = merge.survivors.view(frames, count) % places
        order = owner.gather(1, survivors)
        assert torch.equal(order.gather(1, merge.assignment.view(frames, places) % count), owner)
        left = applied(tokens, merge)
        assert torch.equal(left.sizes.view(frames, count), tensors["out.size"][..., 0].gather(1, order))
        merged = left.hidden[:, : features.shape[2]].unflatten(0, (frames, count))
        expected = tensors["out.merged"].take_along_dim(order[..., None], 1)
        torch.testing.assert_close(merged, expected, atol=2e-4, rtol=0)
        compared += 1
    assert compared == 2


def test_merges_the_most_similar_pair_by_mean_key() -> None:
    # Heads that differ, with means (1, 0), (0, 1), (0.1, 3), (-1, 0).
    means = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 3.0], [-1.0, 0.0]])
    spread = torch.tensor([[5.0, -7.0], [3.0, 2.0], [-4.0, 1.0], [2.0, 2.0]])
    tokens = tokens_of(torch.stack([means + spread, means - spread], dim=1), (1, 2, 2))
    tokens = replace(tokens, sizes=torch.tensor([1.0, 3.0, 1.0, 1.0]))
    merge = merge_patches(tokens, mean_keys(tokens), 3)
    assert merge.survivors.tolist() == [0, 1, 3] and merge.assignment.tolist() == [0, 1, 1, 2]
    assert merge.weights is tokens.sizes and merge.counts == (3,)
    left = applied(tokens, merge)
    assert left.sizes.tolist() == [1, 4, 1]
    torch.testing.assert_close(left.hidden[1], (3 * tokens.hidden[1] + tokens.hidden[2]) / 4)


@pytest.mark.parametrize("seed", range(8))
def test_each_layer_follows_the_rule(seed: int) -> None:
    grid = [(3, 4, 4), (1, 3, 5), (2, 1, 7), (4, 2, 3)][seed % 4]
    tokens, method = drawn(grid, seed), ToMe(retention=0.5)
    for layer in method.layers(tokens.tower):
        tokens = replace(tokens, layer=layer)
        places = tokens.counts[0]
        count = tome_count(grid[1] * grid[2], 0.5, layer, 4)
        merge = method.reduce(tokens)
        if merge is None:
            assert count == places
            continue
        assert 2 * count >= places  # one matching is enough
        owner = merge.survivors[merge.assignment].view(grid[0], places)
        for frame, keys in enumerate(mean_keys(tokens)):
            assert (owner[frame] - frame * places).tolist() == plain_step(keys, places - count)
        tokens = applied(tokens, merge)


@pytest.mark.parametrize("retention", [0.01, 0.2, 0.25, 0.5, 0.77, 0.99])
@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 4, 4), (3, 5, 7), (1, 2, 1)])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_budget(retention: float, grid: tuple[int, int, int], depth: int) -> None:
    patches = grid[1] * grid[2]
    left, owner = through(ToMe(retention=retention), drawn(grid, 0, depth=depth))
    assert left.counts == (max(1, int(patches * retention)),) * grid[0]
    # Nothing leaves its frame.
    assert torch.equal(left.places[owner] // patches, torch.arange(grid[0]).repeat_interleave(patches))


def test_about_as_many_go_in_each_layer() -> None:
    counts = [729, *(tome_count(729, 0.25, layer, 26) for layer in range(26))]
    assert counts[-1] == 182 and {a - b for a, b in zip(counts, counts[1:], strict=False)} == {21, 22}
    assert [steps_left(10, 1, step, 3) for step in range(3)] == [7, 4, 1]


def test_several_matchings_in_a_layer() -> None:
    """Where more than half must go: first all even ones, then 1 (for 0, 1 and 2) and 5 (for 4 and 5) with 3."""
    angles = torch.tensor([0.0, 0.01, 0.02, 1.0, 1.2, 1.21, 1.5, 1.52])
    keys = torch.stack([angles.cos(), angles.sin()], dim=1)[:, None].repeat(1, 2, 1)
    left, owner = through(ToMe(retention=0.25), tokens_of(keys, (1, 2, 4), depth=1))
    assert owner.tolist() == [0] * 6 + [1] * 2 and left.places.tolist() == [3, 7]
    torch.testing.assert_close(left.hidden[0], keys[:6].flatten(1).mean(dim=0))


def test_frames_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one another, and of how many are matched at a time."""
    tokens, method = drawn((5, 4, 4), 3), ToMe(retention=0.4)
    _, owner = through(method, tokens)
    alone = []
    for frame in range(5):
        assert tokens.attention is not None
        rows = slice(16 * frame, 16 * frame + 16)
        alone.append(through(method, tokens_of(tokens.attention.key[rows], (1, 4, 4)))[1] + 6 * frame)
    assert torch.equal(owner, torch.cat(alone))
    monkeypatch.setattr(pairs, "_COSINES", 2 * 64)
    assert torch.equal(owner, through(method, tokens)[1])


def test_ties_go_to_the_lowest_index() -> None:
    merge = ToMe(retention=0.5).reduce(tokens_of(torch.ones(8, 2, 3), (1, 2, 4), depth=2))
    assert merge is not None
    assert merge.survivors.tolist() == [1, 3, 4, 5, 6, 7] and merge.assignment.tolist() == [0, 0, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_ranks_in_float32(dtype: torch.dtype) -> None:
    tokens, method = drawn((2, 4, 4), 5, dtype), ToMe(retention=0.5)
    assert tokens.attention is not None
    same = tokens_of(tokens.attention.key.float(), tokens.grid)
    got, expected = method.reduce(tokens), method.reduce(same)
    assert got is not None and expected is not None
    assert torch.equal(got.survivors, expected.survivors) and torch.equal(got.assignment, expected.assignment)
    assert through(method, tokens)[0].hidden.dtype == dtype


def test_keeps_the_budget_among_nan() -> None:
    tokens = drawn((2, 4, 4), 6)
    assert tokens.attention is not None
    tokens.attention.key[3] = torch.nan
    assert through(ToMe(retention=0.3), tokens)[0].counts == (4, 4)


def test_layers() -> None:
    assert ToMe(retention=1.0).layers(shape(5)) == ()
    assert ToMe(retention=0.9).layers(shape(5)) == (0, 1, 2, 3, 4)
    with pytest.raises(ValueError, match="without attention"):
        ToMe().reduce(replace(drawn((1, 4, 4), 0), attention=None))
