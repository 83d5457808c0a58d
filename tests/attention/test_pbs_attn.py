"""Keys reordered within segments, and the blocks of them that are seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from spatiotoken.attention import PrefillInputs
from spatiotoken.attention.blocks import per_head
from spatiotoken.attention.pbs_attn import PBSAttn, earlier_blocks, key_order
from tests.attention import attention_map, prefill_inputs
from tests.vectors import cases


def permuted(key: Tensor, order: Tensor) -> Tensor:
    return key.gather(1, order[..., None].expand(-1, -1, key.shape[-1]))


def expected_map(method: PBSAttn, inputs: PrefillInputs) -> Tensor:
    """``[heads, L, L]`` weights, from a mask over single tokens."""
    length, block, segment = inputs.length, method.block, method.segment
    whole, front = length // segment * segment, (length - 1) // segment * segment
    order = key_order(inputs.query[:, -block:], inputs.key[:, :whole], inputs.scale, segment)[:, :front]
    chosen = earlier_blocks(
        inputs.query, permuted(inputs.key, order), inputs.scale, block, segment, method.threshold
    ).repeat_interleave(block, dim=1)[:, :length]
    position = torch.arange(length)
    seen = (position // segment == position[:, None] // segment) & (position <= position[:, None])
    seen = seen.repeat(len(inputs.query), 1, 1)
    for head, blocks in enumerate(chosen):
        own = order[head // inputs.groups]
        for new, old in enumerate(own.tolist()):
            with_first = 0 in own[new // block * block : (new // block + 1) * block]
            seen[head, :, old] |= blocks[:, new // block] | (with_first & (position >= segment))
    logits = inputs.query @ per_head(inputs.key, inputs.groups).transpose(1, 2) * inputs.scale
    return logits.masked_fill(~seen, -torch.inf).softmax(dim=-1)


def test_vectors_of_the_authors() -> None:
    for hyper, tensors in cases("PBS-Attn"):
        query, key, value = (tensors[f"in.{name}"].float()[0] for name in "qkv")
        block, segment, threshold = hyper["block_size"], hyper["segment_size"], hyper["threshold"]
        inputs = PrefillInputs(query, key, value, query.shape[-1] ** -0.5)
        whole = inputs.length // segment * segment
        order = key_order(query[:, -block:], key[:, :whole], inputs.scale, segment)
        assert torch.equal(order, tensors["out.key_perm"][:, :whole].long())

        mask = tensors["out.block_mask"]
        front = (inputs.length - 1) // segment * segment // block
        number = torch.arange(mask.shape[1]) * block // segment
        reordered = permuted(key, order[:, : front * block])
        chosen = earlier_blocks(query, reordered, inputs.scale, block, segment, threshold)
        earlier = number[:front] < number[:, None]
        assert torch.equal(chosen, mask[:, :, :front] & earlier) and chosen.any()

        method = PBSAttn(block=block, segment=segment, threshold=threshold, backend="gather")
        attended = method.attend(inputs)
        assert attended.output is not None and attended.density < 1
        torch.testing.assert_close(attended.output, tensors["out.output"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [9, 16, 45, 64])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_weights(length: int, kv_heads: int) -> None:
    inputs = prefill_inputs(length, kv_heads=kv_heads, dim=8)
    inputs = replace(inputs, query=inputs.query * 3)
    method = PBSAttn(block=4, segment=8, threshold=0.3, backend="reference")
    if length == 9:  # too short to leave anything out of segments of 8
        method = method.model_copy(update={"segment": 4})
    found = attention_map(method, inputs)
    torch.testing.assert_close(found, expected_map(method, inputs))
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(4, length))
    assert not found.triu(1).any() and (found == 0).tril().any()


def test_gathers_scattered_keys() -> None:
    """One heavy key in every block: without the order all blocks would be wanted, with it one of each segment is."""
    block, segment, length = 4, 16, 64
    key = torch.zeros(1, length, 4)
    heavy = torch.arange(2, length, block)
    key[:, heavy, 0] = 30.0
    query = torch.zeros(1, length, 4)
    query[..., 0] = 1.0
    inputs = PrefillInputs(query, key, key, 1.0)
    order = key_order(query[:, -block:], key, 1.0, segment)
    assert order.view(-1, segment)[:, :block].flatten().tolist() == heavy.tolist()
    assert order[0, block : block + 3].tolist() == [0, 1, 3]  # ties keep their order

    method = PBSAttn(block=block, segment=segment, threshold=0.9, backend="reference")
    chosen = earlier_blocks(query, permuted(key, order)[:, :48], 1.0, block, segment, 0.9)
    assert chosen[0, 12].nonzero()[:, 0].tolist() == [0, 4, 8]
    seen = (attention_map(method, inputs)[0, 50] > 1e-20).nonzero()[:, 0].tolist()
    assert set(heavy[:13].tolist()) <= set(seen)
    # Its own segment, a block of each earlier one, and the block with the first token.
    attended = method.attend(inputs)
    rows = sum(min(i // segment, 3) * block + (block if i >= segment else 0) + i % segment + 1 for i in range(length))
    assert attended.density == pytest.approx(rows / (length * (length + 1) / 2))


def test_edges() -> None:
    assert PBSAttn(threshold=1).attend(prefill_inputs(600)).output is None
    assert PBSAttn().attend(prefill_inputs(256)).output is None
    assert PBSAttn(block=4, segment=8).attend(prefill_inputs(1)).output is None
    with pytest.raises(ValidationError, match="multiple of block"):
        PBSAttn(segment=200)

    # All keys alike: nothing moves, and blocks are taken from the first.
    same = replace(prefill_inputs(40), key=torch.ones(2, 40, 16))
    order = key_order(same.query[:, -4:], same.key, same.scale, 8)
    assert torch.equal(order, torch.arange(40).expand(2, -1))
    chosen = earlier_blocks(same.query, same.key[:, :32], same.scale, 4, 8, 0.5)
    assert chosen[0, 9].tolist() == [True] * 4 + [False] * 4

    half = prefill_inputs(40)
    half = replace(half, query=half.query.half() * 200, key=half.key.half() * 200, value=half.value.half())
    attended = PBSAttn(block=4, segment=8, threshold=0.2, backend="reference").attend(half)
    assert attended.output is not None and attended.output.isfinite().all() and attended.density < 0.75
