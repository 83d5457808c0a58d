"""DyVTE: all visual tokens leave at the layer where a gate on the text finds that they are no longer needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.gates import gate_tensors
from spatiotoken.layers.base import LayerReducer
from spatiotoken.layers.depth import LayerPlace, layer_indices
from spatiotoken.layers.words import all_or_nothing, text_to_visual
from spatiotoken.structures import LayerReduction, LayerTokens

Gate = tuple[Tensor, Tensor]
"""Linear maps of one layer, without bias: ``[hidden, 2 D]`` and ``[2, hidden]``."""


def layer_gate(path: Path, layer: int, dim: int, device: torch.device) -> Gate:
    """The gate on the output of a layer, named ``...visual_gates_router.N.w{1,2}.weight`` as the authors save it.

    Args:
        dim: channels of the hidden states.

    Raises:
        ValueError: the file has none for the layer, or one of another shape.
    """
    prefix = f"visual_gates_router.{layer}."
    found = gate_tensors("dyvte", path, prefix, device)
    first, second = found.get("w1.weight"), found.get("w2.weight")
    if first is None or second is None:
        raise ValueError(f"dyvte: {path} has no tensors {prefix}w1.weight and {prefix}w2.weight")
    if first.ndim != 2 or first.shape[1] != 2 * dim or second.shape != (2, first.shape[0]):
        raise ValueError(
            f"dyvte: the gate of layer {layer} in {path} does not fit the model: expected w1 of [hidden, {2 * dim}] "
            f"and w2 of [2, hidden], found {list(first.shape)} and {list(second.shape)}"
        )
    return first, second


def gate_logits(words: Tensor, asking: Tensor, gate: Gate) -> Tensor:
    """``[2]`` float32 what speaks for keeping the visual tokens, and for dropping them.

    Args:
        words: ``[t, D]`` hidden states of the text, ``t >= 1``; the last one is the last of the prompt.
        asking: ``[t]`` bool: which of these are averaged, without the last; the last one alone if there is no other.
    """
    words, last = words.float(), words[-1].float()
    weight = asking.float().index_fill(0, torch.tensor([words.shape[0] - 1], device=asking.device), 0.0)
    mean = torch.where(weight.sum() > 0, weight @ words / weight.sum().clamp(min=1), last)
    first, second = gate
    return second.float() @ torch.nn.functional.gelu(first.float() @ torch.cat([mean, last]))


class DyVTE(LayerReducer, method="dyvte", paper="2411.19628"):
    """Drop all visual tokens at the first layer where a gate on the text's state says so (arXiv 2411.19628).

    Before each decoder layer from ``layer`` on, a small network of the layer before reads the mean hidden state of the
    words after the last visual token and that of the last word; once it finds for leaving, no visual token is left. The
    gates are trained: ``weights`` is a safetensors file with the authors' tensors, by the same names. Each question
    costs one wait for the device.

    WITHOUT ``weights`` THE RULE IS OURS and not DyVTE's: tokens leave where the share of attention that these words
    gave them in the layer before, averaged over heads, is below ``threshold``. It needs the attention rows of the words
    at each of these layers, and early layers may be below it too, hence a ``layer`` in the middle in the preset.

    Written from the paper and from how the public code lays out the gates; that has no licence, publishes no results
    to compare with, and counts on 35 words before one picture of 576 tokens, where any prompt will do here. Its mean
    leaves out the last word, as here. Prompts that end with the pictures keep them. ``threshold: 0`` without
    ``weights`` keeps everything.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"text", "rows", "weights"})

    complexity: ClassVar[str] = "O(QD) per layer for Q words, O(QLD) without weights"
    fidelity: ClassVar[str] = "paper only"

    weights: Path | None = Field(None, description="safetensors file of trained gates; None for a rule of our own")
    layer: LayerPlace = Field(
        1, description="first decoder layer before which tokens may leave: its index, or a share of the depth"
    )
    threshold: float = Field(
        0.1, ge=0, le=1, description="share of the question's attention below which tokens leave; without weights"
    )

    def prune_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(layer_indices((self.layer,), depth, "layer")[0], depth))

    def reduce(self, tokens: LayerTokens, memory: Any) -> LayerReduction:
        if self.weights is None:
            return all_or_nothing(tokens, self.threshold > 0 and bool(text_to_visual(tokens) < self.threshold))
        assert tokens.rows is not None
        text, places = tokens.needed("text"), tokens.needed("places")
        words = tokens.rows(text)
        if not words.shape[0]:
            return all_or_nothing(tokens, False)
        gate = layer_gate(self.weights, tokens.layer - 1, words.shape[1], words.device)
        stay, leave = gate_logits(words, tokens.needed("asking"), gate)
        return all_or_nothing(tokens, bool((stay < leave) & (text[-1] > places[-1])))
