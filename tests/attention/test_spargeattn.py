"""Pooled block attention with a gate on likeness."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spatiotoken.attention import PrefillInputs
from spatiotoken.attention.blocks import diagonal_blocks
from spatiotoken.attention.spargeattn import SpargeAttn, self_similarity, similar_blocks
from tests.attention import attention_map, prefill_inputs
from tests.vectors import cases


def test_blocks_of_the_authors() -> None:
    for hyper, tensors in cases("SpargeAttn"):
        query, key = (tensors[f"in.{name}"].float()[0] for name in ("q", "k"))
        sizes = {"block_q": hyper["BLKQ"], "block_k": hyper["BLKK"]}
        rule = "top" if hyper["cdfthreshd"] is None else "cdf"
        share = hyper["topk"] if rule == "top" else hyper["cdfthreshd"]
        chosen = {"similarity": hyper["simthreshd1"], "rule": rule, "share": share}
        scale, expected = query.shape[-1] ** -0.5, tensors["out.block_map"][0]
        assert similar_blocks(query, key, scale, **sizes, **chosen).equal(expected)

        method = SpargeAttn(**sizes, **chosen, smooth_keys=False)
        blocks = method.pattern(PrefillInputs(query, key, key, scale)).blocks[0]
        assert blocks.equal(expected | diagonal_blocks(query.shape[1], **sizes, device=query.device))


def test_self_similarity_is_the_mean_cosine() -> None:
    states = prefill_inputs(19, dim=8).key
    likeness = self_similarity(states, 4)
    for block in range(5):
        here = states[:, block * 4 : block * 4 + 4]
        cosine = torch.nn.functional.cosine_similarity(here[:, :, None], here[:, None], dim=-1)
        torch.testing.assert_close(likeness[:, block], cosine.mean(dim=(1, 2)))


def planted() -> PrefillInputs:
    """40 equal queries that look at keys 8 to 11."""
    query, key = torch.zeros(1, 40, 8), torch.zeros(1, 40, 8)
    query[..., 0], key[..., 1] = 10.0, 1.0
    key[:, 8:12, 0] = 1.0
    return PrefillInputs(query, key, key, 1.0)


def test_finds_a_planted_block_by_either_rule() -> None:
    chosen = {"similarity": 0.1, "block_q": 4, "block_k": 4, "smooth_keys": False}
    by_number = SpargeAttn(rule="top", share=0.1, **chosen).pattern(planted()).blocks[0, 0]
    by_mass = SpargeAttn(rule="cdf", share=0.99, **chosen).pattern(planted()).blocks[0, 0]
    for row in range(3, 10):
        assert by_number[row].nonzero().flatten().tolist() == [2, row]
        assert by_mass[row].nonzero().flatten().tolist() == [2, row]


def test_blocks_unlike_themselves_are_computed_in_full() -> None:
    inputs = planted()
    inputs.key[:, 20:24] = torch.tensor([1.0, -1.0, 1.0, -1.0])[None, :, None]
    inputs.query[:, 32:36] = torch.tensor([1.0, -1.0, 1.0, -1.0])[None, :, None]
    method = SpargeAttn(rule="top", share=0.1, similarity=0.1, block_q=4, block_k=4, smooth_keys=False)
    blocks = method.pattern(inputs).blocks[0, 0]
    assert bool(blocks[5:, 5].all()) and bool(blocks[8, :9].all())
    assert blocks[7].nonzero().flatten().tolist() == [2, 5, 7]


def test_mean_key_taken_off() -> None:
    """Keys that differ by little about a large mean are alike only with it."""
    inputs = prefill_inputs(40, dim=8)
    shifted = replace(inputs, key=inputs.key + 100)
    chosen = {"share": 0.1, "similarity": 0.9, "block_q": 40, "block_k": 4}
    key = shifted.key - shifted.key.mean(dim=1, keepdim=True)
    assert float(self_similarity(shifted.key, 4).min()) > 0.9 > float(self_similarity(key, 4).max())
    assert bool(SpargeAttn(**chosen).pattern(shifted).blocks.all())


@pytest.mark.parametrize("length", [1, 3, 9, 41, 64])
@pytest.mark.parametrize("sizes", [(4, 4), (8, 4), (4, 8)])
@pytest.mark.parametrize("rule", ["top", "cdf"])
def test_weights_are_causal_and_whole(length: int, sizes: tuple[int, int], rule: str) -> None:
    inputs = prefill_inputs(length, heads=4, kv_heads=2, dim=8)
    method = SpargeAttn(rule=rule, share=0.2, block_q=sizes[0], block_k=sizes[1], backend="gather")
    if length < 9:
        assert method.attend(inputs).output is None
        return
    density = method.attend(inputs).density
    assert density < (0.75 if length > 9 else 1.01)
    if density == 1:
        return
    weights = attention_map(method, inputs)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, length))
    assert not bool(weights.triu(1).any())


def test_equal_keys_ties_and_large_half_precision() -> None:
    inputs = prefill_inputs(40, dim=8)
    same = replace(inputs, key=torch.ones_like(inputs.key))
    method = SpargeAttn(share=0.3, block_q=4, block_k=4)
    assert method.pattern(same).blocks[0, 0, -1].nonzero().flatten().tolist() == [0, 1, 2, 9]
    large = replace(inputs, query=(inputs.query * 3000).half(), key=(inputs.key * 3000).half())
    assert bool(method.pattern(large).blocks[0].diagonal(dim1=-2, dim2=-1).all())
    assert float(method.pattern(large).blocks.float().mean()) < 0.5


def test_everything() -> None:
    assert SpargeAttn(share=1.0).is_dense(10**6, 0, 1) and SpargeAttn(similarity=1.0).is_dense(10**6, 0, 1)
    assert not SpargeAttn().is_dense(65, 0, 1)
