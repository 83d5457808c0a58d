"""The language model's side of a patch: dropped tokens leave the sequence, at its entry and between its layers.

The sequence, its masks and its KV cache really get shorter. Position ids are kept, not renumbered. What comes out has
its original length again, with zeros where a token was dropped, so callers may index it as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spatiotoken.between import BetweenLayers
from spatiotoken.config import PatchConfig
from spatiotoken.layout import bearers_at, coordinates_at
from spatiotoken.patches.adapter import ModelAdapter
from spatiotoken.positions import MEMBERS, compacted, member_rows, rotary_of_members
from spatiotoken.sequence import (
    Rows,
    compact_index,
    gather_rows,
    is_logical,
    kept_rows,
    restore_rows,
    with_logical_layers,
)
from spatiotoken.state import ACTIVE, Forward


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
        self.between = BetweenLayers(adapter, self.language_model, self.layers, config)
        text = self.language_model.config
        if (config.frames or config.tokens or config.layers) and _slides(text):
            raise ValueError("token reduction does not support sliding-window attention in the language model")
        self.positions = _positions(config, adapter)
        # Beside a `layers` method, flash attention needs the decoder layers' arguments changed (see `layer`).
        self.wraps_layers = bool(self.between.prune_layers) or "flash" in str(text._attn_implementation)

    # -- entry of the language model --

    def enter(self, original: Callable[..., Any], **arguments: Any) -> Any:
        """The language model's forward."""
        forward, embeds = ACTIVE.get(), arguments.get("inputs_embeds")
        if embeds is None or forward is None:
            return original(**arguments)
        mask = arguments.get("attention_mask")
        forward.custom_mask = mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2)
        if self.config.places_tokens and forward.pictures is not None:
            forward.coordinates = coordinates_at(forward.recorder.layouts, forward.recorder.places)
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
        assert forward.pictures is not None
        words = kept & ~forward.pictures
        counted = [valid.sum(1), kept.sum(1), (forward.visual & valid).sum(1), visual.sum(1), words.sum(1), left_padded]
        real, lengths, before, counts, texts, *padded = torch.stack(counted).tolist()
        shortened, left = lengths != real, all(padded[0])
        forward.recorder.visual_kept = forward.recorder.visual - (sum(before) - sum(counts))
        self._record(forward, lengths, real)
        cache: Any = arguments.get("past_key_values")
        if not shortened and not (self.between.prune_layers and any(counts)):
            return self._continue(original, arguments, forward) if is_logical(cache) else original(**arguments)
        if forward.custom_mask:
            raise ValueError(
                "token reduction needs a 2-D attention mask and a dynamic KV cache; this call brings a prepared mask "
                "(of a static cache or your own)"
            )
        if cache is not None or self._uses_cache(arguments):
            seen = None if earlier is None or is_logical(cache) or bool(earlier.all()) else earlier
            cache = arguments["past_key_values"] = with_logical_layers(cache, self.language_model.config, seen)
            _check_evenly_pruned(cache, self.between.prune_layers)
        past = cache.layers[0].get_seq_length() if cache is not None else 0
        index = torch.arange(length, device=embeds.device).expand(batch, -1)
        if shortened:
            # At least one row, be it padding: a chunk of a prompt may lose all it has.
            index = compact_index(kept, max(1, *lengths), left=left)
        rows = Rows(index, kept.gather(1, index), lengths, left)
        shift = None
        if self.positions == "compact" and (shortened or past):
            shift = self._compact(arguments, valid, kept, cache, past)
        if shortened:
            if self.positions == "ppe":
                forward.members = self._member_positions(arguments, rows, forward)
            self._gather_arguments(arguments, rows, kept, past)
        forward.rows, forward.visual = rows, visual.gather(1, index)
        forward.counts, forward.initial, forward.history = counts, list(counts), [(0, rows)]
        forward.texts = texts
        if shortened or past:
            # Without a cache an explicit mask, as `layer_mask` says.
            arguments["attention_mask"] = (
                rows.valid if cache is None else cache.layers[0].attention_mask(rows.padding, index.shape[1])
            )
        if past and self.between.prune_layers:
            forward.masks = self.between.masks(cache, arguments["inputs_embeds"], rows.padding, 0)
        output = original(**arguments)
        self._record_cache(cache, forward, length)
        if cache is not None and shift is not None:
            cache.layers[0].shift = shift
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
            arguments["deepstack_visual_embeds"] = [
                x[features.to(x.device)] for x in arguments["deepstack_visual_embeds"]
            ]

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
        _check_evenly_pruned(cache, self.between.prune_layers)
        if (shift := cache.layers[0].shift) is not None:
            positions = arguments.get("position_ids")
            if positions is None:
                past = cache.layers[0].get_seq_length()
                positions = torch.arange(past, past + new, device=embeds.device)[None]
            arguments["position_ids"] = positions - shift.to(embeds.device)[:, None]
        arguments["attention_mask"] = cache.layers[0].attention_mask(padding, new)
        if self.between.prune_layers:
            forward.padding = padding
            forward.masks = self.between.masks(cache, embeds, padding, 0)
        output = original(**arguments)
        for layer in cache.layers:
            layer.append(new, padding)
        return output

    def _record_cache(self, cache: Any, forward: Forward, length: int) -> None:
        if cache is None or not cache.layers[0].is_initialized:  # gradient checkpointing takes the cache away
            return
        trims = self.config.layers is not None and self.config.layers.trims_cache()
        last = forward.history[-1][1]
        bounds = [start for start, _ in forward.history[1:]] + [len(cache.layers)]
        for (start, rows), stop in zip(forward.history, bounds, strict=True):
            for layer in cache.layers[start:stop]:
                here = rows.to(layer.keys.device)
                if trims and rows is not last:
                    here = last.to(layer.keys.device)
                    layer.keep(rows.index.shape[1], rows.to(here.index.device).places_of(here, length))
                layer.record(length, here, self.between.revival is not None)
                layer.uneven = layer.uneven or (len(forward.history) > 1 and not trims)

    def _record(self, forward: Forward, lengths: list[int] | Tensor, real: list[int] | Tensor) -> None:
        recorder = forward.recorder
        recorder.prompt, recorder.dense_lengths = sum(real), real
        recorder.layer_lengths = [lengths for _ in self.layers]
        if self.config.attention:
            recorder.stage("attention", self.config.attention.name, sum(lengths), sum(lengths))

    def _uses_cache(self, arguments: dict[str, Any]) -> bool:
        use_cache = arguments.get("use_cache")
        return bool(self.language_model.config.use_cache if use_cache is None else use_cache)


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


def _positions(config: PatchConfig, adapter: ModelAdapter) -> str:
    """What the stages want of the position ids of what is left.

    Raises:
        ValueError: they contradict each other, or the model's kind of positions.
    """
    kind, supported = ("M-RoPE", ("keep", "ppe")) if adapter.remembers_rope else ("1-D", ("keep", "compact"))
    wanted = {}
    for stage, method in (("frames", config.frames), ("tokens", config.tokens)):
        if method is None:
            continue
        if method.positions not in supported:
            raise ValueError(
                f"{stage}.positions: {method.positions!r} does not work with this model's {kind} positions; supported: "
                f"{', '.join(supported)}"
            )
        wanted[stage] = method.positions
    return next((positions for positions in wanted.values() if positions != "keep"), "keep")
