"""What describes candidate frames and compares them with the question. Models are imported only when one is opened."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from spatiotoken.frames.keys import key, model_key
from spatiotoken.frames.relevance import question_similarity
from spatiotoken.frames.scorer import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spatiotoken.patches.adapter import ModelAdapter

_log = logging.getLogger(__name__)

_VERSION = 1
"""Part of every identity: raised when the same model is made to give other features."""
_SAMPLES = 64
"""Values of each weight that a model in memory is recognised by."""


@dataclass(frozen=True)
class Described:
    """What an encoder makes of ``T`` frames, on the CPU.

    Attributes:
        features: ``[T, F]`` float32.
        patches: ``[T, P, F']`` float32 parts of each frame, row by row from the top; only if they were asked for.
    """

    features: Tensor
    patches: Tensor | None = None

    def __post_init__(self) -> None:
        if self.features.ndim != 2:
            raise ValueError(f"features {tuple(self.features.shape)} must be [T, F]")
        if self.patches is not None and (self.patches.ndim != 3 or self.patches.shape[0] != self.features.shape[0]):
            raise ValueError(f"patches {tuple(self.patches.shape)} do not belong to {self.features.shape[0]} frames")


class FrameEncoder(ABC):
    """Describes frames, each by itself: neither its neighbours nor the size of the batches change a frame's features.

    Attributes:
        identity: names all that a description depends on, other than the frames.
        batch: frames that are described at once.
        compares_frames: a frame's relevance depends on those that it is given with.
    """

    identity: str
    batch: int
    compares_frames: ClassVar[bool] = False

    @torch.no_grad()
    def describe(self, pixels: Tensor, *, patches: bool = False) -> Described:
        """Features of frames.

        Args:
            pixels: uint8 ``[T, 3, h, w]`` RGB of any size; ``T`` may be 0.

        Raises:
            ValueError: they are not that.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or 0 in pixels.shape[2:]:
            raise ValueError(f"frames must be uint8 [T, 3, h, w], not {pixels.dtype} {tuple(pixels.shape)}")
        # An encoder of no frames still has to say how wide its features are.
        frames = pixels if pixels.shape[0] else pixels.new_zeros(1, *pixels.shape[1:])
        described = _joined([self._cpu(*self._encode(part, patches)) for part in frames.split(self.batch)])
        if pixels.shape[0]:
            return described
        return Described(described.features[:0], None if described.patches is None else described.patches[:0])

    def relevance(self, features: Tensor, question: str) -> Tensor:
        """``[T]`` float32 cosine similarity of frames with a question.

        Args:
            features: ``[T, F]`` from ``describe``.

        Raises:
            ValueError: this encoder reads no text.
        """
        raise ValueError(
            f"{type(self).__name__} reads no text, so frames cannot be compared with the question; "
            "scorers that do: clip, siglip2, tower"
        )

    @abstractmethod
    def _encode(self, pixels: Tensor, patches: bool) -> tuple[Tensor, Tensor | None]:
        """Features and, if asked for, patches of at least one and at most ``batch`` frames."""

    @staticmethod
    def _cpu(features: Tensor, patches: Tensor | None) -> Described:
        def own(values: Tensor) -> Tensor:
            # Features are often a slice, which would keep all hidden states of the model in memory.
            return values.to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)

        return Described(own(features), None if patches is None else own(patches))


def describe_stream(encoder: FrameEncoder, batches: Iterable[Tensor], *, patches: bool = False) -> Described:
    """Features of frames that come in batches, of which only one is held at a time.

    Args:
        batches: uint8 ``[n, 3, h, w]`` each, best of ``encoder.batch`` frames.

    Raises:
        ValueError: there is no batch.
    """
    parts = [encoder.describe(batch, patches=patches) for batch in batches]
    if not parts:
        raise ValueError("there are no frames to describe")
    return _joined(parts)


