"""Patterns, the reference, the gather backend, and what the engine picks and refuses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, get_args
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spatiotoken.attention import SparsePrefill
from spatiotoken.attention.kernels import (
    BACKENDS,
    SparsePattern,
    block_sparse_attention,
    choose,
    density,
    gather,
    reference_attention,
    unavailable,
)
from spatiotoken.attention.kernels.pattern import pair_counts, visible_pairs
from spatiotoken.attention.kernels.threads import in_threads
from tests.attention import TOLERANCE, Inputs, inputs, make_inputs

CPU = torch.device("cpu")


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """Sets torch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def expected(case: Inputs) -> Tensor:
    return reference_attention(
        case.query, case.key, case.value, case.pattern, scale=case.scale, valid=case.valid, check=True
    )


def computed(case: Inputs, backend: str) -> Tensor:
    return block_sparse_attention(
        case.query, case.key, case.value, case.pattern, scale=case.scale, valid=case.valid, backend=backend
    )


def everything(case: Inputs) -> Inputs:
    """The same inputs with a pattern that leaves out nothing."""
    blocks = torch.ones_like(case.pattern.blocks)
    return replace(case, pattern=replace(case.pattern, blocks=blocks))


@settings(deadline=None, max_examples=25)
@given(inputs())
def test_a_query_sees_what_the_contract_says(case: Inputs) -> None:
    pattern, queries, keys = case.pattern, case.query.shape[2], case.key.shape[2]
    seen = visible_pairs(pattern, queries, keys, case.valid)
    row = case.pattern.blocks.shape[0] - 1
    group = case.pattern.blocks.shape[1] - 1
    start, stop = (0, keys) if case.valid is None else (int(bound[row]) for bound in case.valid)
    columns = set() if pattern.columns is None else set(pattern.columns[row, group].tolist())
    blocks = pattern.blocks[row, group]
    for i in {0, queries // 2, queries - 1}:
        position = keys - queries + i
        for key in range(keys):
            valid = start <= key <= position < stop
            chosen = valid and (
                bool(blocks[(position - start) // pattern.block_q, (key - start) // pattern.block_k])
                or key - start in columns
            )
            assert bool(seen[row, group, i, key]) == chosen, (i, key)


@settings(deadline=None, max_examples=100)
@given(inputs())
def test_density_counts_visible_pairs(case: Inputs) -> None:
    queries, keys = case.query.shape[2], case.key.shape[2]
    seen = visible_pairs(case.pattern, queries, keys, case.valid)
    whole = everything(case).pattern
    causal = visible_pairs(whole, queries, keys, case.valid)
    assert pair_counts(case.pattern, queries, keys, case.valid) == (int(seen.sum()), int(causal.sum()))
    assert density(whole, queries, keys, case.valid) == 1.0


def test_density_of_nothing_is_one() -> None:
    case = make_inputs(32, 4, bounds=[(0, 8)])
    assert density(case.pattern, 4, 32, case.valid) == 1.0


@settings(deadline=None, max_examples=25)
@given(inputs())
def test_reference_is_masked_softmax(case: Inputs) -> None:
    row, head = case.query.shape[0] - 1, case.query.shape[1] - 1
    sharing = case.query.shape[1] // case.key.shape[1]
    seen = visible_pairs(case.pattern, case.query.shape[2], case.key.shape[2], case.valid)[row, -1]
    result = expected(case)[row, head]
    for i, visible in enumerate(seen):
        if not visible.any():
            assert (result[i] == 0).all()
            continue
        key, value = (x[row, head // sharing, visible].double() for x in (case.key, case.value))
        weights = (key @ case.query[row, head, i].double() * case.scale).softmax(dim=0)
        assert torch.allclose(result[i], weights @ value, atol=1e-12)


@settings(deadline=None, max_examples=150)
@given(inputs(), st.sampled_from([4, gather.TILE]))
def test_gather_equals_reference(case: Inputs, tile: int) -> None:
    with patch.multiple(gather, TILE=tile, ROWS=tile):
        result = computed(case, "gather")
    assert result.dtype == torch.float32
    assert (result - expected(case)).abs().max() < 1e-5


@pytest.mark.parametrize("groups", ["one", "kv", "heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128])
def test_gather_at_the_sizes_of_models(groups: str, dtype: torch.dtype, dim: int) -> None:
    bounds = [(0, 300), (37, 300), (0, 210)]
    case = make_inputs(
        300, 290, batch=3, groups=groups, dim=dim, block_q=128, block_k=64, columns=20, bounds=bounds, dtype=dtype
    )
    result = computed(case, "gather")
    assert result.dtype == dtype
    assert (result - expected(case)).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("inference", [False, True])
def test_gather_computes_the_same_in_any_number_of_threads(torch_threads: None, inference: bool) -> None:
    case = make_inputs(300, 290, batch=2, groups="heads", block_q=32, block_k=16, bounds=[(0, 300), (37, 300)])
    case.query.requires_grad_()
    results = []
    with torch.inference_mode(inference):
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(computed(case, "gather"))
            assert torch.get_num_threads() == threads
    assert (results[0] - expected(case)).abs().max() < 1e-5
    assert torch.equal(results[1], results[0]) and torch.equal(results[2], results[0])


def test_threads_run_at_once_and_hand_on_errors(torch_threads: None) -> None:
    torch.set_num_threads(3)
    begun, found = threading.Barrier(2), []

    def work() -> None:
        begun.wait(timeout=30)  # breaks unless both run at once
        found.append(torch.get_num_threads())

    in_threads(work, 2)
    assert found == [1, 1]

    def fail() -> None:
        raise ValueError("no such block")

    with pytest.raises(ValueError, match="no such block"):
        in_threads(fail, 2)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 3


def test_gather_does_not_need_whole_diagonal_blocks() -> None:
    """Only every query has to see a key: here the first one, a column, and in odd rows no diagonal block."""
    case = make_inputs(90, block_q=24, block_k=8, share=0.5, groups="heads")
    blocks = case.pattern.blocks.clone()
    blocks[:, 1::2] = torch.rand(blocks[:, 1::2].shape, generator=torch.Generator().manual_seed(1)) < 0.3
    columns = torch.zeros(*blocks.shape[:2], 1, dtype=torch.int64)
    case = replace(case, pattern=SparsePattern(blocks, columns, 24, 8))
    assert (computed(case, "gather") - expected(case)).abs().max() < 1e-5


def test_gather_counts_a_column_of_a_chosen_block_once() -> None:
    case = make_inputs(64, block_q=16, block_k=16, share=0.5)
    columns = torch.arange(64).expand(1, 2, 64).contiguous()
    whole = replace(case, pattern=SparsePattern(case.pattern.blocks, columns, 16, 16))
    assert (computed(whole, "gather") - expected(everything(case))).abs().max() < 1e-5


@pytest.mark.parametrize("backend", ["reference", "gather", "dense"])
@settings(deadline=None, max_examples=25)
@given(case=inputs())
def test_a_padded_row_equals_the_single_prompt(backend: str, case: Inputs) -> None:
    if case.valid is None:
        return
    if backend == "dense":
        case = everything(case)
    batch = computed(case, backend)
    offset = case.key.shape[2] - case.query.shape[2]
    for row, (start, stop) in enumerate(zip(*(bound.tolist() for bound in case.valid), strict=True)):
        low, high = max(0, start - offset), max(0, stop - offset)
        assert (batch[row, :, :low] == 0).all() and (batch[row, :, high:] == 0).all()
        if low < high:
            single = computed(case.row(row), backend)[0]
            assert (batch[row, :, low:high] - single).abs().max() <= (0 if backend == "gather" else 1e-6)


@settings(deadline=None, max_examples=50)
@given(inputs())
def test_auto_goes_dense_where_nothing_is_left_out(case: Inputs) -> None:
    whole = everything(case)
    arguments = (whole.pattern, whole.query, whole.key)
    assert choose(*arguments, valid=whole.valid) == choose(*arguments, "dense", whole.valid) == "dense"
    with patch("spatiotoken.attention.kernels.engine._kernel", side_effect=AssertionError("a sparse kernel ran")):
        result = computed(whole, "auto")
    assert (result - expected(whole)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_in_every_dtype(dtype: torch.dtype) -> None:
    case = everything(make_inputs(100, 60, batch=2, bounds=[(50, 100), (0, 90)], dtype=dtype))
    result = computed(case, "dense")
    assert result.dtype == dtype
    assert (result - expected(case)).abs().max() < TOLERANCE[dtype]


def test_auto_is_gather_on_a_cpu_and_names_are_kept() -> None:
    case = make_inputs(64, share=0.2)
    assert density(case.pattern, 64, 64) < 1.0
    assert choose(case.pattern, case.query, case.key) == "gather"
    assert torch.equal(computed(case, "auto"), computed(case, "gather"))
    whole = everything(case)
    for backend in BACKENDS:
        if unavailable(backend, CPU) is None:
            assert choose(whole.pattern, whole.query, whole.key, backend) == backend
    assert computed(case, "reference").dtype == torch.float32


def test_configs_take_every_backend_by_name() -> None:
    assert get_args(SparsePrefill.model_fields["backend"].annotation) == ("auto", *BACKENDS)


def test_backends_that_cannot_run_say_why() -> None:
    case = make_inputs(64, share=0.2)
    with pytest.raises(ValueError, match="no backend 'fast'; take 'auto', 'dense' or one of reference, gather, flex"):
        choose(case.pattern, case.query, case.key, "fast")
    with pytest.raises(ValueError, match="'dense' computes all causal pairs, but the pattern holds"):
        choose(case.pattern, case.query, case.key, "dense")
    with patch("spatiotoken.attention.kernels.engine.find_spec", return_value=None):
        with pytest.raises(RuntimeError, match="triton is not installed; there are reference, gather"):
            computed(case, "triton")


@pytest.mark.skipif(unavailable("triton", CPU) is None, reason="triton runs on this CPU, in its interpreter")
def test_triton_is_refused_on_a_cpu() -> None:
    case = make_inputs(64, share=0.2)
    with pytest.raises(RuntimeError, match="the triton backend cannot run here: .*; there are reference, gather"):
        computed(case, "triton")


def test_gradients_are_right_or_refused() -> None:
    case = make_inputs(64, share=0.2)
    case = replace(case, query=case.query.clone().requires_grad_())
    computed(case, "reference").sum().backward()
    assert case.query.grad is not None and case.query.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="the gather backend has no backward pass"):
        computed(case, "gather").sum().backward()


def test_reference_finds_queries_without_keys() -> None:
    case = make_inputs(64, batch=2, bounds=[(0, 64), (3, 64)])
    blocks = case.pattern.blocks.clone()
    blocks[1, :, 2] = False
    case = replace(case, pattern=replace(case.pattern, blocks=blocks))
    with pytest.raises(ValueError, match="32 valid queries see no key, the first is query 35 of row 1, group 0"):
        expected(case)


def _bad_inputs() -> list[tuple[str, dict[str, Any]]]:
    case = make_inputs(64, 40, batch=2)
    query, key, blocks = case.query, case.key, case.pattern.blocks
    bounds = torch.tensor([0, 0]), torch.tensor([64, 64])
    return [
        (r"query must be \[B, heads, Q, d\]", {"query": query[0]}),
        (r"query must be \[B, heads, Q, d\]", {"value": key[:, :1]}),
        ("differ in batch or head size", {"query": query[:1]}),
        ("differ in batch or head size", {"query": query[..., :16]}),
        ("3 heads are not a multiple of 2 key heads", {"query": query[:, :3]}),
        ("must be 1 to K = 64 queries, got 70", {"query": query.new_zeros(2, 4, 70, 32)}),
        ("must be all float32, float16 or bfloat16", {"query": query.half()}),
        (
            "must be all float32, float16 or bfloat16",
            {"query": query.double(), "key": key.double(), "value": key.double()},
        ),
        (
            r"1, 2 \(key heads\) or 4 \(heads\) groups, got 3",
            {"pattern": SparsePattern(blocks.new_ones(2, 3, 4, 4), None, 16, 16)},
        ),
        (
            r"blocks of 16 x 32 over 64 keys are \[2, 2, 4, 2\], got \[2, 2, 4, 4\]",
            {"pattern": SparsePattern(blocks, None, 16, 32)},
        ),
        ("on one device", {"key": key.to("meta"), "value": key.to("meta")}),
        (r"start must be int64 \[2\], got torch.int32", {"valid": (bounds[0].int(), bounds[1])}),
        (r"stop must be int64 \[2\]", {"valid": (bounds[0], bounds[1][:1])}),
        ("0 <= start <= stop <= 64, got 0 and 65", {"valid": (bounds[0], bounds[1] + 1)}),
    ]


@pytest.mark.parametrize(("message", "change"), _bad_inputs())
def test_inputs_that_do_not_fit_are_refused(message: str, change: dict[str, Any]) -> None:
    case = replace(make_inputs(64, 40, batch=2), **change)
    with pytest.raises(ValueError, match=message):
        computed(case, "gather")


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("block sizes must be at least 1", {"block_q": 0}),
        ("blocks must be bool", {"blocks": torch.ones(1, 1, 2, 2)}),
        ("blocks must be bool", {"blocks": torch.ones(1, 2, 2, dtype=torch.bool)}),
        (r"columns must be int64 \[B, G, C\] with B, G = \[1, 1\]", {"columns": torch.zeros(1, 2, 3).long()}),
        ("columns must be int64", {"columns": torch.zeros(1, 1, 3)}),
        ("columns are on meta", {"columns": torch.zeros(1, 1, 3, dtype=torch.int64, device="meta")}),
    ],
)
def test_patterns_that_do_not_fit_are_refused(message: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SparsePattern(torch.ones(1, 1, 2, 2, dtype=torch.bool), None, 16, 16), **change)
