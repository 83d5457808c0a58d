"""Gates on the state of the text, with weights of a file and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from spatiotoken.layers.dyvte import DyVTE, gate_logits, layer_gate
from spatiotoken.structures import LayerTokens
from tests.layers.test_todre_drop import causal, prompt

CPU = torch.device("cpu")


def gate_file(path: Path, dim: int, layers: int = 4, prefix: str = "model.") -> Path:
    """Random gates by the names of the authors."""
    random = torch.Generator().manual_seed(0)
    shapes = {"w1": (16, 2 * dim), "w2": (2, 16)}
    names = [(layer, name, shape) for layer in range(layers) for name, shape in shapes.items()]
    tensors = {
        f"{prefix}visual_gates_router.{layer}.{name}.weight": torch.randn(shape, generator=random)
        for layer, name, shape in names
    }
    save_file(tensors, path)
    return path


def state(dim: int, layer: int, seed: int = 0) -> tuple[LayerTokens, Tensor]:
    """Ten rows of which 2, 3 and 4 are visual, and the hidden states of all."""
    hidden = torch.randn(10, dim, generator=torch.Generator().manual_seed(seed))

    def none(rows: Tensor, entering: bool) -> Tensor:
        raise AssertionError("gates need no attention")

    return replace(prompt(causal(2, 10), [2, 3, 4], layer), rows=lambda rows: hidden[rows], weights=none), hidden


@pytest.mark.parametrize("prefix", ["", "model.", "base.model."])
def test_gate_of_the_layer_before_decides(tmp_path: Path, prefix: str) -> None:
    path = gate_file(tmp_path / "gates.safetensors", 8, layers=12, prefix=prefix)
    left = []
    for layer in range(1, 13):
        tokens, hidden = state(8, layer, seed=layer)
        first, second = layer_gate(path, layer - 1, 8, CPU)
        read = torch.cat([hidden[5:9].mean(dim=0), hidden[9]])
        logits = second @ torch.nn.functional.gelu(first @ read)
        torch.testing.assert_close(gate_logits(hidden[tokens.text], tokens.needed("asking"), (first, second)), logits)
        kept = DyVTE(weights=path).reduce(tokens, None).kept.tolist()
        assert kept == ([] if logits[0] < logits[1] else [0, 1, 2])
        left.append(len(kept))
    assert 0 < sum(left) < 36, "both must happen"


def test_one_word_stands_for_itself() -> None:
    words = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    gate = torch.eye(8), torch.ones(2, 8)
    alone = gate_logits(words, torch.tensor([False, False, True]), gate)
    torch.testing.assert_close(alone, gate_logits(words[[2, 2]], torch.tensor([True, True]), gate))
    torch.testing.assert_close(alone, gate_logits(words[2:], torch.tensor([True]), gate))


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = gate_file(tmp_path / "gates.safetensors", 8)
    with pytest.raises(ValueError, match=r"no tensors visual_gates_router\.4\.w1"):
        layer_gate(path, 4, 8, CPU)
    with pytest.raises(ValueError, match=r"expected w1 of \[hidden, 12\].*found \[16, 16\]"):
        layer_gate(path, 1, 6, CPU)
    with pytest.raises(FileNotFoundError, match="no file of gate weights"):
        layer_gate(tmp_path / "none.safetensors", 0, 8, CPU)
    broken = tmp_path / "broken.safetensors"
    broken.write_text("no tensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        layer_gate(broken, 0, 8, CPU)


def test_rule_without_weights() -> None:
    weights = causal(2, 10)
    share = weights.mean(dim=0)[5:, 2:5].sum(dim=1).mean().item()
    tokens = prompt(weights, [2, 3, 4], 1)
    assert DyVTE(threshold=share - 0.01).reduce(tokens, None).kept.tolist() == [0, 1, 2]
    assert not DyVTE(threshold=share + 0.01).reduce(tokens, None).kept.shape[0]
    assert DyVTE(threshold=0).reduce(tokens, None).kept.tolist() == [0, 1, 2]


def test_layers_that_are_asked() -> None:
    assert DyVTE().prune_layers(4) == (1, 2, 3)
    assert DyVTE(layer=0.5).prune_layers(6) == (3, 4, 5)
    with pytest.raises(ValueError, match="layers.layer"):
        DyVTE(layer=4).prune_layers(4)


def test_no_words_no_exit(tmp_path: Path) -> None:
    path = gate_file(tmp_path / "gates.safetensors", 8)
    tokens, _ = state(8, 1)
    silent = replace(tokens, text=torch.empty(0, dtype=torch.int64), asking=torch.empty(0, dtype=torch.bool))
    assert DyVTE(weights=path).reduce(silent, None).kept.tolist() == [0, 1, 2]
    # Nor where the pictures are the end of the prompt, whatever the gates find.
    left = []
    for seed in range(8):
        tokens, _ = state(8, 1, seed)
        first = replace(tokens, text=torch.arange(7), places=torch.arange(7, 10), asking=torch.ones(7).bool())
        left.append(DyVTE(weights=path).reduce(first, None).kept.shape[0])
    assert left == [3] * len(left)
