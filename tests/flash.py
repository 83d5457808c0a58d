"""Flash attention where there is none: its two functions in plain torch, reached through transformers' own code.

Transformers hands a flash kernel other masks than sdpa, leaves padding out, and takes a prompt whose position ids have
gaps for several that were packed: all that is as on a GPU. What the kernel computes, and how fast, nothing here tells.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_flash_attention_utils

NAME = "flash_attention_2"


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """``[B, Q, heads, d]``; a causal mask ends at the last key."""
    assert dropout_p == 0 and window_size == (-1, -1) and softcap == 0
    queries, keys = q.shape[1], k.shape[1]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if causal else None
    return torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen, scale=softmax_scale, enable_gqa=True
    ).transpose(1, 2)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """``[rows, heads, d]``: sequences one after the other, each by itself."""
    lengths = [cu_seqlens.diff().tolist() for cu_seqlens in (cu_seqlens_q, cu_seqlens_k)]
    assert max(lengths[0]) <= max_seqlen_q and max(lengths[1]) <= max_seqlen_k
    settings = (dropout_p, softmax_scale, causal, window_size, softcap, deterministic)
    parts = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
    return torch.cat([flash_attn_func(*(x[None] for x in part), *settings)[0] for part in parts])


@contextmanager
def flash_attention(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The model's attention, in its tower too, is flash attention meanwhile."""
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    vars(package).update(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func, flash_attn_with_kvcache=None
    )
    vars(padding).update(
        pad_input=modeling_flash_attention_utils._pad_input, unpad_input=modeling_flash_attention_utils._unpad_input
    )
    before = model.config._attn_implementation
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", package)
        patch.setitem(sys.modules, "flash_attn.bert_padding", padding)
        patch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda: True)
        patch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
        try:
            model.config._attn_implementation = NAME
            yield
        finally:
            model.config._attn_implementation = before
