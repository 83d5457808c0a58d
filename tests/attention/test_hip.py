"""The hierarchical search for key blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spatiotoken.attention import hip
from spatiotoken.attention.hip import HiP, search
from tests.attention import attention_map, prefill_inputs


def _slope(length: int, peak: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of one head whose logits fall with the distance from ``peak``."""
    query, key = torch.zeros(1, length, 8), torch.zeros(1, length, 8)
    query[..., 0] = 1.0
    key[0, :, 0] = -(torch.arange(length) - peak).abs().float()
    return query, key


@pytest.mark.parametrize("peak", [0, 37, 102, 127])
def test_search_climbs_a_slope(peak: int) -> None:
    query, key = _slope(128, peak)
    found = search(query[None, :, :4], key, 0, torch.tensor([32]), rounds=4, keep=1, block_k=4)
    assert found.tolist() == [[[peak // 4]]]


def test_search_keeps_the_better_half() -> None:
    key = torch.zeros(1, 8, 8)
    key[0, :, 0] = torch.tensor([0.0, 5, 1, 0, 9, 3, 2, 4])
    query = torch.zeros(1, 1, 2, 8)
    query[0, 0, 0, 0] = 1.0
    # Chunks of two are judged by their second key: 5, 0, 3, 4. Of the halves 0, 5 and 2, 4 the larger are kept.
    found = search(query, key, 0, torch.tensor([8]), rounds=1, keep=2, block_k=1)
    assert found.tolist() == [[[1, 7]]]
    # Fewer blocks than are kept: all of them, once.
    found = search(query, key, 3, torch.tensor([5]), rounds=0, keep=3, block_k=1)
    assert sorted(found.flatten().tolist()) == [-1, 3, 4]
    # All alike: the earliest.
    found = search(query * 0, key, 0, torch.tensor([8]), rounds=1, keep=2, block_k=1)
    assert found.tolist() == [[[0, 1]]]


@pytest.mark.parametrize("block_q, block_k", [(4, 4), (8, 2), (2, 8), (5, 3)])
def test_each_query_block_has_sink_window_and_as_many_blocks_as_asked(block_q: int, block_k: int) -> None:
    inputs = prefill_inputs(90, dim=8)
    method = HiP(k=2 * block_k, sink=3, window=9, block_q=block_q, block_k=block_k)
    blocks = method.pattern(inputs).blocks[0]
    sink = -(-3 // block_k)
    for number in range(-(-90 // block_q)):
        first = max(0, number * block_q - 9 + 1) // block_k
        last = min((number + 1) * block_q, 90) - 1
        seen = blocks[:, number]
        assert seen[:, first : last // block_k + 1].all() and not seen[:, last // block_k + 1 :].any()
        assert seen[:, : min(sink, last // block_k + 1)].all()
        assert (seen[:, sink:first].sum(dim=1) == min(2, max(0, first - sink))).all()


def test_finds_a_peak_for_each_head(monkeypatch: pytest.MonkeyPatch) -> None:
    (query, left), (_, right) = _slope(128, 22), _slope(128, 75)
    inputs = prefill_inputs(128, heads=4, kv_heads=2, dim=8)
    inputs = replace(inputs, query=query.expand(4, -1, -1), key=torch.cat([left, right]))
    method = HiP(k=4, sink=4, window=4, block_q=4, block_k=4)
    blocks = method.pattern(inputs).blocks[0]
    for head, peak in ((0, 5), (1, 5), (2, 18), (3, 18)):
        assert blocks[head, 31].nonzero().flatten().tolist() == [0, peak, 30, 31]
    monkeypatch.setattr(hip, "MAX_STATES", 1)
    assert torch.equal(method.pattern(inputs).blocks[0], blocks)


def test_map_is_causal_and_sums_to_one() -> None:
    inputs = prefill_inputs(45, dim=8)
    method = HiP(k=4, sink=4, window=1, block_q=4, block_k=4, backend="gather")
    weights = attention_map(method, inputs)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, 45))
    assert not weights.triu(1).any() and (weights.diagonal(dim1=1, dim2=2) > 0).all()


@pytest.mark.parametrize("length", [1, 3, 4, 41])
def test_any_length_and_equal_keys(length: int) -> None:
    inputs = prefill_inputs(length, dim=8)
    query, key = inputs.query.half() * 300, torch.ones_like(inputs.key).half() * 300
    inputs = replace(inputs, query=query, key=key, value=inputs.value.half())
    method = HiP(k=4, sink=0, window=1, block_q=4, block_k=4)
    blocks = method.pattern(inputs).blocks[0]
    assert torch.equal(blocks, blocks[:1].expand_as(blocks)) and blocks.diagonal(dim1=1, dim2=2).all()
    for dense in (HiP(window=41, block_q=4, block_k=4), HiP(k=41, sink=0, window=1, block_q=4, block_k=4)):
        assert dense.attend(inputs).output is None
    everything = HiP(k=40, sink=0, window=1, block_q=4, block_k=4)
    assert everything.is_dense(length, 0, 1) == (length <= 40) and everything.attend(inputs).density == 1
