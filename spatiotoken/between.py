"""The ``layers`` stage: visual tokens leave the sequence, or merge, between decoder layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spatiotoken.config import PatchConfig
from spatiotoken.patches.adapter import ModelAdapter
from spatiotoken.sequence import Rows, gather_rows, joined_valid, layer_mask
from spatiotoken.state import ACTIVE, Forward
from spatiotoken.structures import LayerTokens

_QUERIES = 256
"""Query rows whose attention is held at a time."""


class BetweenLayers:
    """Runs the stage for one model.

    Raises:
        ValueError: the method needs a deeper model.
    """

    def __init__(self, adapter: ModelAdapter, language_model: Any, layers: nn.ModuleList, config: PatchConfig) -> None:
        self.adapter = adapter
        self.config = config
        self.text_config = language_model.config
        self.layers = layers
        self.prune_layers = config.layers.prune_layers(len(layers)) if config.layers else ()
        # Whether the layers before those that prune must leave their input, from which attention is computed.
        self.scores = bool(config.layers and config.layers.needs & {"attention", "received"})

    def masks(self, cache: Any, hidden: Tensor, padding: Tensor | None, first: int) -> dict[int, Any]:
        """Masks of the decoder layers from ``first`` on; they change where a method may have dropped tokens."""
        bounds = [first, *(index for index in self.prune_layers if index > first), len(self.layers)]
        masks: dict[int, Any] = {}
        for start, stop in zip(bounds, bounds[1:], strict=False):
            layer = None if cache is None else cache.layers[start]
            masks |= dict.fromkeys(range(start, stop), layer_mask(self.text_config, hidden, layer, padding))
        return masks

    def layer(self, index: int, original: Callable[..., Any], hidden_states: Tensor, **arguments: Any) -> Any:
        """The forward of decoder layer ``index``."""
        forward, hidden = ACTIVE.get(), hidden_states
        if forward is None or (forward.rows is None and not forward.masks):
            return original(hidden, **arguments)
        if forward.rows is not None:
            # They are in the position embeddings; flash attention would take gaps for borders of packed samples.
            arguments["position_ids"] = None
        arguments |= forward.overrides
        if index in self.prune_layers and forward.rows is not None:
            if self.layers[index].training and getattr(self.layers[index], "gradient_checkpointing", False):
                # Layers would be computed again later, when what they were to drop is no longer known.
                raise ValueError("gradient checkpointing does not work with a `layers` method: use `model.eval()`")
            hidden = self._prune(forward, index, hidden, arguments)
        if index in forward.masks:
            arguments["attention_mask"] = forward.masks[index]
        if index + 1 in self.prune_layers and self.scores:
            forward.scored = hidden, arguments["position_embeddings"]
        return original(hidden, **arguments)

    def _prune(self, forward: Forward, index: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Drop or merge visual tokens before decoder layer ``index``."""
        assert self.config.layers is not None and forward.rows is not None and forward.visual is not None
        # Layers of a dispatched model may be on other devices than the embeddings.
        rows, visual = forward.rows.to(hidden.device), forward.visual.to(hidden.device)
        cache = arguments.get("past_key_values")
        with forward.recorder.span("layers"):
            hidden, keep, counts = self._reduce(forward, index, cache, hidden, rows, visual)
            forward.recorder.stage("layers", self.config.layers.name, sum(forward.counts), sum(counts))
            if counts == forward.counts:
                return hidden
            lengths = [n - b + a for n, b, a in zip(rows.lengths, forward.counts, counts, strict=True)]
            forward.rows, inner = rows.narrow(keep, lengths)
            forward.counts, forward.visual = counts, (visual & keep).gather(1, inner)
            forward.since_entry = inner if forward.since_entry is None else forward.since_entry.gather(1, inner)
            forward.history.append((index, forward.rows))
            hidden = gather_rows(hidden, inner, 1)
            forward.overrides = {
                "position_embeddings": tuple(gather_rows(x, inner, 1) for x in arguments["position_embeddings"])
            }
            arguments |= forward.overrides
            forward.masks = self.masks(cache, hidden, forward.rows.padding, index)
            forward.recorder.layer_lengths[index:] = [lengths] * (len(self.layers) - index)
        return hidden

    def _reduce(
        self, forward: Forward, index: int, cache: Any, hidden: Tensor, rows: Rows, visual: Tensor
    ) -> tuple[Tensor, Tensor, list[int]]:
        """``hidden`` with merged values, ``[B, K]`` True at the rows that stay, and how many visual ones of each sample
        these are."""
        method = self.config.layers
        assert method is not None
        attention, received = self._scores(forward, index, cache, rows)
        keep, counts = torch.ones_like(visual), list(forward.counts)
        order = visual.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        merged = hidden
        for sample, count in enumerate(forward.counts):
            if not count:
                continue
            places = order[sample, :count]
            coordinates = None
            if forward.coordinates is not None:
                coordinates = forward.coordinates[sample].to(hidden.device)[rows.index[sample, places]]
            left = method.reduce(
                LayerTokens(
                    layer=index,
                    num_initial=forward.initial[sample],
                    attention=None if attention is None else attention[sample][:, places],
                    received=None if received is None else functools.partial(_of_sample, received, sample, places),
                    hidden=hidden[sample, places] if "hidden" in method.needs else None,
                    coordinates=coordinates,
                    depth=len(self.layers),
                ),
                forward.memory.get(sample),
            )
            forward.memory[sample] = left.memory
            counts[sample] = left.kept.shape[0]
            if counts[sample] == count:
                continue
            keep[sample, places] = False
            keep[sample, places[left.kept]] = True
            if left.hidden is not None:
                batch = torch.full_like(left.kept, sample)
                merged = merged.index_put((batch, places[left.kept]), left.hidden.to(hidden.dtype))
            if left.assignment is not None:
                absorbed = left.assignment >= 0
                into = places[left.kept][left.assignment[absorbed]]
                forward.absorbed.append((sample, rows.index[sample, places[absorbed]], rows.index[sample, into]))
        return merged, keep, counts

    def _scores(
        self, forward: Forward, index: int, cache: Any, rows: Rows
    ) -> tuple[Tensor | None, Callable[[], Tensor] | None]:
        """Weights ``[B, heads, K]`` that the last token gave each row in the layer before, and what makes the mean
        ``[B, K]`` that each row got there; None where the method does not ask for it."""
        assert self.config.layers is not None
        wanted = self.config.layers.needs & {"attention", "received"}
        if not wanted or forward.scored is None:  # nothing is before the first layer
            return None, None
        hidden, position_embeddings = forward.scored
        forward.scored = None
        length, keys, seen = hidden.shape[1], None, rows.padding
        layer = None if cache is None else cache.layers[index - 1]
        if layer is not None and layer.is_initialized:
            # The rows of this pass are in that layer's cache already, but not yet on its record.
            keys, seen = layer.keys, joined_valid(layer.valid, layer.keys.shape[2] - length, rows.padding, length)

        def weights(query_rows: Tensor) -> Tensor:
            return self.adapter.attention_rows(
                self.layers[index - 1], hidden, query_rows, position_embeddings, keys, seen
            )[..., -length:]

        @functools.cache
        def received() -> Tensor:
            got = hidden.new_zeros(hidden.shape[:2], dtype=torch.float32)
            for queries in torch.arange(length, device=hidden.device).expand(hidden.shape[0], -1).split(_QUERIES, 1):
                # Padding asks nothing; what it gives, which may be NaN, is left out.
                given = weights(queries).mean(dim=1).masked_fill(~rows.valid.gather(1, queries)[..., None], 0)
                got += given.sum(dim=1)
            return got / torch.tensor(rows.lengths, device=hidden.device)[:, None]

        attention = None
        if "attention" in wanted:
            last = [[length - 1 if rows.left else n - 1] for n in rows.lengths]
            attention = weights(torch.tensor(last, device=hidden.device))[:, :, 0]
        return attention, received if "received" in wanted else None

    def deepstack(self, original: Callable[..., Any], hidden: Tensor, pictures: Tensor, features: Tensor) -> Any:
        """Adding features of the tower to hidden states, which may have become shorter since the entry."""
        forward = ACTIVE.get()
        if forward is None or forward.since_entry is None or forward.rows is None:
            return original(hidden, pictures, features)
        length = pictures.shape[1]
        # Padding rows are sent to a column of their own.
        entry = torch.where(forward.rows.valid, forward.since_entry, length)
        present = pictures.new_zeros(pictures.shape[0], length + 1).scatter_(1, entry, True)[:, :length]
        here = gather_rows(pictures, forward.since_entry, 1) & forward.rows.valid
        return original(hidden, here, features[present[pictures]])


def _of_sample(received: Callable[[], Tensor], sample: int, places: Tensor) -> Tensor:
    return received()[sample, places]
