"""Antidiagonal block scores and what is kept by them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode

from spatiotoken.attention import PrefillInputs, xattention
from spatiotoken.attention.xattention import XAttention, antidiagonal_mass, covering_blocks, first_chunk
from tests.attention import attention_map, prefill_inputs
from tests.vectors import cases


def test_blocks_of_the_authors() -> None:
    for hyper, tensors in cases("XAttention"):
        query, key = (tensors[f"in.{name}"].float()[0] for name in ("q", "k"))
        scale, block = query.shape[-1] ** -0.5, hyper["block_size"]
        mass = antidiagonal_mass(query, key, scale, hyper["stride"], block)
        torch.testing.assert_close(mass, tensors["out.attn_sums"][0], atol=2e-6, rtol=1e-6)
        expected, loose = tensors["out.mask"][0], hyper["chunk_size"] // block
        assert covering_blocks(mass, hyper["threshold"], loose).equal(expected)

        method = XAttention(threshold=hyper["threshold"], stride=hyper["stride"], block=block)
        inputs = PrefillInputs(query, key, key, scale)
        assert method.pattern(inputs).blocks[0][:, loose:].equal(expected[:, loose:])
        if len(expected[0]) <= loose:
            reference = method.model_copy(update={"reference": True}).pattern(inputs).blocks[0]
            assert reference.equal(expected)
            assert bool((method.pattern(inputs).blocks[0] <= reference).all())


def test_chunks_of_the_authors() -> None:
    assert [first_chunk(length) for length in (1, 3000, 16384, 16385, 10**6)] == [2048, 4096, 16384, 8192, 2048]


@pytest.mark.parametrize(("length", "stride", "block"), [(32, 4, 8), (30, 4, 8), (33, 2, 8), (5, 4, 8), (7, 1, 2)])
def test_mass_equals_a_map_written_out(length: int, stride: int, block: int) -> None:
    inputs = prefill_inputs(length, heads=4, kv_heads=2, dim=8)
    groups, count = -(-length // stride), -(-length // block)
    logits = inputs.query.double() @ inputs.key.repeat_interleave(2, dim=0).double().transpose(1, 2) * inputs.scale
    expected = torch.zeros(4, count, count, dtype=torch.float64)
    for head in range(4):
        for i in range(groups):
            row = torch.zeros(i + 1, dtype=torch.float64)
            for j in range(i + 1):
                for offset in range(stride):
                    q, k = i * stride + stride - 1 - offset, j * stride + offset
                    if max(q, k) < length:
                        row[j] += logits[head, q, k] / stride
            for j, weight in enumerate(row.softmax(dim=0)):
                expected[head, i * stride // block, j * stride // block] += weight
    mass = antidiagonal_mass(inputs.query, inputs.key, inputs.scale, stride, block)
    torch.testing.assert_close(mass.double(), expected, atol=1e-5, rtol=1e-5)
    repeated = inputs.key.repeat_interleave(2, dim=0)
    torch.testing.assert_close(antidiagonal_mass(inputs.query, repeated, inputs.scale, stride, block), mass)


def test_chunks_change_nothing_and_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = prefill_inputs(1000, heads=2, kv_heads=1, dim=8)
    whole = antidiagonal_mass(inputs.query, inputs.key, inputs.scale, 4, 16)
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    monkeypatch.setattr(xattention, "MAX_WEIGHTS", 20_000)
    with Watch():
        chunked = antidiagonal_mass(inputs.query, inputs.key, inputs.scale, 4, 16)
    assert max(sizes) <= 20_000
    torch.testing.assert_close(chunked, whole)


def test_finds_a_planted_block_of_keys() -> None:
    query, key = torch.zeros(1, 40, 8), torch.zeros(1, 40, 8)
    query[..., 0] = 40.0
    key[:, 8:12, 0] = 1.0
    blocks = XAttention(stride=2, block=4).pattern(PrefillInputs(query, key, key, 1.0)).blocks[0, 0]
    for row in range(3, 10):
        assert blocks[row].nonzero().flatten().tolist() == sorted({0, 2, row})


def test_finds_a_planted_slash() -> None:
    """Every query looks at the key 8 before it: two blocks back."""
    angle = torch.arange(64)[None, :, None] * torch.tensor([1.0, 0.37])
    key = torch.cat([angle.cos(), angle.sin()], dim=-1)
    inputs = PrefillInputs(30 * key.roll(8, dims=1), key, key, 1.0)
    blocks = XAttention(stride=2, block=4, threshold=0.5).pattern(inputs).blocks[0, 0]
    number = torch.arange(2, 16)
    assert bool(blocks[number, number - 2].all())
    assert float(blocks.sum()) < 0.5 * 136


def test_rows_hold_the_threshold_and_no_more() -> None:
    mass = torch.tensor([[4.0, 0, 0, 0], [1, 3, 0, 0], [1, 2, 1, 0], [0.5, 1, 1.5, 1]])[None]
    assert covering_blocks(mass, 0.6)[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    # Rows 0 to 3 loose: block 0 is not counted, and one block more than is needed.
    assert covering_blocks(mass, 0.3, 4)[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    ties = torch.ones(1, 5, 5).tril()
    assert covering_blocks(ties, 0.6)[0, 4].int().tolist() == [1, 1, 0, 0, 1]


@pytest.mark.parametrize("length", [1, 3, 9, 41, 64])
@pytest.mark.parametrize("reference", [False, True])
def test_weights_are_causal_and_whole(length: int, reference: bool) -> None:
    inputs = prefill_inputs(length, heads=4, kv_heads=2, dim=8)
    method = XAttention(threshold=0.3, stride=2, block=4, reference=reference, backend="gather")
    if length < 9:
        assert method.attend(inputs).output is None
        return
    weights = attention_map(method, inputs)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, length))
    assert not bool(weights.triu(1).any())
    assert method.attend(inputs).density < 0.9 or length == 9


def test_equal_keys_and_large_half_precision() -> None:
    inputs = prefill_inputs(40, dim=8)
    same = replace(inputs, key=torch.ones_like(inputs.key))
    last = XAttention(threshold=0.45, stride=2, block=4).pattern(same).blocks[0, :, -1]
    assert last.int().tolist() == [[1, 1, 1, 1, 0, 0, 0, 0, 0, 1]] * 4
    large = replace(inputs, query=(inputs.query * 3000).half(), key=(inputs.key * 3000).half())
    assert bool(antidiagonal_mass(large.query, large.key, large.scale, 2, 4).isfinite().all())


def test_settings() -> None:
    assert XAttention(threshold=1.0).is_dense(10**6, 0, 1)
    with pytest.raises(ValidationError, match="multiple of stride"):
        XAttention(stride=16, block=24)
    with pytest.raises(ValueError, match="multiple of the stride"):
        antidiagonal_mass(torch.zeros(1, 8, 4), torch.zeros(1, 8, 4), 1.0, 3, 4)
