"""The ``layers`` stage: visual tokens leave the sequence, or merge, between decoder layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spatiotoken.config import PatchConfig
from spatiotoken.patches.adapter import ModelAdapter
from spatiotoken.revival import Revival
from spatiotoken.sequence import Rows, gather_rows, joined_valid, layer_mask
from spatiotoken.state import ACTIVE, Forward
from spatiotoken.structures import LayerTokens

_QUERIES = 256
"""Query rows whose attention is held at a time."""


class BetweenLayers:
    """Runs the stage for one model.

    Raises:
        ValueError: the method needs a deeper model, or other attention.
    """

    def __init__(self, adapter: ModelAdapter, language_model: Any, layers: nn.ModuleList, config: PatchConfig) -> None:
        self.adapter = adapter
        self.config = config
        self.text_config = language_model.config
        self.layers = layers
        self.prune_layers = config.layers.prune_layers(len(layers)) if config.layers else ()
        # Whether the layers before those that prune must leave their input, from which attention is computed.
        self.scores = bool(config.layers and config.layers.needs & {"attention", "received", "weights"})
        self.observed_layers = config.layers.observed_layers(len(layers)) if config.layers else ()
        self.revival = None
        if config.layers and config.layers.revives():
            self.revival = Revival(adapter, layers, config.layers, self.text_config)

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
        if revives := self.revival is not None and forward.rows is None:
            self.revival.step(forward, index, original, hidden, arguments)
        if index in forward.masks:
            arguments["attention_mask"] = forward.masks[index]
        if index + 1 in self.prune_layers and self.scores and (revives or forward.rows is not None):
            forward.scored = hidden, arguments["position_embeddings"]
        return original(hidden, **arguments)

    def _prune(self, forward: Forward, index: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Drop or merge visual tokens before decoder layer ``index``."""
        assert self.config.layers is not None and forward.rows is not None and forward.visual is not None
        # Layers of a dispatched model may be on other devices than the embeddings.
        rows, visual = forward.rows.to(hidden.device), forward.visual.to(hidden.device)
        cache = arguments.get("past_key_values")
        with forward.recorder.span("layers"):
            positions = arguments["position_embeddings"]
            if self.revival is not None:
                self.revival.mark(cache, index, visual, rows)
            hidden, keep, counts = self._reduce(forward, index, cache, hidden, rows, visual, positions)
            forward.recorder.stage("layers", self.config.layers.name, sum(forward.counts), sum(counts))
            if counts == forward.counts:
                return hidden
            if self.revival is not None:
                self.revival.set_aside(cache, index, hidden, positions, rows, visual & ~keep)
            lengths = [n - b + a for n, b, a in zip(rows.lengths, forward.counts, counts, strict=True)]
            forward.rows, inner = rows.narrow(keep, lengths)
            forward.counts, forward.visual = counts, (visual & keep).gather(1, inner)
            since = forward.since_entry
            forward.since_entry = inner if since is None else since.to(inner.device).gather(1, inner)
            forward.history.append((index, forward.rows))
            hidden = gather_rows(hidden, inner, 1)
            forward.observed = {
                layer: gather_rows(noted.to(inner.device), inner, 2) for layer, noted in forward.observed.items()
            }
            forward.overrides = {
                "position_embeddings": tuple(gather_rows(x.to(inner.device), inner, 1) for x in positions)
            }
            arguments |= forward.overrides
            forward.masks = self.masks(cache, hidden, forward.rows.padding, index)
            forward.recorder.layer_lengths[index:] = [lengths] * (len(self.layers) - index)
        return hidden

    def _reduce(
        self,
        forward: Forward,
        index: int,
        cache: Any,
        hidden: Tensor,
        rows: Rows,
        visual: Tensor,
        positions: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, list[int]]:
        """``hidden`` with merged values, ``[B, K]`` True at the rows that stay, and how many visual ones of each sample
        these are."""
        method = self.config.layers
        assert method is not None and forward.pictures is not None
        before, here = self._weights(forward, index, cache, hidden, rows, positions)
        forward.scored = None
        attention, received = self._scores(before, rows, hidden)
        keep, counts = torch.ones_like(visual), list(forward.counts)
        order = visual.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        merged = hidden
        pictures = forward.pictures.to(hidden.device)
        observed = {layer: noted.to(hidden.device) for layer, noted in forward.observed.items()}
        for sample, count in enumerate(forward.counts):
            if not count:
                continue
            places, own = order[sample, :count], rows.slice_of(sample)
            coordinates = None
            if forward.coordinates is not None:
                coordinates = forward.coordinates[sample].to(hidden.device)[rows.index[sample, places]]
            text = asking = None
            if "text" in method.needs:
                text, asking = _words(pictures[sample, rows.index[sample, own]], forward.texts[sample])
            left = method.reduce(
                LayerTokens(
                    layer=index,
                    num_initial=forward.initial[sample],
                    attention=None if attention is None else attention[sample][:, places],
                    received=None if received is None else functools.partial(_of_sample, received, sample, places),
                    hidden=hidden[sample, places] if "hidden" in method.needs else None,
                    coordinates=coordinates,
                    depth=len(self.layers),
                    length=rows.lengths[sample],
                    places=places - own.start,
                    text=text,
                    asking=asking,
                    rows=functools.partial(_rows_of_sample, hidden[sample, own]),
                    weights=functools.partial(_weights_of_sample, before, here, sample, own),
                    observed={layer: noted[:, sample, places] for layer, noted in observed.items()},
                ),
                _carried(forward.memory.get(sample), hidden.device),
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

    def _weights(
        self,
        forward: Forward,
        index: int,
        cache: Any,
        hidden: Tensor,
        rows: Rows,
        positions: tuple[Tensor, Tensor],
    ) -> tuple[_Weights | None, _Weights]:
        """Attention of chosen rows in the layer before (None where it was not asked for, or there is none), and in the
        layer that they are about to enter."""

        def seen_by(layer: Any) -> Tensor | None:
            if layer is None or not layer.is_initialized:
                return rows.padding
            return joined_valid(layer.valid, layer.physical_length, rows.padding, hidden.shape[1])

        here, own = self.layers[index], None if cache is None else cache.layers[index]
        past = own.keys if own is not None and own.is_initialized else None
        entering = _Weights(self.adapter, here, hidden, positions, past, seen_by(own), whole=False)
        if forward.scored is None:
            return None, entering
        earlier, layer = forward.scored, None if cache is None else cache.layers[index - 1]
        if layer is None or not layer.is_initialized:
            return _Weights(self.adapter, self.layers[index - 1], *earlier, None, rows.padding, whole=False), entering
        # The rows of this pass are in that layer's cache already, but not yet on its record.
        past_length = layer.keys.shape[2] - hidden.shape[1]
        seen = joined_valid(layer.valid, past_length, rows.padding, hidden.shape[1])
        return _Weights(self.adapter, self.layers[index - 1], *earlier, layer.keys, seen, whole=True), entering

    def _scores(
        self, before: _Weights | None, rows: Rows, hidden: Tensor
    ) -> tuple[Tensor | None, Callable[[], Tensor] | None]:
        """Weights ``[B, heads, K]`` that the last token gave each row in the layer before, and what makes the mean
        ``[B, K]`` that each row got there; None where the method does not ask for it."""
        assert self.config.layers is not None
        needs, length = self.config.layers.needs, hidden.shape[1]
        if before is None:  # nothing is before the first layer
            return None, None

        @functools.cache
        def received() -> Tensor:
            got = hidden.new_zeros(hidden.shape[:2], dtype=torch.float32)
            everyone = torch.arange(length, device=hidden.device).expand(hidden.shape[0], -1)
            for start in range(0, length, _QUERIES):
                stop = min(start + _QUERIES, length)
                # Padding asks nothing; what it gives, which may be NaN, is left out.
                asked = rows.valid[:, start:stop, None]
                given = before.of(everyone[:, start:stop], stop=stop).mean(dim=1).masked_fill(~asked, 0)
                got[:, :stop] += given.sum(dim=1)
            return got / torch.tensor(rows.lengths, device=hidden.device)[:, None]

        attention = None
        if "attention" in needs:
            last = [[length - 1 if rows.left else n - 1] for n in rows.lengths]
            attention = before.of(torch.tensor(last, device=hidden.device))[:, :, 0]
        return attention, received if "received" in needs else None

    def observe(
        self, index: int, part: str, module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The forward of a part of decoder layer ``index`` that the method is told of."""
        output = original(*args, **kwargs)
        forward = ACTIVE.get()
        if forward is None or forward.rows is None or self.config.layers is None:
            return output
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        noted = torch.zeros(before.shape[:2], dtype=torch.float32, device=before.device)
        for sample in range(before.shape[0]):
            own = forward.rows.slice_of(sample)
            noted[sample, own] = self.config.layers.observe(part, module, before[sample, own], after[sample, own])
        earlier = forward.observed.get(index)
        forward.observed[index] = noted[None] if earlier is None else torch.cat([earlier, noted[None]])
        return output

    def deepstack(self, original: Callable[..., Any], hidden: Tensor, pictures: Tensor, features: Tensor) -> Any:
        """Adding features of the tower to hidden states, which may have become shorter since the entry."""
        forward = ACTIVE.get()
        if forward is None or forward.since_entry is None or forward.rows is None:
            return original(hidden, pictures, features)
        length = pictures.shape[1]
        # Padding rows are sent to a column of their own.
        entry = torch.where(forward.rows.valid, forward.since_entry, length)
        pictures = pictures.to(entry.device)
        present = pictures.new_zeros(pictures.shape[0], length + 1).scatter_(1, entry, True)[:, :length]
        here = gather_rows(pictures, forward.since_entry, 1) & forward.rows.valid
        return original(hidden, here, features[present[pictures].to(features.device)])


@dataclass
class _Weights:
    """Attention weights of chosen query rows of one decoder layer.

    Attributes:
        hidden: the layer's input, with its position embeddings; they may be on the device of the layer before.
        keys: those of the cache; None where there are none.
        seen: ``[B, keys]`` False at padding, those of this pass included.
        whole: the cached keys hold those of this pass.
    """

    adapter: ModelAdapter
    layer: nn.Module
    hidden: Tensor
    positions: tuple[Tensor, Tensor]
    keys: Tensor | None
    seen: Tensor | None
    whole: bool

    def of(self, query_rows: Tensor, sample: int | None = None, stop: int | None = None) -> Tensor:
        """``[B, heads, R, stop]`` of ``query_rows [B, R]``, on the rows of this pass.

        Args:
            sample: only this one's, which is then the whole batch.
            stop: none of the queries comes after the first so many rows, and later ones are left out; None for all.
        """
        hidden, positions, seen = self._moved
        length = hidden.shape[1]
        if not self.whole:
            own = self.adapter.keys(self.layer, hidden, positions)
            self.keys = own if self.keys is None else torch.cat([self.keys, own], dim=2)
            self.whole = True
        assert self.keys is not None
        pick = slice(None) if sample is None else slice(sample, sample + 1)
        stop = length if stop is None else stop
        known = self.keys.shape[2] - length + stop
        # Position embeddings may be those of all samples at once.
        cos, sin = (x.expand(hidden.shape[0], -1, -1)[pick, :stop] for x in positions)
        seen = None if seen is None else seen[pick, :known]
        asked = query_rows.to(hidden.device)
        rows = self.adapter.attention_rows(
            self.layer, hidden[pick, :stop], asked, (cos, sin), self.keys[pick, :, :known], seen
        )
        return rows[..., -stop:].to(query_rows.device)

    @functools.cached_property
    def _moved(self) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        device = _weight_device(self.layer, self.hidden.device)
        cos, sin = (x.to(device) for x in self.positions)
        return self.hidden.to(device), (cos, sin), None if self.seen is None else self.seen.to(device)


def _weight_device(module: nn.Module, otherwise: torch.device) -> torch.device:
    """Where a module computes, for models may be spread over devices.

    Args:
        otherwise: for a module whose weights are fetched when it runs.
    """
    device = next((weight.device for weight in module.parameters()), otherwise)
    return otherwise if device.type == "meta" else device


def _carried(memory: Any, device: torch.device) -> Any:
    """What a method left itself, tensors and those in a dataclass on the device of the layer that it comes to."""
    if isinstance(memory, Tensor):
        return memory.to(device)
    if not is_dataclass(memory) or isinstance(memory, type):
        return memory
    held = {field.name: getattr(memory, field.name) for field in fields(memory)}
    return replace(memory, **{name: value.to(device) for name, value in held.items() if isinstance(value, Tensor)})


def _weights_of_sample(
    before: _Weights | None, here: _Weights, sample: int, own: slice, query_rows: Tensor, entering: bool
) -> Tensor:
    weights = here if entering else before
    if weights is None:
        raise ValueError("nothing is before the first decoder layer, so there is no attention to rank by")
    return weights.of((query_rows + own.start)[None], sample)[0, :, :, own]


def _rows_of_sample(hidden: Tensor, rows: Tensor) -> Tensor:
    return hidden[rows]


def _words(pictures: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``[count]`` rows of the words of a sample, and which of them come after its last picture; all if none do.

    Args:
        pictures: ``[L]`` True at its visual tokens.
    """
    text = pictures.to(torch.uint8).argsort(stable=True)[:count]
    after = text > (pictures * torch.arange(len(pictures), device=pictures.device)).amax()
    return text, after | ~after.any()


def _of_sample(received: Callable[[], Tensor], sample: int, places: Tensor) -> Tensor:
    return received()[sample, places]
