"""The vision tower as it is, in fewer calls: the same values, but for rounding.

Transformers' Qwen-VL towers call SDPA once for each window or frame, in a Python loop. To attention functions that have
"flash" in their names they hand over all windows at once, with their bounds: so ours has it in its name, and makes one
call of all chunks of a length. CLIP and SigLIP towers run frames in parts, so that memory does not grow with the number
of frames by the hidden states of all layers, of which one is read; layers behind it are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PACKED = "spatiotoken_flash_packed"
"""Name of the attention function of packed towers; nothing of flash attention is used."""
FRAMES = 32
"""Frames that a CLIP or SigLIP tower runs at a time."""


def chunk_rows(bounds: Sequence[int], device: torch.device) -> list[Tensor | tuple[int, int]]:
    """Chunks of each length that there is: which rows ``[chunks, length]`` they have.

    Chunks of one length throughout, one behind the other, are ``(chunks, length)`` instead: nothing has to be gathered.
    """
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    if len(set(lengths)) == 1:
        return [(len(lengths), lengths[0])]
    groups: dict[int, list[int]] = {}
    for start, length in zip(bounds, lengths, strict=False):
        if length:  # windows may be empty
            groups.setdefault(length, []).append(start)
    return [
        torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)
        for length, starts in groups.items()
    ]


def chunked_attention(
    query: Tensor, key: Tensor, value: Tensor, chunks: Sequence[Tensor | tuple[int, int]], scale: float
) -> Tensor:
    """``[1, N, heads, d]`` attention within chunks of ``[1, heads, N, d]``."""
    if isinstance(chunks[0], tuple):
        query, key, value = (states[0].unflatten(1, chunks[0]).transpose(0, 1) for states in (query, key, value))
        mixed = scaled_dot_product_attention(query, key, value, scale=scale)
        return mixed.transpose(1, 2).flatten(0, 1)[None]
    output = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
    for rows in chunks:
        assert isinstance(rows, Tensor)
        q, k, v = (states[0][:, rows].transpose(0, 1) for states in (query, key, value))
        output[rows] = scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    return output[None]


class PackedTower:
    """Attention of one tower, which knows how its latest inputs are cut into chunks."""

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, list[Tensor | tuple[int, int]]]] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float) -> Tensor:
        return chunked_attention(query, key, value, self._chunks(bounds), scale)

    def _chunks(self, bounds: Tensor) -> list[Tensor | tuple[int, int]]:
        for known, chunks in self._known:
            if known is bounds:
                return chunks
        chunks = chunk_rows(bounds.tolist(), bounds.device)
        # Layers take turns between windows and whole frames.
        self._known = [*self._known[-1:], (bounds, chunks)]
        return chunks


SLOT = "_spatiotoken_packed"
"""Attribute of a tower's attention modules that holds their ``PackedTower``."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls with all chunks at once."""
    tower: PackedTower = module.__dict__[SLOT]
    return tower.attend(query, key, value, cu_seq_lens_q, scaling), None


def register_packed() -> str:
    """The name under which packed attention is registered."""
    ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)
    return PACKED


def in_parts(original: Callable[..., Any], read: Sequence[int], pixel_values: Tensor, **arguments: Any) -> Any:
    """A CLIP or SigLIP tower, ``FRAMES`` frames at a time; of the hidden states only those that are ``read``."""
    outputs = []
    for part in pixel_values.split(FRAMES):
        output = original(pixel_values=part, **arguments)
        if output.hidden_states is not None:
            # At once, so that those of the next part take their place in memory.
            output["hidden_states"] = _only(output.hidden_states, read)
        outputs.append(output)
    whole = outputs[0]
    for name in ("last_hidden_state", "pooler_output"):
        if getattr(whole, name, None) is not None:
            whole[name] = torch.cat([output[name] for output in outputs])
    if whole.hidden_states is not None:
        parts = zip(*(output.hidden_states for output in outputs), strict=True)
        whole["hidden_states"] = tuple(None if states[0] is None else torch.cat(states) for states in parts)
    return whole


def _only(states: Sequence[Tensor], read: Sequence[int]) -> tuple[Tensor | None, ...]:
    """In their places, which may be counted from the end."""
    kept = {index % len(states) for index in read}
    return tuple(state if index in kept else None for index, state in enumerate(states))


def skipped(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """In place of a layer whose output nobody reads."""
    return hidden_states
