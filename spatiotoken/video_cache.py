"""``VideoCache``: a video is encoded once, and its part of the prompt prefilled once, for many questions."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Cache, PreTrainedModel

from spatiotoken.config import PatchConfig
from spatiotoken.frames.encoders import outer_weights_key
from spatiotoken.frames.keys import key, tensor_key
from spatiotoken.patches.adapter import find_adapter
from spatiotoken.patching import HANDLE as _PATCH
from spatiotoken.patching import check_patchable, unpatch_model
from spatiotoken.picture_store import (
    FIELDS,
    EncodedPictures,
    Features,
    Recent,
    on_host,
    put_together,
    read_features,
    taken_apart,
)
from spatiotoken.undo import Undo

_VERSION = "video-cache/1"
"""Part of every name of a file: raised when the same inputs are made to give other features."""
_HANDLE = "_spatiotoken_video_cache"
_ALONG_THE_PROMPT = ("input_ids", "attention_mask", "position_ids", "mm_token_type_ids", "token_type_ids")
_ENCODING: ContextVar[object] = ContextVar("spatiotoken_video_cache_encoding", default=None)


class VideoCache:
    """Remembers what a model made of videos and images while it is attached::

        with VideoCache(model) as cache, patched(model, "divprune"):
            for question in questions:
                model.generate(**cache.prefilled(inputs_of(question)))

    Two things are remembered, and least recently used ones forgotten when they take more than ``max_bytes`` together.

    *Outputs* of ``get_video_features`` and ``get_image_features``, under a hash of the pixels, grids and all other
    arguments, in memory of the host. The cache lies beneath a patch, so configs share it: a ``frames`` method asks for
    the frames that it chose, a ``tokens`` method gets a copy of its own; only a ``vision`` method has outputs that no
    other config shares. A ``tokens`` method that looks into the tower (saliency, hidden states, keys, frame features)
    needs it to run, so there nothing is remembered; nor where gradients
    flow to the tower or the pixels, nor where a caller asks for hidden states or attentions. Others who call these
    functions find ``pooler_output`` and ``deepstack_features`` in the output, the first time as well as later, and
    nothing else. Hooks on the tower's modules run when the tower does.

    *Prefixes*, by ``prefilled``: the KV cache of a prompt up to its last picture, on the model's device.

    Args:
        model: unpatched; patch it within the ``with`` block. A patch that is left on it goes with the block's end.
        max_bytes: of tensors that are held in memory. What is larger by itself is not held.
        directory: where outputs are kept as safetensors files too, by what they are made from, for other processes and
            later ones. Nothing in it is ever deleted; it may be, at any time. A file that cannot be read is made anew,
            with a logged warning, since nothing but time is lost with it. A tower is recognised by its configuration,
            the version of transformers and a sample of each weight.

    Attributes:
        hits: how often an output or a prefix was at hand, in memory or as a file.
        misses: how often it was not, those that may not be remembered included.

    Raises:
        ValueError: unsupported architecture, or ``max_bytes`` below 0.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_bytes: int = 2 * 2**30,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be at least 0, not {max_bytes}")
        check_patchable(model)
        self.model = model
        self.adapter = find_adapter(model)
        self.core = self.adapter.core(model)
        self.directory = None if directory is None else Path(directory).expanduser()
        self.hits = self.misses = 0
        self._recent: Recent[Features | Cache] = Recent(max_bytes)
        self._undo = Undo()
        self._tower: tuple[str, str] | None = None  # state of its weights, and the identity that they give

    @property
    def nbytes(self) -> int:
        """Of the tensors that are held in memory."""
        return self._recent.nbytes

    def __enter__(self) -> VideoCache:
        """
        Raises:
            ValueError: the model is patched, or has a cache already.
        """
        if _PATCH in self.model.__dict__:
            raise ValueError("the model is patched: attach the VideoCache first, then patch the model within its block")
        if _HANDLE in self.model.__dict__:
            raise ValueError("the model has a VideoCache already")
        self._undo.set(self.model, _HANDLE, self)
        for kind in self.adapter.kinds:
            name = f"get_{kind}_features"
            self._undo.set(self.core, name, self._remembering(name, getattr(self.core, name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unpatch_model(self.model)
        self._undo.revert()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        # The wrapped methods of a copy would run the original's tower.
        raise RuntimeError("a model with a VideoCache cannot be copied: copy it outside of the cache's block")

    # -- outputs of the tower --

    def _remembering(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """``original``, a feature extractor, asked only once for equal arguments."""
        signature = inspect.signature(original)

        # `generate` and patches read signatures, so the original's must show through.
        @functools.wraps(original)
        def remembered(*args: Any, **kwargs: Any) -> Any:
            def encode() -> Any:
                token = _ENCODING.set(self)
                try:
                    return original(*args, **kwargs)
                finally:
                    _ENCODING.reset(token)

            if _ENCODING.get() is self:  # Qwen3-VL encodes videos by its image function
                return original(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            named = dict(bound.arguments)
            more = named.pop("kwargs", {})
            return self._features(name, named | more, encode)

        return remembered

    def _features(self, name: str, arguments: dict[str, Any], encode: Callable[[], Any]) -> Any:
        """
        Args:
            arguments: of the feature extractor ``name``, by name, the pixels first.
            encode: runs it with these.
        """
        pixels = next(iter(arguments.values()))
        known = self._key_of(name, arguments, pixels)
        if known is not None and (found := self._find(known)) is not None:
            self.hits += 1
            return found.output(pixels.device)
        self.misses += 1
        output = encode()
        if known is None:
            return output
        tensors: list[Tensor] = []
        parts = {field: taken_apart(getattr(output, field, None), tensors) for field in FIELDS}
        made = Features(json.dumps(parts), tuple(map(on_host, tensors)))
        self._recent.put(known, made, made.nbytes)
        if self.directory is not None:
            made.write(self._path(known))
        return put_together(parts, tensors)

    def _key_of(self, name: str, arguments: Mapping[str, Any], pixels: Any) -> str | None:
        """What the output is remembered by; None where the tower has to run, and nothing may be remembered."""
        as_fields = arguments.get("return_dict")
        if not isinstance(pixels, Tensor) or not (self.core.config.return_dict if as_fields is None else as_fields):
            return None
        if any(arguments.get(asked) for asked in ("output_hidden_states", "output_attentions")):
            return None
        patch = self.model.__dict__.get(_PATCH)
        if patch is not None and patch.features.reader is not None:
            return None
        reduced = "" if patch is None or patch.features.tower is None else patch.features.tower.described()
        if torch.is_grad_enabled() and (pixels.requires_grad or any(x.requires_grad for x in self._tower_weights())):
            return None
        kind = pixels.device.type
        autocast = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "none"
        said = {name: value for name, value in arguments.items() if name not in ("return_dict", "use_cache")}
        for argument in said:
            if said[argument] is None and argument.startswith("vision_"):  # `generate` leaves them to the configuration
                said[argument] = getattr(self.core.config, argument, None)
        try:
            described = _described({name: value for name, value in said.items() if value is not None})
        except TypeError:
            return None
        return key(self._tower_identity(), name, autocast, described, reduced)

    def _find(self, known: str) -> Features | None:
        found = self._recent.get(known)
        if found is None and self.directory is not None:
            found = read_features(self._path(known))
            if found is not None:
                self._recent.put(known, found, found.nbytes)
        return found  # type: ignore[return-value]

    def _path(self, known: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{known}.safetensors"

    def _tower_weights(self) -> list[Tensor]:
        language = {id(parameter) for parameter in self.adapter.language_model(self.model).parameters()}
        return [parameter for parameter in self.core.parameters() if id(parameter) not in language]

    def _tower_identity(self) -> str:
        """Names all that an output depends on, other than the arguments.

        Raises:
            ValueError: the weights are not in memory.
        """
        weights = self._tower_weights()
        if any(weight.is_meta for weight in weights):
            raise ValueError("the vision tower's weights are offloaded, so a VideoCache cannot tell which they are")
        state = _state(weights)
        if self._tower is None or self._tower[0] != state:  # they may be changed at any time
            settings = self.core.config.to_dict()
            settings = {name: settings[name] for name in sorted(settings) if name not in _NOT_OF_THE_TOWER}
            said = json.dumps(settings, default=str)
            own = outer_weights_key(self.adapter, self.model)
            self._tower = state, key(_VERSION, transformers.__version__, said, own)
        return self._tower[1]

    # -- prefixes of prompts --

    def prefilled(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of ``generate`` for a prompt whose pictures are in a KV cache already.

        Everything up to the last picture is prefilled when it first comes, under the patch that the model has, and
        again only if it has been forgotten. The answer is that of ``generate(**inputs)``, up to rounding. Each call has
        a copy of the KV cache to itself. ``last_report`` counts the rest of the prompt as decoding.

        Args:
            inputs: what the processor made of one prompt that goes on with text after its pictures.

        Raises:
            ValueError: a method of the config looks at the question (the message names it); or this is a batch, has no
                picture or no text behind the last one.
            RuntimeError: not within the ``with`` block.
        """
        if self.model.__dict__.get(_HANDLE) is not self:
            raise RuntimeError("prefilled works within the `with` block of its VideoCache")
        patch = self.model.__dict__.get(_PATCH)
        if patch is not None:
            _check_shareable(patch.config)
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        length = self._prefix_length(ids, mask)
        rest = {name: value for name, value in inputs.items() if name not in _ALONG_THE_PROMPT and value is not None}
        # Of the whole prompt, as `generate` has them: a prefix alone does not say where M-RoPE goes on.
        kwargs = {name: value for name, value in inputs.items() if name != "input_ids"} | {"attention_mask": mask}
        positions = self.model._prepare_position_ids_for_generation(ids, kwargs)
        prompt = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        config = "" if patch is None else patch.config.to_yaml()
        begun = {name: value[..., :length] for name, value in prompt.items()}
        known = key("prefix", config, _state(self.model.parameters()), _described([rest, begun]))
        cache = self._recent.get(known)
        if cache is None:
            self.misses += 1
            with torch.no_grad():
                cache = self.model(**begun, **rest, use_cache=True, logits_to_keep=1).past_key_values
            self._recent.put(known, cache, _cache_bytes(cache))
        else:
            self.hits += 1
        own = copy.deepcopy(cache)
        if self.adapter.remembers_rope:
            own.spatiotoken_rope_deltas = self.core.rope_deltas  # of this prompt, for the turns after its answer
        return {**prompt, "past_key_values": own}

    def _prefix_length(self, ids: Tensor, mask: Tensor) -> int:
        """Rows up to the last picture's last one."""
        if ids.shape[0] != 1 or not bool(mask.all()):
            raise ValueError(f"a prefix is of one prompt without padding, not of {tuple(ids.shape)}: ask one by one")
        pictures = torch.stack(list(self.adapter.placeholders(self.core, ids, None).values())).any(0)[0]
        rows: list[int] = pictures.nonzero()[:, 0].tolist()
        if not rows:
            raise ValueError("the prompt has no picture, so there is no prefix to share")
        if rows[-1] + 1 == ids.shape[1]:
            raise ValueError("no text follows the prompt's last picture, so nothing is asked")
        return rows[-1] + 1


_NOT_OF_THE_TOWER = frozenset({"_name_or_path", "transformers_version", "text_config", "dtype", "torch_dtype"})
"""Settings that do not change what the tower makes of pictures; the type of numbers is the weights' own."""


def _check_shareable(config: PatchConfig) -> None:
    """
    Raises:
        ValueError: what becomes of a prompt's beginning depends on the text after its pictures.
    """
    frames, tokens, layers = config.frames, config.tokens, config.layers
    why = None
    if frames is not None and frames.needs & {"relevance", "score"}:
        why = f"frames method {frames.name!r} chooses frames by the question"
    elif tokens is not None and "question" in tokens.needs:
        why = f"tokens method {tokens.name!r} chooses tokens by the question"
    elif layers is not None and not layers.needs <= {"hidden", "coordinates"}:
        # Attention, received attention and text rows are read from the rows that follow the pictures, too.
        why = f"layers method {layers.name!r} reads more than the visual tokens themselves"
    elif config.attention is not None:
        why = f"attention method {config.attention.name!r} treats a whole prompt at once"
    if why is not None:
        raise ValueError(
            f"{why}, so questions cannot share a prefix: ask by generate(**inputs), which reuses the tower"
        )


def _described(value: Any) -> str:
    """Names an argument by its content.

    Raises:
        TypeError: that is not possible.
    """
    if isinstance(value, Tensor):
        return tensor_key(value)
    if value is None or isinstance(value, str | int | float):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, Mapping):
        return _described(sorted(value.items()))
    if isinstance(value, list | tuple):
        return key(*map(_described, value))
    raise TypeError(f"{type(value).__name__} has no content that it could be named by")


def _state(weights: Iterable[Tensor]) -> str:
    """Changes when weights are replaced, moved or written to."""
    return key(*(f"{x.data_ptr()} {0 if x.is_inference() else x._version}" for x in weights))


def _cache_bytes(cache: Any) -> int:
    states = (states for layer in cache.layers for states in (layer.keys, layer.values))
    return sum(x.nbytes for x in states if isinstance(x, Tensor))


__all__ = ["EncodedPictures", "VideoCache"]
