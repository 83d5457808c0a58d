"""Columns by the weights of sampled queries."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spatiotoken.attention.blocks import as_columns
from spatiotoken.attention.kernels.pattern import visible_pairs
from spatiotoken.attention.sampleattention import SampleAttention
from spatiotoken.attention.weights import sampled_mass, spread_rows
from tests.attention import attention_map, prefill_inputs


def test_rows_lie_at_equal_distances_and_end_with_the_last() -> None:
    assert spread_rows(4, 40, torch.device("cpu")).tolist() == [9, 19, 29, 39]
    assert spread_rows(3, 10, torch.device("cpu")).tolist() == [2, 5, 9]
    assert spread_rows(5, 5, torch.device("cpu")).tolist() == [0, 1, 2, 3, 4]
    assert spread_rows(0, 5, torch.device("cpu")).tolist() == []


def test_mass_equals_the_rows_of_the_whole_map(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = prefill_inputs(50, heads=4, kv_heads=2, dim=8)
    causal = torch.ones(50, 50, dtype=torch.bool).tril()
    logits = inputs.query @ inputs.key.repeat_interleave(2, dim=0).transpose(1, 2) * inputs.scale
    weights = logits.masked_fill(~causal, -torch.inf).softmax(dim=-1)
    expected = weights[:, spread_rows(7, 44, torch.device("cpu"))].sum(dim=1)
    torch.testing.assert_close(sampled_mass(inputs, 7, 44), expected)
    monkeypatch.setattr("spatiotoken.attention.weights.ROWS_AT_ONCE", 2)
    torch.testing.assert_close(sampled_mass(inputs, 7, 44), expected)


def test_columns_are_filled_up_behind() -> None:
    selected = torch.tensor([[True, False, True, False], [False, False, False, True]])
    assert as_columns(selected, 2).tolist() == [[0, 2], [3, -1]]
    assert as_columns(selected, 0).shape == (2, 0)


def test_finds_a_heavy_column_of_each_head_and_nothing_else() -> None:
    inputs = prefill_inputs(64, heads=2, kv_heads=2, dim=8)
    query, key = torch.zeros(2, 64, 8), torch.zeros(2, 64, 8)
    query[..., 0], key[0, 13, 0], key[1, 31, 0], key[1, 20, 0] = 100.0, 1.0, 1.0, 1.0
    inputs = replace(inputs, query=query, key=key)
    # Two sampled queries, 31 and 63, of which both see all of these keys.
    method = SampleAttention(rows=2 / 64, alpha=0.9, window=4 / 64, sink=1, block=4)
    pattern = method.pattern(inputs)
    assert pattern.columns is not None and pattern.columns.tolist() == [[[0, 13, -1], [0, 20, 31]]]
    seen = visible_pairs(pattern, 64, 64)[0, 0]
    assert seen[63].nonzero().flatten().tolist() == [0, 13, 56, 57, 58, 59, 60, 61, 62, 63]


def test_share_of_the_sampled_weights() -> None:
    inputs = prefill_inputs(80, dim=8)
    mass = sampled_mass(inputs, 8, 80)
    method = SampleAttention(rows=0.1, alpha=0.6, window=0.05, sink=0, block=4)
    columns = method.pattern(inputs).columns
    assert columns is not None
    for head, row in zip(mass, columns[0], strict=True):
        kept = row[row >= 0]
        share = head[kept].sum() / head.sum()
        assert share >= 0.6 and share - head[kept].min() / head.sum() < 0.6  # the least one is needed


def test_map_is_causal_and_sums_to_one() -> None:
    inputs = prefill_inputs(45, dim=8)
    weights = attention_map(SampleAttention(alpha=0.3, window=0.1, sink=1, block=4, backend="gather"), inputs)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, 45))
    assert not weights.triu(1).any() and (weights.diagonal(dim1=1, dim2=2) > 0).all()


@pytest.mark.parametrize("length", [1, 3, 4, 41])
def test_any_length_and_equal_keys(length: int) -> None:
    inputs = prefill_inputs(length, dim=8)
    inputs = replace(inputs, key=torch.ones_like(inputs.key).half() * 300, query=inputs.query.half() * 300)
    inputs = replace(inputs, value=inputs.value.half())
    method = SampleAttention(alpha=0.5, sink=1, block=4, backend="gather")
    columns = method.pattern(inputs).columns
    assert columns is not None and columns[0, 0, 0] == 0 and (columns[0] == columns[0, :1]).all()
    assert method.attend(inputs).density <= 1
    assert method.is_dense(4, 0, 1) and not method.is_dense(5, 0, 1)
    for dense in (SampleAttention(alpha=1, block=4), SampleAttention(window=1, block=4)):
        assert dense.attend(inputs).output is None
