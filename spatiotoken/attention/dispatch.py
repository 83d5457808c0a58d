"""How the ``attention`` stage gets into a model: through transformers' registry of attention functions.

The name of the model's own attention stays readable in ours (``spatiotoken_sdpa``); it computes whatever a method does
not handle. The entries are made when first used and do nothing for models that are not patched.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spatiotoken.attention.base import PrefillInputs, SparsePrefill
from spatiotoken.attention.kernels.pattern import Valid, row_slices
from spatiotoken.state import ACTIVE, Forward, RealRows

SLOT = "_spatiotoken_attention"
"""Attribute of an attention module that holds its ``SparseAttention``."""

SUPPORTED = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4")


class _NamesItsOwn:
    """An attention module whose config names the implementation that it had before: flash attention is looked up by
    the name there, and not by the function that was called."""

    def __init__(self, module: nn.Module, config: PreTrainedConfig) -> None:
        self._module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@dataclass(frozen=True)
class SparseAttention:
    """What an attention module is patched with: the method, a config with the implementation that it had before, and
    its place."""

    method: SparsePrefill
    config: PreTrainedConfig
    layer: int
    depth: int


def base_implementation(config: PreTrainedConfig) -> str:
    """The model's own attention implementation.

    Raises:
        ValueError: one whose masks are not understood; the message names those that are.
    """
    base = str(config._attn_implementation).removeprefix("spatiotoken_")
    if base not in SUPPORTED:
        raise ValueError(
            f"the attention stage does not support attn_implementation={base!r}; supported: {', '.join(SUPPORTED)}"
        )
    return base


def register(base: str) -> str:
    """The name under which attention that wraps ``base`` is registered."""
    name = f"spatiotoken_{base}"
    ALL_ATTENTION_FUNCTIONS.register(name, sparse_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def sparse_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The method where a whole long prompt is prefilled at once, the model's own attention for everything else."""
    patch: SparseAttention = module.__dict__[SLOT]
    forward = ACTIVE.get()

    def own() -> tuple[Tensor, Tensor | None]:
        # Eager attention is no entry of the registry but a function of each model's module.
        eager = sys.modules[type(module).__module__].eager_attention_forward
        base = str(patch.config._attn_implementation)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)
        caller = _NamesItsOwn(module, patch.config) if "flash" in base else module
        return function(caller, query, key, value, attention_mask, scaling=scaling, **kwargs)

    # Rows that see earlier ones in a cache (decoding, further turns, candidates of assisted decoding, all rows with a
    # static cache) are no prefill of the whole, and a caller's own mask may be anything.
    partial = query.shape[2] != key.shape[2] or kwargs.get("sliding_window") is not None
    if forward is None or forward.custom_mask or partial:
        return own()
    with forward.recorder.span("attention"):
        # Layers of one length share their mask, so that the wait for what it says is not for each layer.
        known = forward.real_rows
        if known is None or known.mask is not attention_mask or known.length != key.shape[2]:
            valid = row_bounds_of(attention_mask, key.shape[2])
            known = RealRows(attention_mask, key.shape[2], [row[:2] for row in row_slices(query, key, valid)])
            forward.real_rows = known
        rows = known.rows
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        attended = [
            patch.method.attend(
                PrefillInputs(
                    query[row, :, real],
                    key[row, :, real],
                    value[row, :, real],
                    scale,
                    patch.layer,
                    patch.depth,
                    _coordinates(forward, row, real, query.device) if "coordinates" in patch.method.needs else None,
                )
            )
            for row, real in rows
        ]
        for (_, real), one in zip(rows, attended, strict=True):
            forward.recorder.attended(patch.layer, real.stop - real.start, one.density, one.backend)
        if all(one.output is None for one in attended):
            return own()
        batch, heads, length, dim = query.shape
        first = attended[0].output
        if batch == 1 and first is not None and first.shape[1] == length:
            return first.transpose(0, 1)[None], None
        # Zeros at padding. What is dense of a mixed batch is taken from dense attention over the whole batch.
        mixed = any(one.output is None for one in attended)
        output = own()[0].clone() if mixed else query.new_zeros(batch, length, heads, dim)
        for (row, real), one in zip(rows, attended, strict=True):
            if one.output is not None:
                output[row, real] = one.output.transpose(0, 1)
    return output, None


def row_bounds_of(mask: Tensor | None, keys: int) -> Valid | None:
    """Where the tokens of each row are, from the mask of any backend; None where there is no padding to tell."""
    if mask is None:
        return None
    # The last query of a causal mask sees every key that is no padding; flash attention's masks are 2-D as they are.
    last = mask[:, 0, -1, :keys] if mask.ndim == 4 else mask[:, -keys:]
    seen = last == 0 if last.is_floating_point() else last.bool()
    start = seen.int().argmax(dim=1)
    return start, start + seen.sum(dim=1)


def _coordinates(forward: Forward, row: int, real: slice, device: torch.device) -> Tensor:
    """``[L, 4]`` of the tokens of one row that are left; negative throughout where the prompt has no pictures."""
    if forward.coordinates is None:
        return torch.full((real.stop - real.start, 4), -1, device=device)
    own = forward.coordinates[row]
    if forward.rows is not None:
        own = own[forward.rows.index[row].to(own.device)]
    return own[real].to(device)
