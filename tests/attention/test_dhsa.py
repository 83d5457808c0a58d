"""Chunks of similar keys and the blocks that they bring in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spatiotoken.attention import PrefillInputs
from spatiotoken.attention.dhsa import Dhsa, chunk_starts, chunk_states, key_block_scores
from tests.attention import attention_map, prefill_inputs

SMALL = Dhsa(
    budget=16,
    nms_window=2,
    global_tokens=4,
    local_tokens=4,
    instruction_tokens=0,
    block_q=4,
    block_k=4,
    backend="gather",
)


def scenes(lengths: list[int], dim: int = 8) -> PrefillInputs:
    """Keys that are one unit vector per scene, its number in order; queries that look for the first scene's."""
    key = torch.eye(dim).repeat_interleave(torch.tensor(lengths + [0] * (dim - len(lengths))), dim=0)[None]
    query = torch.zeros_like(key)
    query[..., 0] = 4.0
    return PrefillInputs(query, key, key, 1.0)


def test_chunks_start_where_scenes_change() -> None:
    key = scenes([7, 5, 12, 3]).key
    assert chunk_starts(key, 4, 2).tolist() == [0, 7, 12, 24]
    # Equal drops: the first ones.
    assert chunk_starts(key, 3, 2).tolist() == [0, 7, 12]
    assert chunk_starts(key, 1, 2).tolist() == [0]
    # No two starts within the window; the drop at 27 is no larger than that at 24.
    near = scenes([7, 5, 12, 3, 6]).key
    assert chunk_starts(near, 5, 4).tolist() == [0, 7, 12, 24, 33]


def test_chunks_that_are_not_there_are_empty() -> None:
    key = scenes([7, 5]).key
    starts = chunk_starts(key, 4, 2)
    assert starts.tolist() == [0, 7, 12, 12]
    states = chunk_states(key, starts)
    expected = torch.zeros(4, 8)
    expected[0, 0], expected[1, 1] = 7**0.5, 5**0.5
    torch.testing.assert_close(states, expected)


def test_scores_of_key_blocks_written_out() -> None:
    inputs = prefill_inputs(23, heads=4, kv_heads=2, dim=8)
    starts = torch.tensor([0, 5, 6, 17, 23])
    score = key_block_scores(inputs.query, inputs.key, starts, 4, 3)
    assert score.shape == (6, 8)
    query, key = inputs.query.mean(dim=0), inputs.key.mean(dim=0)
    for row in range(6):
        state = query[4 * row : 4 * row + 4].mean(dim=0)
        tokens = [float(state @ key[a:b].mean(dim=0)) * (b - a) ** 0.5 for a, b in ((0, 5), (5, 6), (6, 17), (17, 23))]
        token = [tokens[0]] * 5 + [tokens[1]] + [tokens[2]] * 11 + [tokens[3]] * 6
        expected = [max(token[3 * block : 3 * block + 3]) for block in range(8)]
        assert score[row].tolist() == pytest.approx(expected, abs=1e-5)


def test_finds_the_chunk_that_the_queries_look_for() -> None:
    inputs = scenes([8, 8, 16, 8])
    query = torch.zeros_like(inputs.query)
    query[..., 1] = 4.0
    blocks = SMALL.pattern(replace(inputs, query=query)).blocks[0, 0]
    # The first block, the own one, and the two of the second scene.
    assert blocks[9].nonzero()[:, 0].tolist() == [0, 2, 3, 9]
    assert blocks[4].nonzero()[:, 0].tolist() == [0, 2, 3, 4]
    # As many as there are.
    assert blocks[2].nonzero()[:, 0].tolist() == [0, 1, 2]


def test_last_queries_see_everything() -> None:
    inputs = prefill_inputs(41)
    method = SMALL.model_copy(update={"instruction_tokens": 3})
    blocks = method.pattern(inputs).blocks[0, 0]
    assert blocks[9:].all(dim=1).tolist() == [False, True] and blocks[9, :10].all() and not blocks[8, :9].all()


def test_budget_counts_keys_and_the_whole_budget_is_dense() -> None:
    inputs = prefill_inputs(96)
    blocks = SMALL.pattern(inputs).blocks
    assert blocks.shape == (1, 1, 24, 24)
    assert blocks[0, 0].sum(dim=1).tolist() == [1, 2, 3] + [4] * 21
    attended = SMALL.attend(inputs)
    assert attended.output is not None and attended.density < 0.4
    method = SMALL.model_copy(update={"budget": 96})
    assert method.is_dense(96, 0, 1) and method.attend(inputs).output is None
    assert method.pattern(inputs).blocks.sum() == 24 * 25 // 2


def test_rows_sum_to_one_and_nothing_is_above_the_diagonal() -> None:
    weights = attention_map(SMALL, prefill_inputs(45))
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, 45))
    assert torch.equal(weights, weights.tril()) and weights.diagonal(dim1=1, dim2=2).min() > 0


@pytest.mark.parametrize("length", [1, 3, 4, 5, 17])
@pytest.mark.parametrize("equal", [False, True])
def test_short_prompts(length: int, equal: bool) -> None:
    inputs = prefill_inputs(length)
    if equal:
        inputs = replace(inputs, key=torch.ones_like(inputs.key))
    blocks = SMALL.model_copy(update={"budget": 1}).pattern(inputs).blocks[0, 0]
    count = -(-length // 4)
    assert blocks.shape == (count, count) and blocks.diagonal().all() and blocks[:, 0].all()
    assert not blocks.triu(1).any()


def test_half_precision_does_not_overflow() -> None:
    inputs = prefill_inputs(45)
    query, key = inputs.query.half(), inputs.key.half()
    same = replace(inputs, query=query.float(), key=key.float())
    large = replace(inputs, query=query * 4096, key=key * 4096)
    assert large.query.isfinite().all() and large.key.isfinite().all()
    assert torch.equal(SMALL.pattern(large).blocks, SMALL.pattern(same).blocks)