def open_encoder(scorer: Scorer, device: torch.device | None = None) -> FrameEncoder:
    """The encoder that a scorer names, its model in float32.

    Args:
        device: where to put the model; the CPU by default.

    Raises:
        ValueError: it cannot be loaded or is of another kind; or the scorer is ``tower``, which is a part of the model
            that answers.
    """
    if scorer.kind == "pixels":
        return PixelEncoder(scorer.batch)
    if scorer.kind == "tower":
        raise ValueError(
            "scorer 'tower' belongs to the model that answers: patch_model uses it by itself, and load_video takes "
            "encoder=TowerEncoder(model, processor)"
        )
    return _ENCODERS[scorer.kind](scorer, device or torch.device("cpu"))


class PixelEncoder(FrameEncoder):
    """Colours averaged down to 16x16: 768 features channel by channel, or as 256 patches of RGB. Reads no text."""

    def __init__(self, batch: int = 32) -> None:
        self.identity = f"pixels/{_VERSION}"
        self.batch = batch

    def _encode(self, pixels: Tensor, patches: bool) -> tuple[Tensor, Tensor | None]:
        # `spatiotoken.video` itself takes an encoder from here.
        from spatiotoken.video.features import frame_features

        features = frame_features(pixels)
        return features, features.unflatten(1, (3, -1)).transpose(1, 2) if patches else None


# --------------------------------------------------------------------------------------------- models of their own


class _ModelEncoder(FrameEncoder):
    """A released model with its own preprocessing, which may cut off the sides of a frame (CLIP and DINOv2 do)."""

    model_types: ClassVar[tuple[str, ...]]

    def __init__(self, scorer: Scorer, device: torch.device) -> None:
        name = scorer.model_name
        try:
            revision, self.identity = _resolved(scorer.kind, name, scorer.revision)
            model = self._load(name, revision)
        except Exception as error:  # each kind of foreign folder or hub failure has its own
            cause = " ".join(str(error).split())[:500]
            raise ValueError(f"cannot load scorer model {name!r} of kind {scorer.kind!r}: {cause}") from error
        self.model = model.to(device).eval()
        self.batch = scorer.batch

    def _load(self, name: str, revision: str | None) -> Any:
        from transformers import AutoConfig, AutoModel

        which = {} if revision is None else {"revision": revision}
        # Before the weights, which can be large and are not needed to refuse a model.
        model_type = AutoConfig.from_pretrained(name, **which).model_type
        if model_type not in self.model_types:
            raise ValueError(f"its model type is {model_type!r}, expected {' or '.join(map(repr, self.model_types))}")
        self._load_processor(name, which)
        model, loading = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **which)
        if loading["missing_keys"]:
            some = ", ".join(sorted(loading["missing_keys"])[:3])
            raise ValueError(f"the checkpoint lacks {len(loading['missing_keys'])} weights: {some}, …")
        return model

    @abstractmethod
    def _load_processor(self, name: str, which: dict[str, str]) -> None: ...

    def _inputs(self, image_processor: Any, pixels: Tensor) -> Any:
        inputs = image_processor(images=list(pixels), input_data_format="channels_first", return_tensors="pt")
        return inputs.to(self.model.device)


class DinoV2Encoder(_ModelEncoder):
    """DINOv2, with or without registers: the CLS token, and the patch tokens of the last layer. Reads no text."""

    model_types = ("dinov2", "dinov2_with_registers")

    def _load_processor(self, name: str, which: dict[str, str]) -> None:
        from transformers import AutoImageProcessor

        self.image_processor = AutoImageProcessor.from_pretrained(name, **which)

    def _encode(self, pixels: Tensor, patches: bool) -> tuple[Tensor, Tensor | None]:
        output = self.model(**self._inputs(self.image_processor, pixels))
        others = 1 + getattr(self.model.config, "num_register_tokens", 0)
        return output.pooler_output, output.last_hidden_state[:, others:] if patches else None


