"""The FlashInfer backend over a stand-in that does what FlashInfer's wrapper is documented to do.

Its kernels themselves run on GPUs only; there they are held to the reference.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from spatiotoken.attention.kernels import flashinfer, reference_attention, unavailable
from tests.attention import Inputs, inputs, make_inputs

GPU = torch.device("cuda")
REASON = unavailable("flashinfer", GPU) if torch.cuda.is_available() else "there is no GPU"


class Wrapper:
    """``BatchPrefillWithPagedKVCacheWrapper``, with no other arguments than the backend hands over.

    What a query gets that sees nothing is not documented: here it is not a number.
    """

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD"

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        custom_mask: Tensor | None,
        sm_scale: float,
        q_data_type: torch.dtype,
    ) -> None:
        numbers = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(x.dtype == torch.int32 and x.ndim == 1 for x in numbers)
        pages, last = paged_kv_indptr.diff(), paged_kv_last_page_len
        assert (pages > 0).all() and len(pages) == len(last) == len(qo_indptr) - 1
        self.query_counts: list[int] = qo_indptr.diff().tolist()
        self.key_counts: list[int] = ((pages - 1) * page_size + last).tolist()
        self.pages = paged_kv_indices.long().split(pages.tolist())
        self.heads = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self.masks: list[Tensor | None] = [None] * len(pages)
        if custom_mask is not None:
            sizes = [q * k for q, k in zip(self.query_counts, self.key_counts, strict=True)]
            assert custom_mask.dtype == torch.bool and custom_mask.shape == (sum(sizes),)
            self.masks = list(custom_mask.split(sizes))
        self.scale, self.dtype = sm_scale, q_data_type

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, return_lse: bool) -> tuple[Tensor, Tensor]:
        heads, kv_heads, dim, page_size = self.heads
        assert return_lse and q.shape == (sum(self.query_counts), heads, dim) and q.dtype == self.dtype
        assert all(x.shape[1:] == (page_size, kv_heads, dim) and x.dtype == q.dtype for x in paged_kv_cache)
        done = [
            self._one(*request, paged_kv_cache)
            for request in zip(q.split(self.query_counts), self.pages, self.key_counts, self.masks, strict=True)
        ]
        output, mass = (torch.cat(parts) for parts in zip(*done, strict=True))
        return output.to(q.dtype), mass.float()

    def _one(
        self, query: Tensor, pages: Tensor, count: int, mask: Tensor | None, cache: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        sharing = self.heads[0] // self.heads[1]
        key, value = (x[pages].flatten(0, 1)[:count].double().repeat_interleave(sharing, dim=1) for x in cache)
        logits = torch.einsum("qhd,khd->qhk", query.double(), key) * self.scale
        if mask is not None:
            logits = logits.masked_fill(~mask.view(len(query), 1, count), -torch.inf)
        output = torch.einsum("qhk,khd->qhd", logits.softmax(dim=-1), value)
        mass = logits.logsumexp(dim=-1) / torch.tensor(2.0).log()
        return output, mass.where(mass > -torch.inf, torch.nan)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flashinfer")
    vars(module).update(BatchPrefillWithPagedKVCacheWrapper=Wrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(flashinfer, "WORKSPACE", 1)


def assert_right(case: Inputs) -> None:
    # Each pass and their sum are rounded, so values of one and two would be past the tolerance in bfloat16.
    arguments = (case.query, case.key, case.value / 2, case.pattern)
    result = flashinfer.flashinfer_attention(*arguments, scale=case.scale, valid=case.valid)
    assert result.dtype == case.query.dtype and result.shape == case.query.shape
    expected = reference_attention(*arguments, scale=case.scale, valid=case.valid, check=True)
    torch.testing.assert_close(result.double(), expected, atol=1e-2, rtol=0)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=inputs(torch.float16, dim=64))
def test_equals_the_reference(case: Inputs, stand_in: None) -> None:
    assert_right(case)


@pytest.mark.parametrize("dtype", flashinfer.DTYPES)
@pytest.mark.parametrize("dim", flashinfer.HEAD_DIMS)
def test_takes_each_head_size(dim: int, dtype: torch.dtype, stand_in: None) -> None:
    assert_right(make_inputs(150, dim=dim, sharing=7, block_q=64, block_k=32, columns=5, dtype=dtype))


def test_a_diagonal_that_is_not_chosen_is_not_seen(stand_in: None) -> None:
    """Some queries see nothing in their own block, but all see the first key."""
    case = make_inputs(90, 70, groups="heads", dim=64, block_q=16, block_k=8, share=0.2, columns=1, dtype=torch.float16)
    blocks = torch.rand(case.pattern.blocks.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    first = torch.zeros_like(case.pattern.columns) if case.pattern.columns is not None else None
    assert_right(replace(case, pattern=replace(case.pattern, blocks=blocks, columns=first)))


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 64), (torch.bfloat16, 96)])
def test_says_what_it_does_not_take(dtype: torch.dtype, dim: int) -> None:
    case = make_inputs(40, dim=dim, dtype=dtype)
    with pytest.raises(RuntimeError, match="head sizes of 64, 128, 256, got .*; gather takes all"):
        flashinfer.flashinfer_attention(case.query, case.key, case.value, case.pattern, scale=case.scale)


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer, "find_spec", lambda name: None)
    assert unavailable("flashinfer", GPU) == "FlashInfer is not installed (pip install 'spatiotoken[flashinfer]')"
    monkeypatch.setattr(flashinfer, "find_spec", lambda name: object())
    assert unavailable("flashinfer", GPU) is None
    assert unavailable("flashinfer", torch.device("cpu")) == "it needs CUDA tensors, not cpu"


@pytest.mark.skipif(REASON is not None, reason=f"the flashinfer backend cannot run here: {REASON}")
@pytest.mark.parametrize("dtype", flashinfer.DTYPES)
@pytest.mark.parametrize("groups", ["one", "kv", "heads"])
@pytest.mark.parametrize("columns", [0, 9])
def test_equals_the_reference_on_a_gpu(columns: int, groups: str, dtype: torch.dtype) -> None:
    case = make_inputs(
        700, 500, batch=2, groups=groups, dim=128, block_q=128, block_k=64, columns=columns,
        bounds=[(0, 700), (40, 690)], dtype=dtype,
    ).to(GPU)  # fmt: skip
    assert_right(case)
