"""Keys outside the window taken as stored ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spatiotoken.attention import PrefillInputs
from spatiotoken.attention.deltallm import DeltaLLM, compacted, stored_keys
from tests.attention import attention_map, prefill_inputs

SMALL = DeltaLLM(threshold=0.5, window=5, block_q=8, block_k=2, backend="gather")


def slow_keys(length: int, *, noise: float = 0.1, held: int = 5) -> PrefillInputs:
    """As `prefill_inputs`, with keys that change a little at each token and wholly at every ``held``-th."""
    inputs = prefill_inputs(length)
    base = inputs.key[:, ::held].repeat_interleave(held, dim=1)[:, :length]
    return replace(inputs, key=base + noise * inputs.key)


def stored_places(key: Tensor, threshold: float, segment: int) -> list[int]:
    """Of each key ``[L, d]`` the one that it counts as, one after the other."""
    places: list[int] = []
    for place, state in enumerate(key):
        last = key[places[-1]] if places else state
        changed = (state - last).norm() > threshold * last.norm()
        places.append(place if changed or place % segment == 0 else places[-1])
    return places


def replaced_attention(inputs: PrefillInputs, method: DeltaLLM) -> Tensor:
    """Attention weights ``[heads, L, L]`` with the keys replaced in a full map of logits."""
    length, groups = inputs.length, inputs.groups
    query, key = inputs.query.double(), inputs.key.double().repeat_interleave(groups, dim=0)
    stored = torch.stack(
        [head[stored_places(head, method.threshold, method.block_q)] for head in inputs.key.double()]
    ).repeat_interleave(groups, dim=0)
    position = torch.arange(length)
    first = position // method.block_q * method.block_q
    far = position // method.block_q * method.block_q + method.block_q <= first[:, None] - method.window + 1
    logits = torch.where(far, query @ stored.transpose(1, 2), query @ key.transpose(1, 2)) * inputs.scale
    return logits.masked_fill(position > position[:, None], -torch.inf).softmax(dim=-1)


def test_stored_keys_are_compared_to_the_last_stored_one() -> None:
    key = torch.tensor([1.0, 1.3, 1.4, 1.6, 2.0, 2.5, 2.2, 1.0])[None, None, :, None]
    # Not to the one before: 1.6 is far from the stored 1 though near 1.4.
    assert stored_keys(key, 0.5)[0, 0].tolist() == [True, False, False, True, False, True, False, True]
    assert stored_keys(key, 0.0).all()
    assert stored_keys(torch.ones(1, 1, 4, 2), 0.0)[0, 0].tolist() == [True, False, False, False]


def test_compacted_keys_stand_for_their_groups() -> None:
    key, value = torch.arange(5.0)[None, None, :, None], torch.tensor([1.0, 3.0, 5.0, 2.0, 4.0])[None, None, :, None]
    stored = torch.tensor([True, False, True, False, False])[None, None]
    keys, values, size = compacted(key, value, stored)
    assert keys[0, 0, :2, 0].tolist() == [0, 2] and size[0, 0].tolist() == [2, 3, 0, 0, 0]
    torch.testing.assert_close(values[0, 0, :, 0], torch.tensor([2.0, 11 / 3, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize("window", [1, 5, 9, 17])
@pytest.mark.parametrize("length", [33, 45, 48])
def test_is_attention_with_keys_replaced(length: int, window: int) -> None:
    inputs, method = slow_keys(length), SMALL.model_copy(update={"window": window})
    expected = replaced_attention(inputs, method) @ inputs.value.double().repeat_interleave(2, dim=0)
    attended = method.attend(inputs)
    assert attended.output is not None and attended.output.shape == inputs.query.shape
    torch.testing.assert_close(attended.output.double(), expected, atol=1e-5, rtol=1e-5)


def test_weights_are_shared_within_groups() -> None:
    inputs = slow_keys(45)
    weights = attention_map(SMALL, inputs)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, 45))
    assert torch.equal(weights, weights.tril()) and weights.diagonal(dim1=1, dim2=2).min() > 0
    torch.testing.assert_close(weights.double(), replaced_attention(inputs, SMALL), atol=1e-5, rtol=1e-4)


def test_repeated_keys_lose_nothing_and_save() -> None:
    inputs = slow_keys(96, noise=0.0, held=8)
    attended = SMALL.model_copy(update={"threshold": 0.0, "window": 1}).attend(inputs)
    assert attended.output is not None and attended.density < 0.45
    dense = torch.nn.functional.scaled_dot_product_attention(
        inputs.query, inputs.key, inputs.value, is_causal=True, scale=inputs.scale, enable_gqa=True
    )
    torch.testing.assert_close(attended.output, dense, atol=1e-5, rtol=1e-5)


def test_what_changes_nothing_is_dense() -> None:
    inputs = prefill_inputs(45)
    # Every key differs from the one before.
    assert SMALL.model_copy(update={"threshold": 0.0}).attend(inputs).output is None
    assert SMALL.is_dense(16, 0, 1) and not SMALL.is_dense(17, 0, 1)
    for length in (1, 7, 8, 16):
        assert SMALL.attend(prefill_inputs(length)).output is None
    assert SMALL.model_copy(update={"window": 45}).attend(inputs).output is None


def test_equal_keys_and_the_first_segment_only() -> None:
    inputs = prefill_inputs(17)
    inputs = replace(inputs, key=torch.ones_like(inputs.key))
    attended = SMALL.model_copy(update={"window": 1}).attend(inputs)
    assert attended.output is not None
    mean = inputs.value.cumsum(dim=1) / torch.arange(1, 18)[:, None]
    torch.testing.assert_close(attended.output, mean.repeat_interleave(2, dim=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    inputs = slow_keys(45)
    halves = {name: getattr(inputs, name).to(dtype) for name in ("query", "key", "value")}
    half = replace(inputs, **halves)
    full = replace(inputs, **{name: states.float() for name, states in halves.items()})
    expected, found = SMALL.attend(full).output, SMALL.attend(half).output
    assert expected is not None and found is not None and found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=4e-2, rtol=4e-2)


def test_blocks_must_fit() -> None:
    with pytest.raises(ValueError, match="block_q must be a multiple of block_k, got 10 and 4"):
        DeltaLLM(block_q=10, block_k=4)
