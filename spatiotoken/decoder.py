"""The language model's side of a patch: dropped tokens leave the sequence, at its entry and between its layers.

The sequence, its masks and its KV cache really get shorter. Position ids are kept, not renumbered. What comes out has
its original length again, with zeros where a token was dropped, so callers may index it as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spatiotoken.config import PatchConfig
from spatiotoken.layout import bearers_at, coordinates_at
from spatiotoken.patches.adapter import ModelAdapter
from spatiotoken.positions import MEMBERS, compacted, member_rows, rotary_of_members
from spatiotoken.sequence import (
    Rows,
    compact_index,
    gather_rows,
    is_logical,
    joined_valid,
    kept_rows,
    layer_mask,
    restore_rows,
    with_logical_layers,
)
from spatiotoken.state import ACTIVE, Forward
from spatiotoken.structures import LayerTokens


class SequenceStages:
    """Shortens the sequence of one model where its prompts bring pictures.

    Raises:
        ValueError: the ``layers`` method needs a deeper model, or the model's attention or kind of positions is not
            supported.
    """

    def __init__(self, adapter: ModelAdapter, model: PreTrainedModel, config: PatchConfig) -> None:
        self.adapter = adapter
        self.config = config
        self.language_model = adapter.language_model(model)
        self.layers = adapter.decoder_layers(model)
        self.prune_layers = config.layers.prune_layers(len(self.layers)) if config.layers else ()
        text = self.language_model.config
        if (config.frames or config.tokens or config.layers) and _slides(text):
            raise ValueError("token reduction does not support sliding-window attention in the language model")
        self.positions = config.tokens.positions if config.tokens else "keep"
        supported = ("keep", "ppe") if adapter.remembers_rope else ("keep", "compact")
        if self.positions not in supported:
            kind = "M-RoPE" if adapter.remembers_rope else "1-D"
            raise ValueError(
                f"tokens.positions: {self.positions!r} does not work with this model's {kind} positions; supported: "
                f"{', '.join(supported)}"
            )
        # Whether the layers before those that prune must leave their input, from which attention is computed.
        self.scores = bool(config.layers and config.layers.needs & {"attention", "received"})
        # Beside a `layers` method, flash attention needs the decoder layers' arguments changed (see `layer`).
        self.wraps_layers = bool(self.prune_layers) or "flash" in str(text._attn_implementation)

    # -- entry of the language model --

    def enter(self, original: Callable[..., Any], **arguments: Any) -> Any:
        """The language model's forward."""
        forward, embeds = ACTIVE.get(), arguments.get("inputs_embeds")
        if embeds is None or forward is None:
            return original(**arguments)
        mask = arguments.get("attention_mask")
        forward.custom_mask = mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2)
        if forward.visual is not None:
            return self._shorten(original, arguments, forward)
        if is_logical(arguments.get("past_key_values")):
            return self._continue(original, arguments, forward)
        if len(forward.recorder.dense_lengths) == 0:
            batch, length = embeds.shape[:2]
            lengths: list[int] | Tensor = [length] * batch
            if mask is not None and not forward.custom_mask:
                lengths = mask[:, -length:].sum(1)
            self._record(forward, lengths, lengths)
        return original(**arguments)

    def _shorten(self, original: Callable[..., Any], arguments: dict[str, Any], forward: Forward) -> Any:
        """A prompt with new pictures: gather the kept rows of everything that goes along the sequence."""
        embeds, mask = arguments["inputs_embeds"], arguments.get("attention_mask")
        batch, length = embeds.shape[:2]
        assert forward.visual is not None
        # Padding of this pass, and of what a cache holds already.
        valid, earlier = embeds.new_ones(batch, length, dtype=torch.bool), None
        if mask is not None and not forward.custom_mask:
            valid = mask[:, -length:].bool()
            earlier = mask[:, : mask.shape[1] - length].bool() if mask.shape[1] > length else None
        # Without a stage before the language model there is no mark to look for.
        kept = kept_rows(embeds) & valid if self.config.frames or self.config.tokens else valid
        visual = forward.visual & kept
        # The one wait for the device: what is real, kept and visual of each sample, and the side of the padding.
        left_padded = valid[:, -1] | ~valid.any(1)
        counted = [valid.sum(1), kept.sum(1), (forward.visual & valid).sum(1), visual.sum(1), left_padded]
        real, lengths, before, counts, *padded = torch.stack(counted).tolist()
        shortened, left = lengths != real, all(padded[0])
        forward.recorder.visual_kept = forward.recorder.visual - (sum(before) - sum(counts))
        self._record(forward, lengths, real)
        cache: Any = arguments.get("past_key_values")
        if not shortened and not (self.prune_layers and any(counts)):
            return self._continue(original, arguments, forward) if is_logical(cache) else original(**arguments)
        if forward.custom_mask:
            raise ValueError(
                "token reduction needs a 2-D attention mask and a dynamic KV cache; this call brings a prepared mask "
                "(of a static cache or your own)"
            )
        if cache is not None or self._uses_cache(arguments):
            seen = None if earlier is None or is_logical(cache) or bool(earlier.all()) else earlier
            cache = arguments["past_key_values"] = with_logical_layers(cache, self.language_model.config, seen)
            _check_evenly_pruned(cache, self.prune_layers)
        past = cache.layers[0].get_seq_length() if cache is not None else 0
        index = torch.arange(length, device=embeds.device).expand(batch, -1)
        if shortened:
            # At least one row, be it padding: a chunk of a prompt may lose all it has.
            index = compact_index(kept, max(1, *lengths), left=left)
        rows = Rows(index, kept.gather(1, index), lengths, left)
        if shortened:
            if self.positions == "compact":
                dropped = self._compact(arguments, valid, kept, cache, past)
            elif self.positions == "ppe":
                forward.members = self._member_positions(arguments, rows, forward)
            self._gather_arguments(arguments, rows, kept, past)
        forward.rows, forward.visual = rows, visual.gather(1, index)
        if self.config.layers and "coordinates" in self.config.layers.needs:
            forward.coordinates = coordinates_at(forward.recorder.layouts, forward.recorder.places)
        forward.counts, forward.initial, forward.history = counts, list(counts), [(0, rows)]
        if shortened or past:
            # Without a cache an explicit mask, as `layer_mask` says.
            arguments["attention_mask"] = (
                rows.valid if cache is None else cache.layers[0].attention_mask(rows.padding, index.shape[1])
            )
        if past and self.prune_layers:
            forward.masks = self._masks(cache, arguments["inputs_embeds"], rows.padding, 0)
        output = original(**arguments)
        self._record_cache(cache, forward, length)
        if shortened and self.positions == "compact" and cache is not None:
            cache.layers[0].shift = dropped
        if forward.rows is not rows:
            remaining = torch.zeros_like(embeds[..., 0], dtype=torch.int64)
            last = forward.rows.to(embeds.device)
            at_the_end = remaining.scatter_add_(1, last.index, last.valid.long()) > 0
            for sample, tokens, survivors in reversed(forward.absorbed):
                at_the_end[sample, tokens] = at_the_end[sample, survivors]
            forward.recorder.at_the_end = at_the_end
        if shortened or forward.rows is not rows:
            tail = length if forward.tail is None else min(forward.tail, length)
            output.last_hidden_state = restore_rows(output.last_hidden_state, forward.rows, length, tail)
        return output

    def _gather_arguments(self, arguments: dict[str, Any], rows: Rows, kept: Tensor, past: int) -> None:
        index, embeds = rows.index, gather_rows(arguments["inputs_embeds"], rows.index, 1)
        # Padding may point at marked rows, and a weight of zero times infinity is not zero.
        arguments["inputs_embeds"] = embeds if rows.all_valid else embeds.masked_fill(~rows.valid[..., None], 0)
        positions = arguments.get("position_ids")
        if positions is None:
            positions = torch.arange(past, past + kept.shape[1], device=index.device)[None]
        arguments["position_ids"] = gather_rows(positions, index, -1)
        pictures = arguments.get("visual_pos_masks")
        if pictures is not None:
            features = kept[pictures].nonzero()[:, 0]
            arguments["visual_pos_masks"] = gather_rows(pictures & kept, index, 1)
            arguments["deepstack_visual_embeds"] = [x[features] for x in arguments["deepstack_visual_embeds"]]

    def _compact(self, arguments: dict[str, Any], valid: Tensor, kept: Tensor, cache: Any, past: int) -> Tensor:
        """Number positions anew; ``[B]`` how far each sample's are now behind those of the whole conversation."""
        positions = arguments.get("position_ids")
        if positions is None:
            positions = torch.arange(past, past + kept.shape[1], device=kept.device)[None]
        shift = (valid & ~kept).sum(1)
        arguments["position_ids"] = compacted(positions, valid, kept)
        before = None if cache is None else cache.layers[0].shift
        if before is None:
            return shift
        arguments["position_ids"] = arguments["position_ids"] - before[:, None]
        return shift + before

    def _member_positions(self, arguments: dict[str, Any], rows: Rows, forward: Forward) -> Tensor:
        """``[MEMBERS, 3, B, K]`` positions of the members of each row that is left."""
        positions = arguments["position_ids"][-3:]
        batch, length = rows.index.shape[0], positions.shape[-1]
        members = torch.arange(batch * length, device=rows.index.device)[:, None].expand(-1, MEMBERS)
        for kind, layout in forward.recorder.layouts.items():
            if layout.bearers is None:
                continue
            places = forward.recorder.places[kind]
            own = member_rows(batch * length, places.flatten().nonzero()[:, 0], bearers_at(layout.bearers, places))
            members = torch.where(own != torch.arange(batch * length, device=own.device)[:, None], own, members)
        flat = positions.expand(-1, batch, -1).flatten(1)
        each = flat[:, members].unflatten(1, (batch, length))  # [3, B, L, MEMBERS]
        index = rows.index[None, :, :, None].expand(3, -1, -1, MEMBERS)
        return each.gather(2, index).permute(3, 0, 1, 2)

    def rotary(self, original: Callable[..., Any], hidden: Tensor, position_ids: Tensor) -> Any:
        """The language model's rotary embedding."""
        forward = ACTIVE.get()
        if forward is None or forward.members is None or position_ids.shape[-2:] != forward.members.shape[-2:]:
            return original(hidden, position_ids)
        return rotary_of_members(original, hidden, forward.members)

    def _continue(self, original: Callable[..., Any], arguments: dict[str, Any], forward: Forward) -> Any:
        """New text on a cache that is shorter than the conversation: decoding, or another turn."""
        cache, embeds, mask = arguments["past_key_values"], arguments["inputs_embeds"], arguments.get("attention_mask")
        if forward.custom_mask:
            raise ValueError("a pruned KV cache needs a 2-D attention mask over the whole conversation, or none")
        new = embeds.shape[1]
        # A single token is the one just generated; only a longer turn can bring padding.
        padding = mask[:, -new:].bool() if mask is not None and new > 1 else None
        if padding is not None and bool(padding.all()):
            padding = None
        _check_evenly_pruned(cache, self.prune_layers)
        if (shift := cache.layers[0].shift) is not None:
            positions = arguments.get("position_ids")
            if positions is None:
                past = cache.layers[0].get_seq_length()
                positions = torch.arange(past, past + new, device=embeds.device)[None]
            arguments["position_ids"] = positions - shift.to(embeds.device)[:, None]
        arguments["attention_mask"] = cache.layers[0].attention_mask(padding, new)
        if self.prune_layers:
            forward.masks = self._masks(cache, embeds, padding, 0)
        output = original(**arguments)
        for layer in cache.layers:
            layer.append(new, padding)
        return output

    def _masks(self, cache: Any, hidden: Tensor, padding: Tensor | None, first: int) -> dict[int, Any]:
        """Masks of the decoder layers from ``first`` on; they change where a method may have dropped tokens."""
        bounds = [first, *(index for index in self.prune_layers if index > first), len(self.layers)]
        masks: dict[int, Any] = {}
        for start, stop in zip(bounds, bounds[1:], strict=False):
            layer = None if cache is None else cache.layers[start]
            masks |= dict.fromkeys(range(start, stop), layer_mask(self.language_model.config, hidden, layer, padding))
        return masks

    def _record_cache(self, cache: Any, forward: Forward, length: int) -> None:
        if cache is None or not cache.layers[0].is_initialized:  # gradient checkpointing takes the cache away
            return
        bounds = [start for start, _ in forward.history[1:]] + [len(cache.layers)]
        for (start, rows), stop in zip(forward.history, bounds, strict=True):
            for layer in cache.layers[start:stop]:
                layer.record(length, rows.to(layer.keys.device))
                layer.uneven = layer.uneven or len(forward.history) > 1

    def _record(self, forward: Forward, lengths: list[int] | Tensor, real: list[int] | Tensor) -> None:
        recorder = forward.recorder
        recorder.prompt, recorder.dense_lengths = sum(real), real
        recorder.layer_lengths = [lengths for _ in self.layers]
        if self.config.attention:
            recorder.stage("attention", self.config.attention.name, sum(lengths), sum(lengths))

    def _uses_cache(self, arguments: dict[str, Any]) -> bool:
        use_cache = arguments.get("use_cache")
        return bool(self.language_model.config.use_cache if use_cache is None else use_cache)

    # -- between decoder layers --

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
            forward.masks = self._masks(cache, hidden, forward.rows.padding, index)
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


_QUERIES = 256
"""Query rows whose attention is held at a time."""


def _slides(config: Any) -> bool:
    types = getattr(config, "layer_types", None)
    if types is None:
        return getattr(config, "sliding_window", None) is not None
    return "sliding_attention" in types


def _check_evenly_pruned(cache: Any, prune_layers: tuple[int, ...]) -> None:
    """Raises ``ValueError`` if cache layers differ in length where this config does not prune."""
    for index, (before, layer) in enumerate(zip(cache.layers, cache.layers[1:], strict=False), start=1):
        if layer.dropped != before.dropped and index not in prune_layers:
            raise ValueError(
                f"this KV cache was pruned before decoder layer {index} by another config: go on with the one that it "
                "was made with"
            )