class _PairEncoder(_ModelEncoder):
    """A model of image-text pairs. Text beyond the length of its text tower is cut off (logged as info)."""

    lower: ClassVar[bool] = False
    padding: ClassVar[dict[str, Any]] = {}

    def _load_processor(self, name: str, which: dict[str, str]) -> None:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(name, **which)
        missing = [part for part in ("image_processor", "tokenizer") if not hasattr(processor, part)]
        if missing:
            raise ValueError(f"its processor has no {' and no '.join(missing)}")
        self.image_processor, self.tokenizer = processor.image_processor, processor.tokenizer

    def _encode(self, pixels: Tensor, patches: bool) -> tuple[Tensor, Tensor | None]:
        inputs = self._inputs(self.image_processor, pixels)
        output = self.model.get_image_features(**inputs)
        return output.pooler_output, self._patches(output.last_hidden_state, inputs) if patches else None

    @abstractmethod
    def _patches(self, hidden: Tensor, inputs: Any) -> Tensor:
        """``[n, P, F']`` of the vision tower's last layer."""

    @torch.no_grad()
    def relevance(self, features: Tensor, question: str) -> Tensor:
        text = question.lower() if self.lower else question
        limit = self.model.config.text_config.max_position_embeddings
        length = len(self.tokenizer(text, verbose=False)["input_ids"])
        if length > limit:
            _log.info("the question has %d tokens, of which %s reads %d", length, self.identity, limit)
        ids = self.tokenizer(text, truncation=True, max_length=limit, return_tensors="pt", **self.padding)["input_ids"]
        # No mask: it would be all ones for CLIP, and SigLIP was trained without any.
        words = self.model.get_text_features(input_ids=ids.to(self.model.device)).pooler_output
        return cosine_similarity(features.float(), words.to(features), dim=1).clamp(-1, 1)


class ClipEncoder(_PairEncoder):
    """CLIP: projected image and text embeddings; patches are the vision tower's last hidden states.

    It reads 77 tokens of the question, those that begin and end it included.
    """

    model_types = ("clip",)

    def _patches(self, hidden: Tensor, inputs: Any) -> Tensor:
        return hidden[:, 1:]


class Siglip2Encoder(_PairEncoder):
    """SigLIP 2 (NaFlex too) and SigLIP: pooled image and text embeddings; patches are the last hidden states.

    Text goes in as in training: in lower case, which the tokenizers of the released checkpoints leave to the caller,
    and padded on the right to the 64 tokens that it reads.
    """

    model_types = ("siglip", "siglip2")
    lower = True
    padding: ClassVar[dict[str, Any]] = {"padding": "max_length", "padding_side": "right"}

    def _patches(self, hidden: Tensor, inputs: Any) -> Tensor:
        if "spatial_shapes" not in inputs:
            return hidden
        # NaFlex fills up with empty patches; frames of one size have the same number of real ones.
        height, width = inputs["spatial_shapes"][0].tolist()
        return hidden[:, : height * width]


_ENCODERS: dict[str, type[_ModelEncoder]] = {"dinov2": DinoV2Encoder, "clip": ClipEncoder, "siglip2": Siglip2Encoder}


def _resolved(kind: str, name: str, revision: str | None) -> tuple[str | None, str]:
    """The commit to load (None for a directory), and the identity of what it gives."""
    from transformers.utils import cached_file

    if Path(name).is_dir():
        return None, f"{kind}/{_VERSION}/{model_key(name)}"
    config = cached_file(name, "config.json", revision=revision)
    # The hub's cache has a folder for each commit.
    commit = Path(str(config)).parent.name
    return commit, f"{kind}/{_VERSION}/{name}@{commit}"


# --------------------------------------------------------------------------------------- the tower of the model itself


