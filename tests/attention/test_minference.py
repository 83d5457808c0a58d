"""Patterns per head, their lines, and the search for them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from spatiotoken.attention import PrefillInputs
from spatiotoken.attention.blocks import as_columns
from spatiotoken.attention.head_patterns import (
    along_diagonals,
    crossing_ranks,
    head_pattern,
    line_masses,
    line_ranks,
    parse_head,
    seen_by,
)
from spatiotoken.attention.head_search import (
    agreed,
    best_heads,
    computed_share,
    equal_cost,
    output_error,
    rounded,
    search_heads,
)
from spatiotoken.attention.kernels.pattern import visible_pairs
from spatiotoken.attention.minference import MInference
from spatiotoken.attention.weights import spread_rows
from tests.attention import attention_map, prefill_inputs
from tests.vectors import cases

SMALL = {"sink": 1, "local": 1, "last_queries": 8, "block": 4}


def shaped(length: int, *, columns: tuple[int, ...] = (), distance: int | None = None) -> PrefillInputs:
    """One head that looks at some keys, or at one distance, and at nothing else worth mention."""
    query, key = torch.zeros(1, length, 2 * length), torch.zeros(1, length, 2 * length)
    key[0, :, :length] = torch.eye(length)
    row = torch.arange(length)
    for column in columns:
        query[0, column:, column] = 20
    if distance is not None:
        query[0, row[distance:], row[distance:] - distance] = 20
    return PrefillInputs(query, key, torch.randn(1, length, 2 * length, generator=torch.Generator().manual_seed(0)), 1)


def test_index_of_the_authors() -> None:
    for hyper, tensors in cases("MInference"):
        query, key = (tensors[f"in.{name}"].float()[0] for name in ("q", "k"))
        inputs = PrefillInputs(query, key, key, query.shape[-1] ** -0.5)
        vertical, slash = line_masses(inputs, hyper["last_q"], [0])
        keys = sorted(tensors["out.vertical_unsorted"].tolist())
        distances = sorted(tensors["out.slash_offsets_unsorted"].tolist())
        columns = line_ranks(vertical, hyper["sink"]) < hyper["vertical_size"]
        diagonals = line_ranks(slash, hyper["local"]) < hyper["slash_size"]
        assert columns[0].nonzero()[:, 0].tolist() == keys
        assert diagonals[0].nonzero()[:, 0].tolist() == distances

        method = MInference(vertical=hyper["vertical_size"], slash=hyper["slash_size"])
        pattern = method.pattern(inputs)
        assert pattern.columns is not None and pattern.columns[0, 0].tolist() == keys
        position = torch.arange(inputs.length)
        blocks = torch.zeros_like(pattern.blocks[0, 0])
        for distance in distances:
            query_at = position[distance:]
            blocks[query_at // 64, (query_at - distance) // 64] = True
        extra = pattern.blocks[0, 0] & ~blocks
        # The last block may be too short to be crossed twice.
        assert torch.equal(pattern.blocks[0, 0] | blocks, pattern.blocks[0, 0]) and not extra[:-1].any()


def test_finds_planted_lines() -> None:
    inputs = shaped(40, columns=(9,))
    pattern = MInference(vertical=2, slash=1, **SMALL).pattern(inputs)
    assert pattern.columns is not None and pattern.columns[0, 0].tolist() == [0, 9]
    assert torch.equal(pattern.blocks[0, 0], torch.eye(10, dtype=torch.bool))

    inputs = shaped(40, distance=17)
    pattern = MInference(vertical=1, slash=2, **SMALL).pattern(inputs)
    number = torch.arange(10)
    distance = number[:, None] - number
    assert torch.equal(pattern.blocks[0, 0], (distance == 0) | (distance == 4) | (distance == 5))


def test_finds_a_planted_block() -> None:
    inputs = prefill_inputs(32, heads=2, kv_heads=1, dim=8)
    query, key = inputs.query * 0.01, inputs.key * 0.01
    key[0, 8:12, 0] = 5
    query[:, 20:24, 0] = 5
    method = MInference(heads=(("block_sparse:2", "block_sparse:1"),), **SMALL)
    blocks = method.pattern(replace(inputs, query=query, key=key)).blocks[0]
    assert blocks[0, 5].nonzero()[:, 0].tolist() == [2, 5]
    assert torch.equal(blocks[1], torch.eye(8, dtype=torch.bool))


@pytest.mark.parametrize("block", [1, 3, 4, 50])
def test_slashes_cross_whole_blocks(block: int) -> None:
    length = 41
    for offset in (0, 1, 4, 17, 40):
        ranks = (torch.arange(length) != offset).long()[None]
        blocks = along_diagonals(crossing_ranks(ranks, block) < 1)[0]
        count = -(-length // block)
        expected = torch.zeros(count, count, dtype=torch.bool)
        for query in range(offset, count * block):
            expected[query // block, (query - offset) // block] = True
        assert torch.equal(blocks, expected)


def test_columns_are_rising_then_missing() -> None:
    taken = torch.tensor([[True, False, True, True], [False, False, False, True]])
    assert as_columns(taken, 9).tolist() == [[0, 2, 3, -1], [3, -1, -1, -1]]


def test_every_head_has_its_own_pattern() -> None:
    inputs = prefill_inputs(50, heads=4, kv_heads=2, dim=8)
    kinds = ("vertical_slash:6:3", "a_shape:4:7", "block_sparse:3", "vertical_slash:2:5")
    method = MInference(heads=(kinds,), backend="gather", **SMALL)
    weights = attention_map(method, inputs)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, 50), atol=1e-5, rtol=0)
    assert not weights.triu(1).any()
    pattern = method.pattern(inputs)
    assert torch.equal(weights > 0, visible_pairs(pattern, 50, 50)[0])
    for head, kind in enumerate(kinds):
        alone = head_pattern(inputs, [parse_head(kind)] * 4, **SMALL)
        assert torch.equal(visible_pairs(pattern, 50, 50)[0, head], visible_pairs(alone, 50, 50)[0, head])
    position = torch.arange(50)
    near = position // 4 * 4 + 4 > (position // 4 * 4)[:, None] - 7 + 1
    a_shape = (near | (position < 4)) & (position <= position[:, None])
    assert torch.equal(weights[1] > 0, a_shape)


def test_heads_are_checked() -> None:
    for wrong in ("tri_shape:100", "vertical_slash:100", "a_shape:0:4", "block_sparse:x", "block_sparse:-3", ""):
        with pytest.raises(ValidationError, match=r"supported, .*vertical_slash:<columns>:<diagonals>, a_shape"):
            MInference(heads=((wrong,),))
    inputs = prefill_inputs(50, heads=4, kv_heads=2)
    with pytest.raises(ValueError, match="heads describes 2 layers, the model has 1"):
        MInference(heads=(("block_sparse:1",),) * 2, **SMALL).attend(inputs)
    with pytest.raises(ValueError, match="heads describes 3 heads at layer 0, the model has 4"):
        MInference(heads=(("block_sparse:1",) * 3,), **SMALL).attend(inputs)


def test_dense_where_all_is_computed() -> None:
    inputs = prefill_inputs(20)
    for method in (
        MInference(),
        MInference(vertical=20, slash=1, **SMALL),
        MInference(vertical=1, slash=20, **SMALL),
        MInference(heads=(("a_shape:1:20", "block_sparse:5", "vertical_slash:20:1", "a_shape:20:1"),), **SMALL),
    ):
        assert method.is_dense(20, 0, 1) and method.attend(inputs).output is None
    method = MInference(heads=(("a_shape:1:19",) * 4,), **SMALL)
    assert not method.is_dense(20, 0, 1) and method.attend(inputs).output is None  # only by rounding up


@pytest.mark.parametrize("length", [1, 3, 4, 13, 64])
@pytest.mark.parametrize("head", ["vertical_slash:1:1", "a_shape:1:1", "block_sparse:1"])
def test_any_length(length: int, head: str) -> None:
    inputs = prefill_inputs(length, heads=2, kv_heads=1, dim=8)
    # All keys alike, and so large that half precision would overflow.
    inputs = replace(inputs, key=torch.full_like(inputs.key, 300).half(), query=(inputs.query * 300).half())
    pattern = MInference(heads=((head,) * 2,), **SMALL).pattern(inputs)
    count = -(-length // 4)
    assert pattern.blocks.shape == (1, 2, count, count) and pattern.blocks.diagonal(dim1=2, dim2=3).all()


def test_search_finds_what_was_planted() -> None:
    method = MInference(**SMALL)
    columns = shaped(128, columns=tuple(range(0, 90, 9)))
    assert search_heads(columns, 0.2, method=method)[0].startswith("vertical_slash:12:")
    near = shaped(128, distance=3)
    candidates = [("block_sparse:1",), ("a_shape:1:8",), ("vertical_slash:8:8",)]
    assert best_heads(near, candidates, method=method) == ("a_shape:1:8",)
    # The second also sees what the last queries look at, no better: ties go to the first.
    assert best_heads(near, candidates[1:] + candidates[:1], method=method) == ("a_shape:1:8",)


def test_candidates_cost_the_same() -> None:
    inputs, method = prefill_inputs(400, heads=4, kv_heads=2, dim=8), MInference(**SMALL)
    rows = spread_rows(128, 400, inputs.query.device)
    found = equal_cost(inputs, 0.3, method=method)
    assert {parse_head(text)[0] for one in found for text in one} == {"vertical_slash", "a_shape", "block_sparse"}
    for one in found:
        pattern = method.pattern_of(inputs, [parse_head(text) for text in one])
        share = computed_share(seen_by(pattern, rows, 400), rows)
        exact = visible_pairs(pattern, 400, 400)[0].sum(dim=(1, 2)) / (400 * 401 / 2)
        assert (share <= 0.3).all() and (share > 0.25).all()
        torch.testing.assert_close(share, exact, atol=0.02, rtol=0)


def test_output_error_is_of_the_real_output() -> None:
    inputs, method = prefill_inputs(60, dim=8), MInference(backend="reference", **SMALL)
    heads = [("a_shape", (4, 6))] * 4
    rows = spread_rows(7, 60, inputs.query.device)
    assert rows.tolist() == [7, 16, 24, 33, 41, 50, 59]
    found = output_error(inputs, seen_by(method.pattern_of(inputs, heads), rows, 60), rows)
    sparse = MInference(heads=(("a_shape:4:6",) * 4,), backend="reference", **SMALL).attend(inputs).output
    dense = torch.nn.functional.scaled_dot_product_attention(
        inputs.query, *(x.repeat_interleave(2, dim=0) for x in (inputs.key, inputs.value)), is_causal=True
    )
    assert sparse is not None
    torch.testing.assert_close(found, (sparse - dense)[:, rows].square().sum(dim=(1, 2)), atol=1e-4, rtol=1e-4)


def test_sizes_that_prompts_agree_on() -> None:
    assert [rounded(f"block_sparse:{size}") for size in (1, 2, 3, 4, 5, 7, 11, 13, 100)] == [
        f"block_sparse:{size}" for size in (1, 2, 3, 4, 4, 8, 12, 12, 96)
    ]
    assert rounded("vertical_slash:1000:6096") == "vertical_slash:1024:6144"
    one, two = "a_shape:1:2", "block_sparse:4"
    assert agreed([(one, one), (two, two), (two, one)]) == (two, one)
    assert agreed([(two, one), (one, two)]) == (two, one)
    with pytest.raises(ValueError, match="at least one"):
        agreed([])
