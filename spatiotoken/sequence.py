"""Keeping some rows of a padded batch: which rows, how they are gathered, and caches that know they are shorter.

Vocabulary: a *row* is one place of one sample's sequence. Sequences have an *original* length (what the tokenizer and
``generate`` count) and a *physical* one (rows that are really computed or cached).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask

from spatiotoken.state import ACTIVE

if TYPE_CHECKING:
    from spatiotoken.revival import LooseRows

DROPPED = (float("-inf"), float("inf"), float("-inf"), float("inf"))
"""First values of the embedding of a dropped token.

The mark travels inside the embeddings, because between the projector and the language model transformers may convert,
repeat (beam search), slice (chunked prefill) or hand over features in a call of its own; no value that a network
computes looks like it.
"""


def mark_dropped(embeddings: Tensor, keep: Tensor) -> Tensor:
    """``embeddings [N, D]`` with the mark written over the rows where ``keep [N]`` is False."""
    mark = embeddings.new_tensor(DROPPED)
    marked = embeddings.clone()
    marked[:, : len(DROPPED)] = torch.where(keep[:, None], embeddings[:, : len(DROPPED)], mark)
    return marked


def kept_rows(embeddings: Tensor) -> Tensor:
    """``[B, L]`` bool, False at the rows of ``embeddings [B, L, D]`` that carry the mark."""
    return (embeddings[..., : len(DROPPED)] != embeddings.new_tensor(DROPPED)).any(dim=-1)


def without_marks(embeddings: Tensor, dim: int) -> Tensor:
    """``embeddings``, of any shape that holds rows of ``dim`` values, with zeros in the rows that carry the mark."""
    rows = embeddings.reshape(1, -1, dim)
    return rows.masked_fill(~kept_rows(rows)[..., None], 0).view_as(embeddings)


def compact_index(keep: Tensor, length: int, *, left: bool) -> Tensor:
    """``[B, length]``: which rows of ``keep [B, L]`` come first to last, in order, padded on one side.

    Args:
        length: at least the largest number of kept rows of a sample.
        left: pad on the left. Padding points at rows that are not kept.
    """
    order = keep.to(torch.uint8).argsort(dim=1, descending=not left, stable=True)
    return order[:, keep.shape[1] - length :] if left else order[:, :length]


def gather_rows(values: Tensor, index: Tensor, dim: int) -> Tensor:
    """Rows ``index [B, K]`` of ``values [..., B or 1, L, ...]``, whose rows are along ``dim`` and samples before it."""
    dim = dim % values.ndim
    shape = [1] * values.ndim
    shape[dim - 1], shape[dim] = index.shape
    target = list(values.shape)
    target[dim - 1], target[dim] = index.shape
    source = list(values.shape)
    source[dim - 1] = index.shape[0]
    return values.expand(source).gather(dim, index.view(shape).expand(target))


def restore_rows(values: Tensor, rows: Rows, length: int, tail: int) -> Tensor:
    """Put ``values [B, K, D]`` back at the last ``tail`` of ``length`` original rows; dropped rows are zero."""
    rows = rows.to(values.device)
    inverse = rows.index.new_full((rows.index.shape[0], length + 1), -1)
    # Padding rows are sent to a column of their own, so that they overwrite nothing.
    place = torch.where(rows.valid, rows.index, length)
    inverse.scatter_(1, place, torch.arange(rows.index.shape[1], device=rows.index.device).expand_as(rows.index))
    wanted = inverse[:, length - tail : length]
    return gather_rows(values, wanted.clamp(min=0), 1).masked_fill(wanted[..., None] < 0, 0)


@dataclass
class Rows:
    """The rows of a batch that are still there.

    Attributes:
        index: ``[B, K]`` original row of each.
        valid: ``[B, K]`` False at padding.
        lengths: number of valid rows of each sample.
        left: padding is on the left.
    """

    index: Tensor
    valid: Tensor
    lengths: list[int]
    left: bool

    def slice_of(self, sample: int) -> slice:
        """Where the valid rows of a sample are."""
        size, length = self.index.shape[1], self.lengths[sample]
        return slice(size - length, size) if self.left else slice(0, length)

    def places_of(self, fewer: Rows, length: int) -> Tensor:
        """``[B, K']`` where the rows of ``fewer``, a part of these, are among these; padding points anywhere.

        Args:
            length: number of original rows.
        """
        inverse = self.index.new_zeros(self.index.shape[0], length + 1)
        place = torch.where(self.valid, self.index, length)
        inverse.scatter_(1, place, torch.arange(self.index.shape[1], device=place.device).expand_as(place))
        return inverse.gather(1, fewer.index)

    def to(self, device: torch.device) -> Rows:
        return replace(self, index=self.index.to(device), valid=self.valid.to(device))

    @property
    def all_valid(self) -> bool:
        return min(self.lengths) == self.index.shape[1]

    @property
    def padding(self) -> Tensor | None:
        """``valid``, or None where there is no padding: what needs no mask gets none."""
        return None if self.all_valid else self.valid

    def narrow(self, keep: Tensor, lengths: list[int]) -> tuple[Rows, Tensor]:
        """What is left where ``keep [B, K]`` is True, and the ``[B, K']`` index that gathers it from these rows."""
        inner = compact_index(keep & self.valid, max(lengths), left=self.left)
        rows = Rows(self.index.gather(1, inner), (keep & self.valid).gather(1, inner), lengths, self.left)
        return rows, inner


class LogicalLayer(DynamicLayer):
    """A cache layer that reports the original length of the conversation while it holds fewer rows.

    ``generate`` slices prompts and counts positions by ``get_seq_length``; masks are made from ``get_mask_sizes``,
    which describes the cached rows as the latest ones, as sliding-window layers do. So a conversation goes on by
    ``generate(..., past_key_values=cache)`` like an unpruned one.

    Attributes:
        dropped: how many rows shorter than the conversation it is.
        appended: rows that came since rows were last dropped.
        in_place: ``[B, K]`` of the pass that dropped rows, True where a row is as far from the end as it was.
        uneven: other layers of the cache hold more or fewer rows.
        valid: ``[B, physical_length]`` False at padding; None if there is none.
        shift: ``[B]`` how far positions, numbered anew, are behind those of the whole conversation; None where they
            were kept. On a cache's first layer only.

    Where a method brings tokens back (``revival``):
        order: ``[B, physical_length]`` the place of each row in the conversation.
        aside: what was dropped before this layer; None if nothing was.
        droppable: ``[B, L]`` the places of the visual tokens that may go and come; on the first layer that prunes only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dropped = 0
        self.appended = 0
        self.in_place: Tensor | None = None
        self.uneven = False
        self.valid: Tensor | None = None
        self.shift: Tensor | None = None
        self.order: Tensor | None = None
        self.aside: LooseRows | None = None
        self.droppable: Tensor | None = None

    @property
    def physical_length(self) -> int:
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        return self.physical_length + self.dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if (self.valid is not None or self.uneven) and ACTIVE.get() is None:
            # The mask of the conversation says neither where the padding is now nor how long each layer is.
            raise RuntimeError(
                "this KV cache was made by a patched model, from a padded batch or with layers of different lengths: "
                "patch the model to go on"
            )
        return self.physical_length + query_length, self.dropped

    def keep(self, brought: int, places: Tensor) -> None:
        """Of the ``brought`` rows that came last, and are not on record yet, keep those at ``places [B, K']``."""
        assert self.keys is not None and self.values is not None
        past, heads = self.physical_length - brought, self.keys.shape[1]
        index = places.repeat_interleave(heads, dim=0)

        def kept(states: Tensor) -> Tensor:
            new = gather_rows(states[:, :, past:].flatten(0, 1), index, 1).unflatten(0, (-1, heads))
            return torch.cat([states[:, :, :past], new], dim=2)

        self.keys, self.values = kept(self.keys), kept(self.values)

    def record(self, original: int, rows: Rows, ordered: bool = False) -> None:
        """Note that ``original`` rows came in, of which ``rows`` are cached.

        Args:
            ordered: note their places in the conversation from now on.
        """
        kept = rows.index.shape[1]
        if ordered and self.order is None and not self.dropped:
            past = torch.arange(self.physical_length - kept, device=rows.index.device)
            self.order = past.expand(rows.index.shape[0], -1)
        self.append(kept, rows.padding, rows.index)
        if kept < original:
            self.dropped += original - kept
            self.appended = 0
            distance = torch.arange(original - kept, original, device=rows.index.device)
            self.in_place = (rows.index == distance) & rows.valid

    def append(self, new: int, valid: Tensor | None, index: Tensor | None = None) -> None:
        """Note that ``new`` rows came in and are cached, ``valid [B, new]`` of them no padding.

        Args:
            index: ``[B, new]`` which of the rows that came in these are; None for all.
        """
        past = self.physical_length - new
        if self.order is not None:
            if index is None:
                index = torch.arange(new, device=self.order.device).expand(self.order.shape[0], -1)
            self.order = torch.cat([self.order, index + past + self.dropped], dim=1)
        self.valid = joined_valid(self.valid, past, valid, new)
        self.appended += new

    def come_back(self, order: Tensor, valid: Tensor) -> None:
        """Note that rows which had been dropped are cached now, behind all others: their places in the conversation,
        and which are no padding, ``[B, R]`` each."""
        assert self.order is not None and self.keys is not None and self.values is not None
        new = order.shape[1]
        self.valid = joined_valid(self.valid, self.physical_length - new, valid, new)
        self.order = torch.cat([self.order, order], dim=1)
        self.dropped -= new
        # The latest tokens are no longer the last rows.
        self.appended, self.in_place = 0, torch.zeros_like(valid[:, :1])
        if self.dropped < 0:
            # Samples wanted theirs at different steps, and were padded for each other.
            assert self.valid is not None
            index = compact_index(self.valid, int(self.valid.sum(dim=1).max()), left=True)
            self.dropped += self.valid.shape[1] - index.shape[1]
            self.valid, self.order = self.valid.gather(1, index), self.order.gather(1, index)
            heads = index.repeat_interleave(self.keys.shape[1], dim=0)
            self.keys, self.values = (
                gather_rows(states.flatten(0, 1), heads, 1).unflatten(0, states.shape[:2])
                for states in (self.keys, self.values)
            )

    def croppable(self) -> int:
        """How many rows can be taken off the end as if nothing had been dropped."""
        if self.in_place is None:
            return self.physical_length
        return self.appended + int(self.in_place.flip(1).long().cumprod(1).sum(1).min())

    def attention_mask(self, new_valid: Tensor | None, num_new: int) -> Tensor | None:
        """2-D mask over the original length plus ``num_new`` queries, as transformers wants it; None if all is seen."""
        seen = joined_valid(self.valid, self.physical_length, new_valid, num_new)
        return None if seen is None else torch.nn.functional.pad(seen, (self.dropped, 0), value=True)

    def reset(self) -> None:
        super().reset()
        # transformers 5.17 only overwrites the values with zeros.
        self.keys = self.values = None
        self.is_initialized = False
        self.dropped = self.appended = 0
        self.valid = self.in_place = self.shift = self.order = self.aside = self.droppable = None
        self.uneven = False

    def crop(self, tokens_to_remove: int) -> None:
        if self.in_place is not None and abs(tokens_to_remove) > (most := self.croppable()):
            raise ValueError(f"cannot crop {abs(tokens_to_remove)} tokens: only the last {most} are whole")
        super().crop(tokens_to_remove)
        if self.order is not None:
            self.order = self.order[:, : self.physical_length]
        if self.valid is not None:
            self.valid = self.valid[:, : self.physical_length]
        self.appended -= abs(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_samples(lambda valid: valid.index_select(0, beam_idx.to(valid.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_samples(lambda valid: valid.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_samples(lambda valid: valid[indices, ...])

    def _map_samples(self, function: Callable[[Tensor], Tensor]) -> None:
        self.valid = None if self.valid is None else function(self.valid)
        self.in_place = None if self.in_place is None else function(self.in_place)
        self.shift = None if self.shift is None else function(self.shift)
        self.order = None if self.order is None else function(self.order)
        self.aside = None if self.aside is None else self.aside.map(function)
        self.droppable = None if self.droppable is None else function(self.droppable)


def is_logical(cache: Any) -> bool:
    """Whether ``cache`` was made shorter (or ready to be) by ``with_logical_layers``."""
    return isinstance(cache, Cache) and bool(cache.layers) and isinstance(cache.layers[0], LogicalLayer)


def with_logical_layers(cache: Cache | None, config: PreTrainedConfig, valid: Tensor | None) -> DynamicCache:
    """``cache`` (a new one if None) whose layers are all ``LogicalLayer``, changed in place.

    Args:
        valid: ``[B, cached rows]`` False at padding, for rows that are in the cache already; None if there is none.

    Raises:
        ValueError: for caches other than ``DynamicCache`` with full attention; the message names the kind.
    """
    if cache is None:
        cache = DynamicCache(config=config)
    if is_logical(cache):
        return cache  # type: ignore[return-value]
    offloaded = " (offloaded)" if getattr(cache, "offloading", False) else ""
    if type(cache) is not DynamicCache or offloaded:
        raise ValueError(_unsupported_cache(type(cache).__name__ + offloaded))
    for position, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer:
            raise ValueError(_unsupported_cache(f"a {type(layer).__name__} at layer {position}"))
    layers: list[Any] = [LogicalLayer() for _ in range(config.num_hidden_layers)]
    for new, old in zip(layers, cache.layers, strict=False):
        new.__dict__.update(old.__dict__)
        new.valid = valid
    cache.layers = layers
    return cache


def joined_valid(past: Tensor | None, num_past: int, new: Tensor | None, num_new: int) -> Tensor | None:
    """``[B, num_past + num_new]`` of two validity masks, None standing for one without padding."""
    if past is not None:
        new = past.new_ones(past.shape[0], num_new) if new is None else new
    elif new is not None:
        past = new.new_ones(new.shape[0], num_past)
    else:
        return None
    return torch.cat([past, new], dim=1)


def layer_mask(
    config: PreTrainedConfig, hidden: Tensor, layer: LogicalLayer | None, valid: Tensor | None
) -> Tensor | Any | None:
    """The causal mask of one decoder layer, in the form that the model's attention wants.

    Args:
        hidden: ``[B, K, D]``, what is about to enter the layer.
        layer: its cache, or None without one.
        valid: ``[B, K]`` False at padding, None if there is none.
    """
    if layer is None:
        # An explicit mask: without one, gaps between position ids would be taken for borders of packed samples.
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device) if valid is None else valid
        return create_causal_mask(config, hidden, mask, past_key_values=None)
    seen = layer.attention_mask(valid, hidden.shape[1])
    return create_causal_mask(config, hidden, seen, past_key_values=_OneLayer(layer))  # type: ignore[arg-type]


class _OneLayer:
    """What ``create_causal_mask`` asks a cache, answered by a single layer."""

    is_compileable = False

    def __init__(self, layer: LogicalLayer) -> None:
        self._layer = layer

    def get_query_offset(self, layer_idx: int) -> int:
        return self._layer.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._layer.get_mask_sizes(query_length)


def _unsupported_cache(kind: str) -> str:
    return (
        f"token reduction does not support this KV cache: {kind}; supported: DynamicCache with full-attention layers, "
        "not offloaded (the default of `generate`)"
    )
