"""Dropped tokens that come back: their hidden states wait beside the KV cache, and decoding computes those it wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from spatiotoken.layers.base import LayerReducer
from spatiotoken.patches.adapter import ModelAdapter
from spatiotoken.sequence import LogicalLayer, Rows, compact_index, gather_rows, joined_valid, layer_mask
from spatiotoken.state import Forward
from spatiotoken.structures import LayerTokens

SUPPORTED = ("sdpa", "eager")
"""Attention that takes a mask of any shape: what comes back stands behind later tokens in the cache."""
ROWS = 256
"""Rows that are computed at a time, each with a mask over all keys."""


@dataclass(frozen=True)
class LooseRows:
    """Rows of a batch before some decoder layer, outside of the sequence.

    Attributes:
        hidden: ``[B, R, D]``.
        cos, sin: ``[B, R, d]`` their position embeddings.
        order: ``[B, R]`` their places in the conversation.
        valid: ``[B, R]`` False at padding.
    """

    hidden: Tensor
    cos: Tensor
    sin: Tensor
    order: Tensor
    valid: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> LooseRows:
        return LooseRows(*(function(getattr(self, field.name)) for field in fields(self)))

    def where(self, mask: Tensor) -> LooseRows | None:
        """Those at ``mask [B, R]``, None if there are none. Waits for the device."""
        mask = mask & self.valid
        count = int(mask.sum(dim=1).max()) if mask.shape[1] else 0
        if not count:
            return None
        index = compact_index(mask, count, left=True)
        return replace(self.map(lambda values: gather_rows(values, index, 1)), valid=mask.gather(1, index))

    def sorted(self) -> LooseRows:
        """Those of each sample in the order of the conversation."""
        index = self.order.argsort(dim=1, stable=True)
        return self.map(lambda values: gather_rows(values, index, 1))

    def parts(self) -> Iterator[LooseRows]:
        for start in range(0, self.order.shape[1], ROWS):
            yield self.map(lambda values: values[:, start : start + ROWS])  # noqa: B023 - called at once

    def among(self, wanted: Tensor) -> Tensor:
        """``[B, R]`` True at rows whose place is ``wanted [B, L]``."""
        return wanted.to(self.order.device).gather(1, self.order)


def joined(one: LooseRows | None, other: LooseRows | None) -> LooseRows | None:
    """The rows of both."""
    if one is None or other is None:
        return one if other is None else other
    device = one.order.device  # the other may come from a layer on another one
    pairs = ((getattr(one, field.name), getattr(other, field.name).to(device)) for field in fields(LooseRows))
    return LooseRows(*(torch.cat(pair, dim=1) for pair in pairs))


def loose_mask(rows: LooseRows, layer: LogicalLayer) -> Tensor:
    """``[B, 1, R, K + R]`` additive mask of ``rows`` over what ``layer`` holds and themselves: causal in the order of
    the conversation, which is not that of the cache."""
    assert layer.order is not None
    order = torch.cat([layer.order, rows.order], dim=1)
    count = rows.order.shape[1]
    seen = joined_valid(layer.valid, order.shape[1] - count, rows.valid, count)
    assert seen is not None
    visible = (order[:, None] <= rows.order[:, :, None]) & seen[:, None]
    # Padding sees itself, for a row of nothing is not a number.
    visible[:, :, -count:] |= torch.eye(count, dtype=torch.bool, device=visible.device)
    mask = rows.hidden.new_zeros(visible.shape)
    return mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)[:, None]


class Revival:
    """Brings back what a method would now keep, for one model.

    Raises:
        ValueError: the model's attention does not take the masks that this needs.
    """

    def __init__(self, adapter: ModelAdapter, layers: nn.ModuleList, method: LayerReducer, config: Any) -> None:
        attention = str(config._attn_implementation).removeprefix("spatiotoken_")
        if attention not in SUPPORTED:
            raise ValueError(
                f"layers.revive: does not work with attn_implementation={attention!r}; supported: "
                f"{', '.join(SUPPORTED)}; `revive: false` works with any"
            )
        self.adapter, self.layers, self.method, self.config = adapter, layers, method, config
        self.prune_layers = method.prune_layers(len(layers))

    def mark(self, cache: Any, index: int, visual: Tensor, rows: Rows) -> None:
        """Remember which of a prompt's tokens may go and come, ``visual [B, K]``; at the first layer that prunes."""
        if cache is not None and index == self.prune_layers[0]:
            layer: LogicalLayer = cache.layers[index]
            past = layer.get_seq_length()
            droppable = visual.new_zeros(visual.shape[0], past + int(rows.index.max()) + 1)
            if layer.droppable is not None:
                droppable[:, : layer.droppable.shape[1]] = layer.droppable
            layer.droppable = droppable.scatter(1, rows.index + past, visual & rows.valid)

    def set_aside(
        self, cache: Any, index: int, hidden: Tensor, positions: tuple[Tensor, Tensor], rows: Rows, dropped: Tensor
    ) -> None:
        """Keep what is dropped before decoder layer ``index``, ``dropped [B, K]``, of its input ``hidden``."""
        if cache is None:
            return
        layer: LogicalLayer = cache.layers[index]
        cos, sin = (x.to(hidden.device).expand(hidden.shape[0], -1, -1) for x in positions)
        here = LooseRows(hidden, cos, sin, rows.index + layer.get_seq_length(), rows.valid)
        layer.aside = joined(layer.aside, here.where(dropped))

    def step(
        self, forward: Forward, index: int, original: Callable[..., Any], hidden: Tensor, arguments: dict[str, Any]
    ) -> None:
        """Before ``hidden``, new rows of a conversation, enter decoder layer ``index``: compute there what is back."""
        cache = arguments["past_key_values"]
        if index in self.prune_layers:
            self._choose(forward, index, cache)
        rows, layer = forward.loose, cache.layers[index]
        if rows is None:
            return
        rows = rows.map(lambda values: values.to(layer.keys.device))
        outputs = []
        for part in rows.parts():  # earlier ones first: later ones see them in the cache
            theirs = {"attention_mask": loose_mask(part, layer), "position_embeddings": (part.cos, part.sin)}
            outputs.append(original(part.hidden, **arguments | theirs | {"position_ids": None}))
            layer.come_back(part.order, part.valid)
        forward.loose = replace(rows, hidden=torch.cat(outputs, dim=1))
        forward.masks[index] = layer_mask(self.config, hidden, layer, forward.padding)

    def _choose(self, forward: Forward, index: int, cache: Any) -> None:
        """What of the waiting rows goes on from decoder layer ``index``, and what waits there from now on."""
        scored, forward.scored = forward.scored, None
        before, here, loose = cache.layers[index - 1], cache.layers[index], forward.loose
        if scored is None or before.order is None or (here.aside is None and loose is None):
            return
        wanted = self._wanted(scored, index, before, cache.layers[self.prune_layers[0]].droppable, forward.padding)
        forward.loose = None
        if loose is not None:
            stays = loose.among(wanted)
            forward.loose, back = loose.where(stays), loose.where(~stays)
            here.aside = joined(here.aside, back)
        if here.aside is not None:
            stays = here.aside.among(wanted)
            forward.loose = joined(forward.loose, coming := here.aside.where(stays))
            if coming is not None:
                here.aside = here.aside.where(~stays)
        if forward.loose is not None:
            forward.loose = forward.loose.sorted()

    def _wanted(
        self,
        scored: tuple[Tensor, tuple[Tensor, Tensor]],
        index: int,
        before: LogicalLayer,
        droppable: Tensor,
        padding: Tensor | None,
    ) -> Tensor:
        """``[B, L]`` True at the places of what the method keeps of all that decoder layer ``index - 1`` holds."""
        assert before.keys is not None and before.order is not None
        device, new = before.keys.device, scored[0].shape[1]
        past, hidden = before.keys.shape[2] - new, scored[0].to(device)
        positions = scored[1][0].to(device), scored[1][1].to(device)
        last = torch.full((hidden.shape[0], 1), new - 1, device=device)
        if padding is not None:
            padding = padding.to(device)
            last = (padding * torch.arange(new, device=device)).amax(dim=1, keepdim=True)
        seen = joined_valid(before.valid, past, padding, new)
        layer = self.layers[index - 1]
        weights = self.adapter.attention_rows(layer, hidden, last, positions, before.keys, seen)[:, :, 0, :past]
        droppable, width = droppable.to(device), droppable.shape[1]
        order = before.order.to(device)
        visual = droppable.gather(1, order.clamp(max=width - 1)) & (order < width)
        if before.valid is not None:
            visual &= before.valid.to(device)
        # In the order of the conversation, so that ties go to the first.
        places = order.where(visual, torch.iinfo(order.dtype).max).argsort(dim=1, stable=True)
        wanted = torch.zeros_like(droppable)
        counts = torch.stack([visual.sum(dim=1), droppable.sum(dim=1)]).tolist()
        for sample, (count, initial) in enumerate(zip(*counts, strict=True)):
            if count:
                own = places[sample, :count]
                tokens = LayerTokens(index, initial, attention=weights[sample][:, own], depth=len(self.layers))
                wanted[sample, order[sample, own[self.method.reduce(tokens, None).kept]]] = True
        return wanted
