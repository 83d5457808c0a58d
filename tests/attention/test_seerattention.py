"""Gates on pooled queries and keys, with weights of a file and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from spatiotoken.attention import PrefillInputs
from spatiotoken.attention.seerattention import SeerAttention, gate_logits, layer_gate, rotated
from tests.attention import attention_map, prefill_inputs

UNTRAINED = SeerAttention(threshold=0.15, last_block_dense=False, block=4, backend="gather")


def gate_file(path: Path, query: tuple[int, ...] | None, key: tuple[int, ...], layer: int = 0) -> Path:
    """Random gates by the names of the authors."""
    random = torch.Generator().manual_seed(0)
    shapes = {"k": key} | ({} if query is None else {"q": query})
    prefix = f"model.layers.{layer}.self_attn.attn_gate.mask_linear_"
    save_file({f"{prefix}{name}.weight": torch.randn(shape, generator=random) for name, shape in shapes.items()}, path)
    return path


def logits_written_out(inputs: PrefillInputs, key_map: Tensor, query_map: Tensor | None, block: int) -> Tensor:
    heads, length, _ = inputs.query.shape
    count = -(-length // block)
    logits = torch.full((heads, count, count), -torch.inf)
    for head in range(heads):
        kv_head = head // inputs.groups
        gate = key_map[head if len(key_map) == heads else kv_head]
        for row in range(count):
            query = inputs.query[head, row * block : (row + 1) * block].mean(dim=0)
            if query_map is not None:
                query = query @ query_map[head]
            for col in range(row + 1):
                states = inputs.key[kv_head, col * block : (col + 1) * block]
                pooled = torch.cat([states.amax(dim=0), states.amin(dim=0), states.mean(dim=0)])
                logits[head, row, col] = query @ (pooled @ gate) / gate.shape[-1] ** 0.5
    return logits


@pytest.mark.parametrize(
    ("query", "key"), [(None, (4, 24, 8)), ((4, 8, 6), (2, 24, 6)), ((4, 8, 6), (4, 24, 6)), ((4, 8, 8), (2, 24, 8))]
)
def test_trained_gates(tmp_path: Path, query: tuple[int, ...] | None, key: tuple[int, ...]) -> None:
    inputs = prefill_inputs(27, heads=4, kv_heads=2, dim=8)
    path = gate_file(tmp_path / "gates.safetensors", query, key)
    key_map, query_map = layer_gate(path, inputs)
    expected = logits_written_out(inputs, key_map, query_map, 4)
    torch.testing.assert_close(gate_logits(inputs, (key_map, query_map), 4, None), expected, atol=1e-4, rtol=1e-4)

    method = SeerAttention(weights=path, threshold=0.1, last_block_dense=False, block=4)
    blocks = method.pattern(inputs).blocks[0]
    assert torch.equal(blocks, (expected.softmax(dim=-1) > 0.1) | torch.eye(7, dtype=torch.bool))
    assert not torch.equal(blocks, method.model_copy(update={"weights": None}).pattern(inputs).blocks[0])


def test_weights_of_each_layer_are_read_when_asked_for(tmp_path: Path) -> None:
    """Nothing is kept behind the caller's back, so a file that was trained on is seen."""
    inputs = prefill_inputs(27, heads=4, kv_heads=2, dim=8)
    path = gate_file(tmp_path / "gates.safetensors", None, (4, 24, 8), layer=12)
    first = layer_gate(path, replace(inputs, layer=12))[0]
    assert torch.equal(layer_gate(path, replace(inputs, layer=12))[0], first)
    gate_file(path, None, (4, 24, 8), layer=2)
    assert layer_gate(path, replace(inputs, layer=2))[0].shape == first.shape
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no file of gate weights"):
        layer_gate(path, replace(inputs, layer=2))
    gate_file(path, None, (4, 24, 8), layer=12)
    with pytest.raises(ValueError, match=r"no tensor layers\.2\.self_attn\.attn_gate\.mask_linear_k\.weight"):
        layer_gate(path, replace(inputs, layer=2))


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    inputs = prefill_inputs(27, heads=4, kv_heads=2, dim=8)
    absent = SeerAttention(weights=tmp_path / "absent.safetensors", block=4)
    with pytest.raises(FileNotFoundError, match="no file of gate weights at .*absent.safetensors"):
        absent.attend(inputs)
    (tmp_path / "text.pth").write_text("no tensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        SeerAttention(weights=tmp_path / "text.pth", block=4).attend(inputs)
    alone = gate_file(tmp_path / "alone.safetensors", None, (2, 24, 8))
    with pytest.raises(ValueError, match=r"expected mask_linear_k of \[4, 24, 8\].*found \[\[2, 24, 8\]\]"):
        layer_gate(alone, inputs)
    pair = gate_file(tmp_path / "pair.safetensors", (4, 16, 6), (2, 24, 6))
    with pytest.raises(ValueError, match=r"of \[4, 8, 6\]; found \[\[2, 24, 6\], \[4, 16, 6\]\]"):
        layer_gate(pair, inputs)


def test_rotary_embedding_is_taken_off_before_pooling() -> None:
    inputs, theta = prefill_inputs(27, heads=4, kv_heads=2, dim=8), 1e4
    position = torch.arange(27.0)
    turned = replace(inputs, query=rotated(inputs.query, position, theta), key=rotated(inputs.key, position, theta))
    # As transformers has it.
    frequency = 1 / theta ** (torch.arange(0, 8, 2) / 8)
    angle = torch.outer(position, frequency).repeat(1, 2)
    half = torch.cat([-inputs.query[..., 4:], inputs.query[..., :4]], dim=-1)
    torch.testing.assert_close(turned.query, inputs.query * angle.cos() + half * angle.sin())

    found = gate_logits(turned, None, 4, theta)
    starts = torch.arange(0.0, 27, 4)
    query = rotated(torch.stack([x.mean(dim=1) for x in inputs.query.split(4, dim=1)], dim=1), starts, theta)
    key = rotated(torch.stack([x.mean(dim=1) for x in inputs.key.split(4, dim=1)], dim=1), starts, theta)
    expected = query @ key.repeat_interleave(2, dim=0).transpose(1, 2) * inputs.scale
    torch.testing.assert_close(found.tril(), expected.tril(), atol=1e-4, rtol=1e-4)


def test_untrained_gates_find_a_planted_block() -> None:
    inputs = prefill_inputs(40, heads=2, kv_heads=1, dim=8)
    query, key = 0.1 * inputs.query, 0.1 * inputs.key
    query[:, 20:], key[:, 8:12] = query[:, 20:] + 2.0, key[:, 8:12] + 2.0
    blocks = UNTRAINED.pattern(replace(inputs, query=query, key=key)).blocks[0]
    expected = torch.eye(10, dtype=torch.bool)
    expected[5:, 2] = True
    assert torch.equal(blocks[:, 5:], expected[5:].expand(2, -1, -1))


def test_share_of_the_best() -> None:
    inputs = prefill_inputs(40)
    method = UNTRAINED.model_copy(update={"sparsity_method": "nz_ratio", "nz_ratio": 0.64})
    # 1 - sqrt(0.36) of 10 blocks.
    blocks = method.pattern(inputs).blocks[0]
    logits = gate_logits(inputs, None, 4, None)
    for head in range(4):
        for row in range(10):
            best = sorted(range(row + 1), key=lambda col: -float(logits[head, row, col]))[:4]
            assert set(blocks[head, row].nonzero()[:, 0].tolist()) == {*best, row}
    assert method.model_copy(update={"nz_ratio": 1e-6}).pattern(inputs).blocks[0, 0].sum(dim=1).max() <= 2


def test_last_two_blocks_of_queries_are_dense() -> None:
    method = SeerAttention(threshold=1.0, block=4)
    blocks = method.pattern(prefill_inputs(39)).blocks[0]
    expected = torch.eye(10, dtype=torch.bool)
    expected[8, :9], expected[9] = True, True
    assert torch.equal(blocks, expected.expand(4, -1, -1))


def test_rows_sum_to_one_and_nothing_is_above_the_diagonal() -> None:
    weights = attention_map(UNTRAINED, prefill_inputs(45))
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, 45))
    assert torch.equal(weights, weights.tril()) and weights.diagonal(dim1=1, dim2=2).min() > 0


