"""Vertical and slash lines or single blocks, per head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spatiotoken.attention import PrefillInputs
from spatiotoken.attention.flexprefill import FlexPrefill, active_blocks, divergence, line_mass, tokens_needed
from spatiotoken.attention.weights import last_rows_weights
from tests.attention import attention_map, prefill_inputs
from tests.vectors import cases


def test_blocks_of_the_authors() -> None:
    for hyper, tensors in cases("FlexPrefill"):
        query, key = (tensors[f"in.{name}"].float()[0] for name in ("q", "k"))
        scale, block, least = query.shape[-1] ** -0.5, hyper["block_size"], hyper["min_budget_blocks"]
        gamma, tau = hyper["gamma"], hyper["tau"]
        # Their budgets are in units of 128 tokens whatever the block.
        theirs = active_blocks(query, key, scale, block, gamma, tau, least, unit=128)
        assert theirs.equal(tensors["out.mask"])
        method = FlexPrefill(gamma=gamma, tau=tau, min_budget=least * block, block=block)
        ours = method.pattern(PrefillInputs(query, key, key, scale)).blocks[0]
        assert bool((theirs <= ours).all())
        if hyper["tau"] == 0.5:  # all heads take single blocks, on which the unit has no bearing
            assert ours.equal(theirs)


def test_lines_equal_sums_written_out() -> None:
    inputs = prefill_inputs(13, heads=4, kv_heads=2, dim=8)
    vertical, slash = line_mass(inputs.query, inputs.key, inputs.scale, 5)
    weights = last_rows_weights(inputs, 5)
    expected = torch.zeros(4, 13)
    for row in range(5):
        for key in range(8 + row + 1):
            expected[:, 12 - (8 + row - key)] += weights[:, row, key] / 5
    torch.testing.assert_close(vertical, weights.mean(dim=1))
    torch.testing.assert_close(slash, expected)


def test_tokens_needed_and_divergence() -> None:
    mass = torch.tensor([[0.1, 0.5, 0.15, 0.25], [1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    assert tokens_needed(mass, 0.6).tolist() == [2, 1, 3]
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert float(divergence(one, one)) == 0
    assert float(divergence(one, other)) == pytest.approx(torch.tensor(2.0).log().sqrt().item())


def test_finds_planted_lines() -> None:
    """Head 0 looks at a column, head 1 at the key 9 before each query, both too sharply for pooled keys to tell."""
    length, block = 64, 4
    angle = torch.arange(length)[:, None] * torch.tensor([2.4, 1.1, 0.37])
    key = torch.stack([torch.zeros(length, 6), torch.cat([angle.cos(), angle.sin()], dim=-1)])
    key[0, 20, 0] = 1.0
    query = torch.stack([torch.zeros(length, 6), 30 * key[1].roll(9, dims=0)])
    query[0, :, 0] = 30.0
    inputs = PrefillInputs(query, key, key, 1.0)
    # Two lines of either kind at least, of which the first keys and the main diagonal are one.
    column, back = FlexPrefill(gamma=0.9, tau=0.0, min_budget=8, block=block).pattern(inputs).blocks[0]
    number = torch.arange(16)
    assert bool(column[5:, 5].all()) and bool(column[:, 0].all()) and bool(column[number, number].all())
    assert bool(back[number[2:], number[2:] - 2].all()), "9 back is 2 blocks back"
    assert float(column.sum()) < 0.5 * 136 and float(back.sum()) < 0.5 * 136


def test_takes_single_blocks_where_pooled_keys_tell() -> None:
    """All of a block alike: the pooled map is the real one, and keeps the planted block of each row."""
    length, block = 48, 4
    number = torch.arange(length) // block
    key = torch.nn.functional.one_hot(number, 16).float()[None]
    target = (number - 3).clamp(min=0) * (number % 2)
    query = 30 * torch.nn.functional.one_hot(target, 16).float()[None]
    inputs = PrefillInputs(query, key, key, 1.0)
    blocks = FlexPrefill(gamma=0.9, tau=0.5, min_budget=4, block=block).pattern(inputs).blocks[0, 0]
    rows = torch.arange(12)
    sharp = rows[5::2]
    assert int(blocks[sharp, sharp - 3].sum()) >= len(sharp) - 2, (
        "up to 0.9 of 12 rows' mass, the crossing one left out"
    )
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[:, 0] = expected[rows, rows] = True
    expected[rows, target[::block]] = True
    assert bool((blocks <= expected).all())


@pytest.mark.parametrize("length", [1, 3, 9, 41, 64])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_weights_are_causal_and_whole(length: int, tau: float) -> None:
    inputs = prefill_inputs(length, heads=4, kv_heads=2, dim=8)
    method = FlexPrefill(gamma=0.3, tau=tau, min_budget=4, block=4, backend="gather")
    if length < 9:
        assert method.attend(inputs).output is None
        return
    assert method.attend(inputs).density < (0.75 if length > 9 else 1)
    weights = attention_map(method, inputs)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, length))
    assert not bool(weights.triu(1).any())


def test_equal_keys_and_large_half_precision() -> None:
    inputs = prefill_inputs(40, dim=8)
    same = replace(inputs, key=torch.ones_like(inputs.key))
    method = FlexPrefill(gamma=0.45, tau=0.1, min_budget=4, block=4)
    lines = method.pattern(same).blocks[0]
    assert lines.equal(lines[:1].expand_as(lines)) and bool(lines.diagonal(dim1=-2, dim2=-1).all())
    large = replace(inputs, query=(inputs.query * 3000).half(), key=(inputs.key * 3000).half())
    assert bool(method.pattern(large).blocks[0].diagonal(dim1=-2, dim2=-1).all())


def test_least_budget_and_dense() -> None:
    assert FlexPrefill(gamma=1.0).is_dense(10**6, 0, 1)
    assert FlexPrefill().is_dense(512, 0, 1) and not FlexPrefill().is_dense(513, 0, 1)
    inputs = prefill_inputs(64, dim=8)
    blocks = FlexPrefill(gamma=0.01, tau=0.0, min_budget=12, block=4).pattern(inputs).blocks[0]
    # 3 columns in row 15, and 3 diagonals, of which some meet.
    assert bool(((blocks[:, 15].sum(dim=-1) >= 3) & (blocks[:, 15].sum(dim=-1) <= 6)).all())
