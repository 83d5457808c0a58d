"""The flex backend: its block lists, that it never runs uncompiled, and (slow) compiled against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention import flex_attention as torch_flex

from spatiotoken.attention.kernels import SparsePattern, block_sparse_attention, flex, reference_attention, unavailable
from spatiotoken.attention.kernels.pattern import seen_keys, visible_pairs
from tests.attention import TOLERANCE, Inputs, inputs, make_inputs

CPU = torch.device("cpu")
REASON = unavailable("flex", CPU)
compiles = pytest.mark.skipif(REASON is not None, reason=f"the flex backend cannot run here: {REASON}")


def error(case: Inputs) -> float:
    """Largest difference from the reference."""
    arguments = (case.query, case.key, case.value, case.pattern)
    result = block_sparse_attention(*arguments, scale=case.scale, valid=case.valid, backend="flex")
    assert result.dtype == case.query.dtype
    expected = reference_attention(*arguments, scale=case.scale, valid=case.valid, check=True)
    return float((result - expected).abs().max())


@settings(deadline=None, max_examples=100)
@given(inputs(), st.none() | st.tuples(st.integers(1, 30), st.integers(1, 30)))
def test_blocks_are_told_apart(case: Inputs, tiles: tuple[int, int] | None) -> None:
    """Full tiles hold nothing but visible pairs, and no visible pair is outside full and partial tiles."""
    pattern, keys = case.pattern, case.key.shape[2]
    blocks, block_q, block_k = pattern.blocks[:1], pattern.block_q, pattern.block_k
    columns = None if pattern.columns is None else pattern.columns[:1]
    visible = visible_pairs(SparsePattern(blocks, columns, block_q, block_k), keys, keys)[0]
    first = (keys - case.query.shape[2]) // block_q
    seen = seen_keys(blocks[0, :, first:], None if columns is None else columns[0], block_k, keys)
    tile_q, tile_k = tiles or (block_q, block_k)
    full, partial = flex.split_blocks(seen, first, block_q, (tile_q, tile_k))
    assert not (full & partial).any()
    for number, rows in enumerate(visible[:, first * block_q :].split(tile_q, dim=1)):
        for group, per_group in enumerate(rows):
            for block, pairs in enumerate(per_group.split(tile_k, dim=1)):
                assert bool(full[group, number, block]) == bool(pairs.all())
                assert bool(partial[group, number, block]) == bool(pairs.any() and not pairs.all())


@compiles
def test_it_does_not_run_uncompiled() -> None:
    case = make_inputs(48)
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="the flex backend runs compiled"):
        error(case)


def test_it_says_what_is_missing() -> None:
    with patch.object(flex, "find_spec", return_value=None):
        assert unavailable("flex", torch.device("cuda")) == "it needs triton to compile for CUDA"
    assert unavailable("flex", torch.device("meta")) == "it compiles for CPU and CUDA, not for meta"
    with patch("torch.backends.cpu.get_cpu_capability", return_value="DEFAULT"):
        assert unavailable("flex", CPU) == "it needs a CPU with AVX2"
    with patch.object(flex.shutil, "which", return_value=None):
        assert "it needs a C++ compiler, and there is none of" in str(unavailable("flex", CPU))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@compiles
@pytest.mark.parametrize(
    ("groups", "dtype"),
    [
        ("one", torch.float32),
        ("kv", torch.float32),
        ("heads", torch.float32),
        ("kv", torch.float16),
        ("heads", torch.bfloat16),
    ],
)
def test_flex_equals_reference(groups: str, dtype: torch.dtype, fresh_compiler: None) -> None:
    # Not one of these lengths is compiled by itself.
    for keys, queries, bounds in (
        (300, 300, None),
        (200, 200, [(0, 200), (37, 200), (0, 111)]),
        (257, 130, [(0, 257), (140, 150), (0, 100)]),
        (90, 1, None),
    ):
        for columns in (0, 5):
            case = make_inputs(
                keys, queries, batch=3, groups=groups, dim=64, block_q=64, block_k=32,
                columns=columns, bounds=bounds, dtype=dtype, seed=keys,
            )  # fmt: skip
            assert error(case) < TOLERANCE[dtype], (keys, queries, columns)


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("tiles", [(128, 128), (256, 128), (64, 16), (96, 48)])
def test_tiles_of_other_sizes_than_blocks_equal_the_reference(tiles: tuple[int, int], fresh_compiler: None) -> None:
    for columns, groups, queries in ((0, "heads", 300), (5, "kv", 170)):
        case = make_inputs(
            300, queries, batch=2, groups=groups, block_q=64, block_k=32, share=0.2,
            columns=columns, bounds=[(0, 300), (37, 290)],
        )  # fmt: skip
        arguments = (case.query, case.key, case.value, case.pattern)
        result = flex.attend(*arguments, case.scale, case.valid, tiles=tiles)
        expected = reference_attention(*arguments, scale=case.scale, valid=case.valid, check=True)
        torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@compiles
def test_a_full_limit_of_recompiles_changes_nothing(fresh_compiler: None) -> None:
    """Others' `torch.compile(flex_attention)` and our own variants fill dynamo's limit; results stay right."""
    with dynamo_config.patch(recompile_limit=2, accumulated_recompile_limit=2):
        theirs = torch.compile(torch_flex.flex_attention, backend="eager", dynamic=False, fullgraph=True)
        for length in (16, 32):
            theirs(*torch.randn(3, 1, 2, length, 16))
        with pytest.raises(FailOnRecompileLimitHit):
            theirs(*torch.randn(3, 1, 2, 48, 16))
        # Each head size is compiled anew, so the third is past that limit.
        for dim in (16, 32, 64, 128):
            case = make_inputs(300, dim=dim, block_q=64, block_k=32, share=0.1, columns=3)
            assert error(case) < 1e-5, dim


@pytest.mark.slow
@compiles
def test_the_mask_alone_is_right(fresh_compiler: None) -> None:
    """Were the block lists ignored, as they are uncompiled, the result would still be right."""
    case = make_inputs(200, 150, groups="heads", block_q=32, block_k=32, share=0.2, columns=3)
    with patch.object(flex, "split_blocks", side_effect=_all_partial):
        assert error(case) < 1e-5
    whole = replace(case, pattern=replace(case.pattern, blocks=torch.ones_like(case.pattern.blocks)))
    assert error(whole) < 1e-5


def _all_partial(
    seen: torch.Tensor, first: int, block_q: int, tiles: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    partial = seen.new_ones(*seen.shape[:2], -(-seen.shape[2] // tiles[1]))
    return torch.zeros_like(partial), partial