def test_settings_that_leave_nothing_out() -> None:
    inputs = prefill_inputs(45)
    everything = UNTRAINED.model_copy(update={"sparsity_method": "nz_ratio", "nz_ratio": 1.0})
    assert everything.is_dense(45, 0, 1) and everything.attend(inputs).output is None
    assert everything.pattern(inputs).blocks.sum() == 4 * 12 * 13 // 2
    assert SeerAttention(block=4).is_dense(8, 0, 1) and not SeerAttention(block=4).is_dense(9, 0, 1)


@pytest.mark.parametrize("length", [1, 3, 4, 5])
@pytest.mark.parametrize("equal", [False, True])
def test_short_prompts(length: int, equal: bool) -> None:
    inputs = prefill_inputs(length)
    if equal:
        inputs = replace(inputs, key=torch.ones_like(inputs.key))
    for method in (UNTRAINED, UNTRAINED.model_copy(update={"sparsity_method": "nz_ratio", "nz_ratio": 0.1})):
        blocks = method.pattern(inputs).blocks[0]
        assert blocks.diagonal(dim1=1, dim2=2).all() and not blocks.triu(1).any()


def test_half_precision_does_not_overflow() -> None:
    inputs = prefill_inputs(45)
    query, key = inputs.query.half(), inputs.key.half()
    method = UNTRAINED.model_copy(update={"sparsity_method": "nz_ratio", "nz_ratio": 0.5})
    large = replace(inputs, query=query * 4096, key=key * 4096)
    same = replace(inputs, query=query.float(), key=key.float())
    assert torch.equal(method.pattern(large).blocks, method.pattern(same).blocks)
