"""``patch_model``: the one place where models and methods meet.

Wrapped, on the instance: the feature extractors (``encoding``: stages ``frames`` and ``tokens``), the language model
and its decoder layers (``decoder``: dropped tokens leave the sequence; stage ``layers``) and the attention function
(``attention.dispatch``). What was kept belongs to the cache object, so conversations on one model do not disturb each
other; every change goes through one ``Undo`` log.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spatiotoken.attention import dispatch
from spatiotoken.config import PatchConfig, load_config
from spatiotoken.decoder import SequenceStages
from spatiotoken.encoding import FeatureStages, Prompt
from spatiotoken.layout import ATTRIBUTE
from spatiotoken.patches.adapter import ModelAdapter, find_adapter
from spatiotoken.report import ForwardReport, Recorder
from spatiotoken.sequence import without_marks
from spatiotoken.state import ACTIVE, Forward
from spatiotoken.undo import Undo

ModelT = TypeVar("ModelT", bound=PreTrainedModel)

HANDLE = "_spatiotoken"
_ENCODING: ContextVar[bool] = ContextVar("spatiotoken_encoding", default=False)


def patch_model(
    model: ModelT,
    config: str | Path | Mapping[str, Any] | PatchConfig,
    /,
    *,
    processor: Any = None,
    **overrides: Any,
) -> ModelT:
    """Make a model's inference cheaper, in place; the API of the model stays as it is.

    Args:
        model: a supported ``…ForConditionalGeneration``. A patched one is unpatched first.
        config: a preset's name, a YAML path, a dict or a ``PatchConfig``.
        processor: the model's; only frame selectors that have the question read by a model of their own need it.
        overrides: single keys, as ``**{"tokens.retention": 0.25}``.

    Returns:
        The same model.

    Raises:
        ValueError: unsupported architecture or wrong config; the model is as before.
    """
    resolved = load_config(config, **overrides)
    check_patchable(model)
    adapter = find_adapter(model)
    _check_kinds(adapter, resolved)
    patch = _Patch(model, adapter, resolved, processor)
    unpatch_model(model)
    patch.apply()
    return model


def unpatch_model(model: ModelT) -> ModelT:
    """Take the patch away; nothing of ours remains on the model. An unpatched model is left alone.

    Raises:
        UndoError: something else was put over the patch.
    """
    patch = model.__dict__.get(HANDLE)
    if patch is not None:
        patch.undo.revert()
    return model


@contextmanager
def patched(
    model: ModelT,
    config: str | Path | Mapping[str, Any] | PatchConfig,
    /,
    *,
    processor: Any = None,
    **overrides: Any,
) -> Iterator[ModelT]:
    """Patch a model within a ``with`` block. Afterwards it is as before: unpatched, or with the patch that it had."""
    before = model.__dict__.get(HANDLE)
    patch_model(model, config, processor=processor, **overrides)
    try:
        yield model
    finally:
        unpatch_model(model)
        if before is not None:
            patch_model(model, before.config, processor=before.processor)


def last_report(model: PreTrainedModel) -> ForwardReport:
    """What the latest prefill of a patched model did, and the decoding since.

    Raises:
        ValueError: the model is not patched, or has not run since.
    """
    patch = model.__dict__.get(HANDLE)
    if patch is None:
        raise ValueError("the model is not patched: call patch_model first")
    if patch.recorder is None:
        raise ValueError("the model has not run since it was patched")
    return patch.recorder.report(patch.sequence.layers)


class _Patch:
    """Everything that is attached to one model."""

    def __init__(self, model: PreTrainedModel, adapter: ModelAdapter, config: PatchConfig, processor: Any) -> None:
        self.model = model
        self.adapter = adapter
        self.config = config
        self.processor = processor
        self.core = adapter.core(model)
        self.features = FeatureStages(adapter, self.core, config, processor)
        self.sequence = SequenceStages(adapter, model, config)
        self.attention = None  # what the model's own attention is called
        if config.attention:
            self.attention = dispatch.base_implementation(self.sequence.language_model.config)
        self.undo = Undo()
        self.recorder: Recorder | None = None
        # Kinds that `generate` had encoded before its first forward; they belong to the report of that forward.
        self.encoded_ahead: set[str] = set()
        self.prompt: Prompt | None = None  # of the pass at hand, for methods that need the question

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        # The wrapped methods of a copy would run the original.
        raise RuntimeError("a patched model cannot be copied: copy the unpatched model and patch both")

    def apply(self) -> None:
        """Attach everything; if that fails half-way, nothing stays."""
        config, sequence = self.config, self.sequence
        try:
            for owner in (self.model, self.core):
                self.undo.set(owner, HANDLE, self)
            if config.fast_tower:
                within = self.features.reader is not None or config.vision is not None
                self.adapter.fast_tower(self.core, self.undo, read_within=within)
            if self.features.tower:
                self.features.tower.attach(functools.partial(self._wrap, keep_positional=True))
            # What takes part: where something is reduced, or the `layers` method wants to know how features lie.
            placed = config.places_tokens
            taken = {
                "video": config.frames or config.vision or config.tokens or placed,
                "image": (config.images and (config.vision or config.tokens)) or placed,
            }
            for kind in self.adapter.kinds:
                encode = self._encode if taken[kind] else self._time_encoding
                self._wrap(self.core, f"get_{kind}_features", functools.partial(encode, kind))
            self._wrap(self.model, "forward", self._outer_forward)
            self._wrap(self.core, "forward", self._core_forward)
            self._wrap(sequence.language_model, "forward", sequence.enter)
            if sequence.positions == "ppe":
                rotary = sequence.language_model.rotary_emb
                self._wrap(rotary, "forward", sequence.rotary, keep_positional=True)
            if self.adapter.remembers_rope:
                self._wrap(self.model, "_prepare_position_ids_for_generation", self._position_ids)
            # Later versions of transformers encode pictures before the first forward, without the text.
            ahead = "_maybe_prepare_encoder_kwargs_for_generation"
            asking = config.tokens and "question" in config.tokens.needs
            if (asking or config.frames or config.images == "frames") and hasattr(self.model, ahead):
                self._wrap(self.model, ahead, self._encode_ahead)
            between = sequence.between
            if sequence.wraps_layers:
                for index, layer in enumerate(sequence.layers):
                    self._wrap(layer, "forward", functools.partial(between.layer, index), keep_positional=True)
                for index in between.observed_layers:
                    for part, module in self.adapter.parts(sequence.layers[index]).items():
                        observe = functools.partial(between.observe, index, part, module)
                        self._wrap(module, "forward", observe, keep_positional=True)
                if self.adapter.has_deepstack:
                    self._wrap(sequence.language_model, "_deepstack_process", between.deepstack, keep_positional=True)
            if config.attention and self.attention:
                before = copy.copy(sequence.language_model.config)
                before._attn_implementation_internal = self.attention
                for index, layer in enumerate(sequence.layers):
                    slot = dispatch.SparseAttention(config.attention, before, index, len(sequence.layers))
                    self.undo.set(layer.self_attn, dispatch.SLOT, slot)
                name = dispatch.register(self.attention)
                self.undo.set(sequence.language_model.config, "_attn_implementation_internal", name)
        except BaseException:
            self.undo.revert()
            raise

    def _wrap(self, owner: Any, name: str, wrapper: Callable[..., Any], *, keep_positional: bool = False) -> None:
        """Replace a method of an instance; ``wrapper`` gets the original and, by default, all arguments by name."""
        original = getattr(owner, name)
        signature = inspect.signature(original)

        # `generate` reads signatures to decide what it passes, so the original's must show through.
        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            if args and not keep_positional:
                named = signature.bind(*args, **kwargs).arguments
                kwargs = {**named.pop("kwargs", {}), **named}
                args = ()
            return wrapper(original, *args, **kwargs)

        self.undo.set(owner, name, replacement)

    # -- the whole model --

    def _outer_forward(self, original: Callable[..., Any], **arguments: Any) -> Any:
        tail = arguments.get("logits_to_keep", 0)
        with self._pass(arguments, tail if isinstance(tail, int) and tail > 0 else None):
            return original(**arguments)

    def _core_forward(self, original: Callable[..., Any], **arguments: Any) -> Any:
        as_tuple = arguments.pop("return_dict", None) is False
        cache = arguments.get("past_key_values")
        with self._pass(arguments, None) as forward:
            first = cache is None or cache.get_seq_length() == 0
            if _has_pictures(arguments):
                self._find_visual(forward, arguments)
            elif not first:
                self._recall_rope(cache)
            elif arguments.get("position_ids") is None and self.adapter.remembers_rope:
                self.core.rope_deltas = None  # those of another conversation
            with self._prompt(arguments.get("input_ids"), arguments):
                output = original(**arguments, return_dict=True)
            cache = output.past_key_values
            if self.adapter.remembers_rope and cache is not None and (first or _has_pictures(arguments)):
                # Beside the keys that were rotated by it: the model itself remembers only its latest prompt.
                cache.spatiotoken_rope_deltas = self.core.rope_deltas
            for name in ("image_hidden_states", "video_hidden_states"):
                if isinstance(features := getattr(output, name, None), Tensor):
                    setattr(output, name, without_marks(features, self.sequence.language_model.config.hidden_size))
            return output.to_tuple() if as_tuple else output

    @contextmanager
    def _pass(self, arguments: dict[str, Any], tail: int | None) -> Iterator[Forward]:
        """The state of the pass at hand: that of the model's forward, or a new one if its core was called directly."""
        active = ACTIVE.get()
        if active is not None and active.owner is self:
            yield active
            return
        cache = arguments.get("past_key_values")
        prefill = _has_pictures(arguments) or cache is None or cache.get_seq_length() == 0
        if self.recorder is None or (prefill and not self.encoded_ahead):
            self.recorder = self._new_recorder()
        self.encoded_ahead = set()
        self.recorder.decode_steps += not prefill
        forward = Forward(self, self.recorder, tail)
        token = ACTIVE.set(forward)
        try:
            with self.recorder.span("prefill" if prefill else "decode"):
                yield forward
        finally:
            ACTIVE.reset(token)

    def _new_recorder(self) -> Recorder:
        return Recorder(self.model.device, len(self.sequence.layers))

    def _find_visual(self, forward: Forward, arguments: dict[str, Any]) -> None:
        """Note which tokens of the prompt stand for pictures, for the report and for what may be dropped."""
        places = self.adapter.placeholders(self.core, arguments.get("input_ids"), arguments.get("inputs_embeds"))
        forward.recorder.places = places
        for kind, encoded in (arguments.get("mm_encoder_outputs") or {}).items():
            if (layout := getattr(encoded, ATTRIBUTE, None)) is not None:
                forward.recorder.layouts.setdefault(kind, layout)
        pictures = forward.pictures = torch.stack(list(places.values())).any(0)
        forward.recorder.visual = forward.recorder.visual_kept = pictures.sum()
        if self.config.frames or self.config.tokens or self.config.layers:
            forward.visual = pictures if self.config.images else places["video"]

    # -- M-RoPE offsets, which transformers keeps on the model --

    def _recall_rope(self, cache: Any) -> None:
        if hasattr(cache, "spatiotoken_rope_deltas"):
            self.core.rope_deltas = cache.spatiotoken_rope_deltas

    def _position_ids(self, original: Callable[..., Any], **arguments: Any) -> Any:
        cache = arguments["model_kwargs"].get("past_key_values")
        if cache is not None and cache.get_seq_length():
            self._recall_rope(cache)
        return original(**arguments)

    # -- feature extractors --

    def _encode_ahead(self, original: Callable[..., Any], **arguments: Any) -> Any:
        with self._prompt(arguments.get("inputs_tensor"), arguments["model_kwargs"]):
            return original(**arguments)

    @contextmanager
    def _prompt(self, input_ids: Tensor | None, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Remember the text for as long as pictures are encoded that belong to it."""
        before, mask = self.prompt, arguments.get("attention_mask")
        if input_ids is not None and input_ids.ndim == 2 and not input_ids.is_floating_point():
            valid = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
            self.prompt = Prompt(input_ids, valid, arguments.get("second_per_grid_ts"))
        try:
            yield
        finally:
            self.prompt = before

    def _encode(self, kind: str, original: Callable[..., Any], **arguments: Any) -> Any:
        if _ENCODING.get():  # Qwen3-VL encodes videos by its image function
            return original(**arguments)
        # The name of the first argument differs between versions of transformers; adapters know one.
        theirs = next(iter(inspect.signature(original).parameters))
        ours = "pixel_values_videos" if kind == "video" else "pixel_values"
        pixels = arguments.pop(theirs)

        def encode(encoding: dict[str, Any]) -> Any:
            rest = {name: value for name, value in encoding.items() if name != ours}
            return original(**{theirs: encoding[ours]}, **rest)

        with self._encoding(kind) as recorder:
            encoding = {**arguments, ours: pixels, "return_dict": True}
            output = self.features.run(kind, encoding, encode, recorder, self.prompt)
        return output.to_tuple() if arguments.get("return_dict") is False else output

    def _time_encoding(self, kind: str, original: Callable[..., Any], **arguments: Any) -> Any:
        """Nothing is reduced, but `generate` may encode ahead of the forward whose time this belongs to."""
        if _ENCODING.get():
            return original(**arguments)
        with self._encoding(kind):
            return original(**arguments)

    @contextmanager
    def _encoding(self, kind: str) -> Iterator[Recorder]:
        """Time an encoding, and the encodings within it as part of it."""
        recorder, timing = self._recorder_for(kind)
        token = _ENCODING.set(True)
        try:
            with timing:
                yield recorder
        finally:
            _ENCODING.reset(token)

    def _recorder_for(self, kind: str) -> tuple[Recorder, AbstractContextManager[None]]:
        """Where to note an encoding: within a forward its recorder; ahead of one, that of the forward to come."""
        forward = ACTIVE.get()
        if forward is not None and forward.owner is self:
            return forward.recorder, nullcontext()
        if self.recorder is None or not self.encoded_ahead or kind in self.encoded_ahead:
            self.recorder, self.encoded_ahead = self._new_recorder(), set()
        self.encoded_ahead.add(kind)
        return self.recorder, self.recorder.span("encode")


def check_patchable(model: Any) -> None:
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        raise ValueError("this is a PEFT wrapper: patch peft_model.get_base_model() instead")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError("torch.compile'd models cannot be patched: patch the model before it is compiled")


def _check_kinds(adapter: ModelAdapter, config: PatchConfig) -> None:
    """Raises ``ValueError`` if a family without videos would be left as it is."""
    if "video" in adapter.kinds:
        return
    family = "/".join(adapter.model_types)
    if config.frames:
        raise ValueError(
            f"{family} takes images only, so frames method {config.frames.name!r} has no video to choose from inside "
            "the model: choose frames while the file is read, by load_video(path, selector=...)"
        )
    if (config.vision or config.tokens or config.layers) and not config.images:
        raise ValueError(
            f"{family} takes images only, and with `images: false` these are not reduced: set `images: true` (each by "
            "itself) or `images: frames` (all of one prompt as the frames of one video)"
        )


def _has_pictures(arguments: Mapping[str, Any]) -> bool:
    encoded = arguments.get("mm_encoder_outputs") or {}
    given = [arguments.get("pixel_values"), arguments.get("pixel_values_videos"), *encoded.values()]
    return any(value is not None for value in given)


__all__ = ["last_report", "patch_model", "patched", "unpatch_model"]
