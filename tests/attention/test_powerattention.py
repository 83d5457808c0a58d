"""Blocks at distances that are powers of two."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spatiotoken.attention.powerattention import PowerAttention, power_blocks
from tests.attention import attention_map, prefill_inputs

CPU = torch.device("cpu")


def test_row_written_out() -> None:
    assert power_blocks(20, 1, 0, CPU)[19].nonzero().flatten().tolist() == [3, 11, 15, 17, 18, 19]
    assert power_blocks(20, 4, 1, CPU)[19].nonzero().flatten().tolist() == [0, 3, 11, 15, 16, 17, 18, 19]
    # The paper's size: 32768 tokens in blocks of 256, of which the last sees 10.
    assert power_blocks(128, 5, 1, CPU)[127].sum() == 10


def test_reach_doubles_per_layer() -> None:
    blocks = power_blocks(64, 1, 0, CPU).float()
    reached = torch.eye(64)
    for _ in range(6):
        reached = (blocks @ reached).clamp(max=1)
    assert torch.equal(reached, torch.ones(64, 64).tril())


def test_map_has_just_these_blocks() -> None:
    inputs = prefill_inputs(45, dim=8)
    weights = attention_map(PowerAttention(window=1, sink=1, block=4, backend="gather"), inputs)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, 45))
    seen = power_blocks(12, 1, 1, CPU).repeat_interleave(4, 0).repeat_interleave(4, 1)[:45, :45].tril()
    assert torch.equal(weights > 0, seen.expand(4, -1, -1))


@pytest.mark.parametrize("window, sink", [(1, 0), (2, 1), (5, 0), (5, 2)])
def test_known_to_be_dense_only_where_it_is(window: int, sink: int) -> None:
    method = PowerAttention(window=window, sink=sink, block=4)
    for length in range(1, 60):
        whole = bool(power_blocks(-(-length // 4), window, sink, CPU).sum() == sum(range(1, -(-length // 4) + 1)))
        assert whole or not method.is_dense(length, 0, 1)
    assert method.is_dense(12, 0, 1) and not method.is_dense(1000, 0, 1)


def test_all_is_computed_with_a_window_of_everything() -> None:
    for length in (1, 3, 41):
        inputs = prefill_inputs(length, dim=8)
        assert PowerAttention(window=11, block=4).attend(inputs).output is None
        same = replace(inputs, key=torch.ones_like(inputs.key))
        attended = PowerAttention(window=1, sink=0, block=4, backend="gather").attend(same)
        assert (attended.output is None) == (length < 4)
