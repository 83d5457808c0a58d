"""How the ``attention`` stage gets into a model: through transformers' registry of attention functions.

The name of the model's own attention stays readable in ours (``spatiotoken_sdpa``); it computes whatever a method does
not handle. The entries are made when first used and do nothing for models that are not patched.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spatiotoken.attention.base import SparsePrefill
from spatiotoken.state import ACTIVE

SLOT = "_spatiotoken_attention"
"""Attribute of an attention module that holds its ``SparseAttention``."""

SUPPORTED = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4")


@dataclass(frozen=True)
class SparseAttention:
    """What an attention module is patched with: the method, and the implementation it had before."""

    method: SparsePrefill
    base: str


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
    queries, keys = query.shape[2], key.shape[2]
    # Rows that see earlier ones in a cache (decoding, further turns, candidates of assisted decoding, all rows with a
    # static cache) are no prefill of the whole, and a caller's own mask may be anything.
    partial = queries != keys or kwargs.get("sliding_window") is not None
    if forward is None or forward.custom_mask or partial or patch.method.is_dense(queries, keys):
        # Eager attention is no entry of the registry but a function of each model's module.
        eager = sys.modules[type(module).__module__].eager_attention_forward
        own = ALL_ATTENTION_FUNCTIONS.get_interface(patch.base, eager)
        return own(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    with forward.recorder.span("attention"):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = patch.method.attend(query, key, value, key_valid(attention_mask, key.shape[2]), scale)
    return output.transpose(1, 2).contiguous(), None


def key_valid(mask: Tensor | None, keys: int) -> Tensor | None:
    """``[B, keys]`` False at padding, from the mask of any backend; None where there is no padding to tell."""
    if mask is None:
        return None
    # The last query of a causal mask sees every key that is no padding; flash attention's masks are 2-D as they are.
    last = mask[:, 0, -1, :keys] if mask.ndim == 4 else mask[:, -keys:]
    return last == 0 if last.is_floating_point() else last.bool()
