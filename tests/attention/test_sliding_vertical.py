"""Sinks, a window and the columns of most mass."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spatiotoken.attention import PrefillInputs
from spatiotoken.attention.sliding_vertical import SlidingVertical, heaviest_columns
from spatiotoken.attention.weights import last_rows_weights
from tests.attention import prefill_inputs
from tests.vectors import cases


@pytest.mark.parametrize("block", [1, 7, 64])
def test_equals_a_mask_written_out(block: int) -> None:
    inputs = prefill_inputs(40, heads=4, kv_heads=2, dim=8)
    method = SlidingVertical(sink=2, window=4, columns=3, last_queries=6, block=block, backend="gather")
    assert method.is_dense(4, 0, 1) and method.is_dense(5, 0, 1) and not method.is_dense(40, 0, 1)

    position = torch.arange(40)
    causal = position <= position[:, None]
    logits = inputs.query.double() @ inputs.key.repeat_interleave(2, dim=0).double().transpose(1, 2) * inputs.scale
    mass = logits.masked_fill(~causal, -torch.inf).softmax(dim=-1)[:, -6:].sum(dim=1)
    mass[:, :2] = torch.inf
    seen = torch.zeros(4, 40, dtype=torch.bool).scatter_(1, mass.topk(5).indices, True)
    first = position // block * block
    near = position + block - position % block > first[:, None] - 4 + 1
    allowed = causal & (near | seen[:, None])
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
    expected = weights @ inputs.value.repeat_interleave(2, dim=0).double()

    attended = method.attend(inputs)
    if block == 64:
        assert attended.output is None and attended.density == 1.0
        return
    assert attended.output is not None and attended.density == pytest.approx(float(allowed.sum()) / (4 * 820))
    torch.testing.assert_close(attended.output.double(), expected, atol=1e-5, rtol=1e-5)


def test_columns_of_the_authors() -> None:
    """MInference's vertical lines, of which ours are part."""
    for hyper, tensors in cases("MInference"):
        query, key = (tensors[f"in.{name}"].float()[0] for name in ("q", "k"))
        inputs = PrefillInputs(query, key, key, query.shape[-1] ** -0.5)
        mass = last_rows_weights(inputs, hyper["last_q"]).sum(dim=1)
        chosen = heaviest_columns(mass, hyper["sink"], hyper["vertical_size"] - hyper["sink"])
        assert chosen[0].tolist() == sorted(tensors["out.vertical_unsorted"].tolist())


def test_holds_no_square_tensor() -> None:
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor))
            return out

    inputs = prefill_inputs(4096, heads=2, kv_heads=1, dim=8)
    with Watch():
        SlidingVertical(sink=4, window=64, columns=60).attend(inputs)
    assert max(sizes) < 4096 * 4096 // 16
