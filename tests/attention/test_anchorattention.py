"""Stripes near the anchor."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from spatiotoken.attention import PrefillInputs
from spatiotoken.attention.anchorattention import AnchorAttention, anchors, stripes
from tests.attention import attention_map, prefill_inputs


def _logits(inputs: PrefillInputs) -> torch.Tensor:
    key = inputs.key.repeat_interleave(inputs.groups, dim=0)
    logits = inputs.query @ key.transpose(1, 2) * inputs.scale
    return logits.masked_fill(torch.ones_like(logits[0], dtype=torch.bool).triu(1), -torch.inf)


@pytest.mark.parametrize("start, step", [(4, 4), (8, 4), (3, 1), (2, 2)])
def test_equals_the_rule_written_out(start: int, step: int) -> None:
    inputs = prefill_inputs(60, heads=4, kv_heads=2, dim=8)
    logits = _logits(inputs)
    found = anchors(inputs.query, inputs.key, inputs.scale, start, step, 4)
    selected = stripes(inputs.query, inputs.key, inputs.scale, 1.5, start, step, 4)
    key = inputs.key.repeat_interleave(2, dim=0)
    expected = torch.zeros(4, start * 4, dtype=torch.bool)
    for number in range(step):
        rows = slice((start + number) * 4, (start + number + 1) * 4)
        near = torch.cat([logits[:, rows, :4], logits[:, rows, (start - 1) * 4 :]], dim=-1)
        anchor = near.amax(dim=-1).mean(dim=-1)
        torch.testing.assert_close(found[:, number], anchor)
        mean = torch.einsum("hd,hkd->hk", inputs.query[:, rows].mean(dim=1), key[:, : start * 4]) * inputs.scale
        expected |= mean / math.log(2) + 1.5 >= anchor[:, None] / math.log(2)
    expected[:, :4] = expected[:, (start - 1) * 4 :] = False
    assert torch.equal(selected, expected) and (start < 4 or 0 < expected.sum() < expected.numel())


def test_finds_a_stripe_that_reaches_the_sink_and_leaves_out_the_rest() -> None:
    inputs = prefill_inputs(64, heads=2, kv_heads=2, dim=8)
    query, key = torch.zeros(2, 64, 8), torch.zeros(2, 64, 8)
    query[..., 0], key[:, 0, 0], key[0, 6, 0], key[1, 7, 0] = 10.0, 10.0, 9.0, 7.0
    inputs = replace(inputs, query=query, key=key, scale=1.0)
    # Logits: 100 at the sink, 90 and 70 at the stripes, 0 elsewhere.
    assert stripes(query, key, 1.0, 14.0, 8, 4, 4).sum() == 0
    assert stripes(query, key, 1.0, 15.0, 8, 4, 4).nonzero().tolist() == [[0, 6]]
    parts = AnchorAttention(theta=15, step=4, block=4).parts(inputs)
    assert [part.rows.tolist() for part in parts if part.rows is not None] == [
        list(range(16)),
        list(range(16, 32)),
        list(range(32, 48)),
        list(range(48, 64)),
    ]
    for part in parts[1:]:
        assert part.pattern.columns is not None and part.pattern.columns.tolist() == [[[6], [-1]]]


@pytest.mark.parametrize("length", [40, 48, 51])
def test_map_has_just_what_a_group_sees(length: int) -> None:
    inputs = prefill_inputs(length, dim=8)
    method = AnchorAttention(theta=1, step=3, block=4, backend="gather")
    weights = attention_map(method, inputs)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, length))
    seen = torch.ones(4, length, length, dtype=torch.bool)
    for start in range(3, length // 12 * 3, 3):
        rows = slice(start * 4, start * 4 + 12)
        seen[:, rows, 4 : (start - 1) * 4] = False
        picked = stripes(inputs.query, inputs.key, inputs.scale, 1, start, 3, 4)
        seen[:, rows, : start * 4] |= picked[:, None]
    assert torch.equal(weights > 0, seen.tril())


def test_groups_of_one_block() -> None:
    inputs = prefill_inputs(30, dim=8)
    weights = attention_map(AnchorAttention(theta=0, step=1, block=4, backend="gather"), inputs)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, 30))
    assert not weights.triu(1).any()


@pytest.mark.parametrize("length", [1, 3, 15, 16, 41])
def test_any_length_and_equal_keys(length: int) -> None:
    inputs = prefill_inputs(length, dim=8)
    query, key = inputs.query.half() * 300, torch.ones_like(inputs.key).half() * 300
    inputs = replace(inputs, query=query, key=key, value=inputs.value.half())
    method = AnchorAttention(theta=1e6, step=2, block=4, backend="gather")
    assert method.attend(inputs).output is None  # everything is within reach
    assert method.is_dense(15, 0, 1) and not method.is_dense(16, 0, 1)
    parts = AnchorAttention(theta=0, step=2, block=4).parts(inputs)
    assert torch.cat([part.rows for part in parts if part.rows is not None]).sort().values.tolist() == [*range(length)]