class TowerEncoder(FrameEncoder):
    """Vision tower and projector of a video LLM: patches are a frame's projected tokens, features their mean.

    Every frame is a video of its own to the model's video processor, so its size and its tokens do not depend on how
    many others there are (the pixel budget of Qwen3-VL is for a whole video). Where the tower takes two frames as one
    temporal unit, the frame is repeated: each candidate then has features of its own, and an odd last one as well.

    ``relevance`` is ``question_similarity`` with the model's own embeddings of the question's tokens. It compares each
    frame with the others that are given together with it, so all candidates belong in one call.

    Raises:
        ValueError: the model is of no supported family, is patched, or has no video processor.
    """

    compares_frames: ClassVar[bool] = True

    def __init__(self, model: PreTrainedModel, processor: Any, *, batch: int = 32) -> None:
        from spatiotoken.patches.adapter import find_adapter

        if batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch}")
        self.model, self.processor, self.batch = model, processor, batch
        self.adapter = find_adapter(model)
        self._check_unpatched()
        if not hasattr(processor, "video_processor"):
            raise ValueError(f"{type(processor).__name__} has no video processor, which the frames must go through")
        weights, settings = outer_weights_key(self.adapter, model), processor.video_processor.to_json_string()
        self.identity = f"tower/{_VERSION}/{key(model.config.model_type, weights, settings)}"

    def relevance(self, features: Tensor, question: str) -> Tensor:
        ids = self.processor.tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"]
        table: Any = self.model.get_input_embeddings()
        with torch.no_grad():
            words = table(torch.tensor(ids, dtype=torch.long, device=table.weight.device))
        return question_similarity(features, words)

    def _encode(self, pixels: Tensor, patches: bool) -> tuple[Tensor, Tensor | None]:
        self._check_unpatched()
        core = self.adapter.core(self.model)
        videos = [frame.expand(self.adapter.frames_per_unit(core), -1, -1, -1) for frame in pixels]
        encoding = self.processor.video_processor(videos=videos, do_sample_frames=False, return_tensors="pt")
        encoding = dict(encoding.to(self.model.device, self.model.dtype))
        items = self.adapter.items(core, "video", encoding)
        # transformers 5.17 calls the first argument of the LLaVA families otherwise.
        rest = {name: value for name, value in encoding.items() if name != "pixel_values_videos"}
        output = core.get_video_features(encoding["pixel_values_videos"], **rest, return_dict=True)
        rows = self.adapter.read(output)[0]
        stride, uneven = divmod(rows.shape[0], len(items))
        if uneven or stride - items[0].size not in self.adapter.trailing:
            raise RuntimeError(
                f"{type(core).__name__} returned {rows.shape[0]} visual features where {type(self.adapter).__name__} "
                f"expects {len(items)} times {items[0].size}: this checkpoint's configuration is not supported"
            )
        tokens = rows.view(len(items), stride, -1)[:, items[0].segments[0].rows(rows.device)].float()
        return tokens.mean(dim=1), tokens if patches else None

    def _check_unpatched(self) -> None:
        if "_spatiotoken" in self.model.__dict__:
            raise ValueError(
                "the model is patched, so its tower drops what is to be described: call unpatch_model first"
            )


def outer_weights_key(adapter: ModelAdapter, model: PreTrainedModel) -> str:
    """Recognises the weights outside the language model, wherever they were loaded from or however changed."""
    language = {id(parameter) for parameter in adapter.language_model(model).parameters()}
    names, samples = [], []
    for name, parameter in adapter.core(model).named_parameters():
        if id(parameter) in language:
            continue
        names.append(f"{name} {parameter.dtype} {tuple(parameter.shape)}")
        flat = parameter.detach().reshape(-1)
        samples.append(flat[:: max(1, flat.shape[0] // _SAMPLES)][:_SAMPLES].float())
    # One copy from each device, in the order that does not depend on where the weights are.
    values: dict[int, Tensor] = {}
    for device in {sample.device for sample in samples}:
        here = [number for number, sample in enumerate(samples) if sample.device == device]
        copied = torch.cat([samples[number] for number in here]).cpu()
        values |= zip(here, copied.split([len(samples[number]) for number in here]), strict=True)
    return key(*names, torch.cat([values[number] for number in range(len(samples))]).numpy().tobytes())


def _joined(parts: Sequence[Described]) -> Described:
    if len(parts) == 1:
        return parts[0]
    patches = [part.patches for part in parts if part.patches is not None]
    return Described(torch.cat([part.features for part in parts]), torch.cat(patches) if patches else None)


__all__ = [
    "ClipEncoder",
    "Described",
    "DinoV2Encoder",
    "FrameEncoder",
    "PixelEncoder",
    "Siglip2Encoder",
    "TowerEncoder",
    "describe_stream",
    "open_encoder",
    "outer_weights_key",
]
