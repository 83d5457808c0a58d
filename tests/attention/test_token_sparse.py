"""Attention among each head's own tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from spatiotoken.attention import PrefillInputs
from spatiotoken.attention.blocks import per_head
from spatiotoken.attention.token_sparse import TokenSparse, dropped_count, kept_tokens, relevance
from tests.attention import attention_map, prefill_inputs
from tests.vectors import cases


def test_vectors_of_the_authors() -> None:
    for hyper, tensors in cases("TokenSparseAttention"):
        query, key = (tensors[f"in.{name}"].float()[0] for name in "qk")
        inputs = PrefillInputs(query, key, key, query.shape[-1] ** -0.5)
        score = relevance(inputs, hyper["window_size"], hyper["kernel_size"])
        expected = tensors["out.indices"].long()
        keep = score.shape[1] - int(dropped_count(score, hyper["coverage"]))
        assert keep == expected.shape[1] - hyper["window_size"] < score.shape[1]
        assert torch.equal(kept_tokens(score, keep, hyper["window_size"]), expected)
        method = TokenSparse(
            coverage=hyper["coverage"],
            min_tokens=hyper["min_tokens"],
            window=hyper["window_size"],
            kernel=hyper["kernel_size"],
        )
        (part,) = method.parts(inputs)
        assert part.rows is not None and torch.equal(part.rows, expected)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_weights(kv_heads: int) -> None:
    inputs = prefill_inputs(50, kv_heads=kv_heads, dim=8)
    method = TokenSparse(coverage=0.3, min_tokens=4, window=6, kernel=3, backend="reference")
    score = relevance(inputs, 6, 3)
    keep = 44 - int(dropped_count(score, 0.3))
    kept = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, kept_tokens(score, keep, 6), True)
    assert 4 < keep < 40 and kept[:, -6:].all() and not torch.equal(kept[0], kept[1])

    position = torch.arange(50)
    logits = inputs.query @ per_head(inputs.key, inputs.groups).transpose(1, 2) * inputs.scale
    seen = kept[:, None] & (position <= position[:, None])
    expected = logits.masked_fill(~seen, -torch.inf).softmax(dim=-1).where(kept[..., None], 0)
    found = attention_map(method, inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(dim=-1), kept.float())
    attended = method.attend(inputs)
    rows = keep + 6
    assert attended.density == pytest.approx(rows * (rows + 1) / (50 * 51))


def test_each_head_keeps_its_own() -> None:
    """Two heads that look at different tokens; how many stay is said by both together."""
    query, key = torch.zeros(2, 40, 4), torch.zeros(2, 40, 4)
    query[..., 0] = 1.0
    key[0, [3, 20], 0] = 20.0
    key[1, [9], 0] = 20.0
    inputs = PrefillInputs(query, key, torch.ones(2, 40, 4), 1.0)
    method = TokenSparse(coverage=0.01, min_tokens=2, window=2, kernel=1, backend="reference")
    score = relevance(inputs, 2, 1)
    assert int(dropped_count(score, 0.01)) == 36  # the 35 that nobody looks at, and one more
    (part,) = method.parts(inputs)
    assert part.rows is not None
    assert part.rows.tolist() == [[3, 20, 38, 39], [0, 9, 38, 39]]
    output = method.attend(inputs).output
    assert output is not None
    assert output[0, :, 0].nonzero()[:, 0].tolist() == [3, 20, 38, 39]


def test_counts() -> None:
    score = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    assert [int(dropped_count(score, share)) for share in (0.05, 0.2, 0.5, 1.0)] == [0, 2, 3, 4]
    assert kept_tokens(torch.ones(1, 5), 3, 2).tolist() == [[0, 1, 2, 5, 6]]


def test_dense() -> None:
    small = {"coverage": 0.5, "min_tokens": 4, "window": 4, "kernel": 3}
    method = TokenSparse.model_validate(small)
    assert method.is_dense(8, 9, 10) and not method.is_dense(9, 9, 10)
    assert [method.is_dense(40, layer, 5) for layer in range(5)] == [True, True, False, False, False]
    assert TokenSparse(coverage=0).is_dense(10**6, 9, 10)
    assert method.attend(prefill_inputs(1)).output is None
    # A least token that reaches the coverage alone drops nothing.
    assert method.model_copy(update={"coverage": 1e-6}).attend(prefill_inputs(40)).density == 1.0
    with pytest.raises(ValidationError, match="odd"):
        TokenSparse(kernel=4)

    same = replace(prefill_inputs(41), key=torch.ones(2, 41, 16))
    attended = method.attend(same)
    assert attended.output is not None and attended.density < 0.75
    half = replace(same, query=same.query.half() * 200, key=same.key.half() * 200, value=same.value.half())
    output = method.attend(half).output
    assert output is not None and output.isfinite().all() and output.dtype == torch.float16
    everything = method.model_copy(update={"coverage": 1.0, "min_tokens": 0}).attend(prefill_inputs(40)).output
    assert everything is not None and not everything[:, :-4].any() and everything[:, -4:].any()
