"""Important tokens of a layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spatiotoken.attention.kernels.pattern import visible_pairs
from spatiotoken.attention.zipvl import ZipVL, important_tokens, probe_mass
from tests.attention import attention_map, prefill_inputs


def test_sum_decides_how_many_and_mean_which() -> None:
    mass, probes = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([8, 4, 4, 1])
    # By the sum, 7 of 10 need the first two; by the mean, the last and the second come first.
    assert important_tokens(mass, probes, 0.7).tolist() == [False, True, False, True]
    assert important_tokens(mass, probes, 0.71).tolist() == [True, True, False, True]  # 0.5 ties with 0.5
    assert important_tokens(torch.ones(4), torch.ones(4), 0.5).tolist() == [True, True, False, False]


def test_probes_are_the_latest_and_evenly_spread_queries() -> None:
    inputs = prefill_inputs(30, heads=4, kv_heads=2, dim=8)
    mass, probes = probe_mass(inputs, recent=4, spread=2)  # 12, 25, 26, 27, 28, 29
    assert probes.tolist() == [6] * 13 + [5] * 13 + [4, 3, 2, 1]
    logits = inputs.query @ inputs.key.repeat_interleave(2, dim=0).transpose(1, 2) * inputs.scale
    weights = logits.masked_fill(torch.ones(30, 30).triu(1).bool(), -torch.inf).softmax(dim=-1)
    torch.testing.assert_close(mass, weights[:, [12, 25, 26, 27, 28, 29]].sum(dim=(0, 1)))
    assert mass.sum().item() == pytest.approx(4 * 6, rel=1e-5)
    mass, probes = probe_mass(inputs, recent=99, spread=99)
    torch.testing.assert_close(mass, weights.sum(dim=(0, 1)))
    assert probes.tolist() == list(range(30, 0, -1))


def test_finds_the_tokens_that_count_for_all_heads() -> None:
    inputs = prefill_inputs(64, heads=2, kv_heads=2, dim=8)
    query, key = torch.zeros(2, 64, 8), torch.zeros(2, 64, 8)
    query[..., 0], key[0, 5, 0], key[1, 9, 0] = 100.0, 1.0, 1.0
    pattern = ZipVL(tau=0.9, recent=4, spread=4, block=8).pattern(replace(inputs, query=query, key=key))
    assert pattern.columns is not None and pattern.columns.tolist() == [[[5, 9]]]
    seen = visible_pairs(pattern, 64, 64)[0, 0]
    assert seen[20].nonzero().flatten().tolist() == [5, 9, 16, 17, 18, 19, 20]


def test_map_is_causal_and_sums_to_one() -> None:
    inputs = prefill_inputs(45, dim=8)
    method = ZipVL(tau=0.3, recent=8, spread=8, block=4, backend="gather")
    weights = attention_map(method, inputs)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, 45))
    assert not weights.triu(1).any() and (weights.diagonal(dim1=1, dim2=2) > 0).all()
    shares = [ZipVL(tau=tau, block=4, backend="gather").attend(inputs).density for tau in (0.2, 0.5, 0.8)]
    assert shares == sorted(set(shares))


@pytest.mark.parametrize("length", [1, 3, 4, 41])
def test_any_length_and_equal_keys(length: int) -> None:
    inputs = prefill_inputs(length, dim=8)
    query, key = inputs.query.half() * 300, torch.ones_like(inputs.key).half() * 300
    inputs = replace(inputs, query=query, key=key, value=inputs.value.half())
    method = ZipVL(tau=0.5, recent=2, spread=0, block=4, backend="gather")
    columns = method.pattern(inputs).columns
    assert columns is not None and columns.shape[2] == int(-(-length // 2)) and (columns >= 0).all()
    assert method.attend(inputs).density <= 1
    assert method.is_dense(4, 0, 1) and not method.is_dense(5, 0, 1)
    assert ZipVL(tau=1, block=4).attend(inputs).output is None
