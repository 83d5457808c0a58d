"""One question about one video: load a model, build the prompt, generate, and say which frames were seen."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from spatiotoken.config import PatchConfig
from spatiotoken.patches.adapter import ADAPTERS, find_adapter
from spatiotoken.patching import last_report
from spatiotoken.prompts import inject_timestamps, video_content
from spatiotoken.report import ForwardReport
from spatiotoken.video import Video

Dtype = torch.dtype | Literal["auto"]

DTYPES: dict[str, Dtype] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class ModelLoadError(ValueError):
    """A model that cannot be loaded or is not supported; the message names it and the cause, in one line."""


class PromptError(ValueError):
    """A question or video that the model's processor refuses."""


@dataclass(frozen=True)
class Answer:
    """An answer and what it cost.

    Attributes:
        text: the new tokens, decoded.
        report: what the patch did.
        frame_indices: source frames that reached the vision tower, in order.
        frame_seconds: when those are presented, from the first frame of the video.
    """

    text: str
    report: ForwardReport
    frame_indices: tuple[int, ...]
    frame_seconds: tuple[float, ...]


def resolve_dtype(name: str) -> Dtype:
    """The dtype of that name; "auto" is the one the checkpoint was saved in.

    Raises:
        ValueError: unknown name.
    """
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; supported: {', '.join(DTYPES)}")
    return DTYPES[name]


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU if there is one, else the CPU.

    Raises:
        ValueError: unknown name, or a GPU that is not there.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"unknown device {name!r}; supported: auto, cpu, cuda, cuda:N")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def load_model(
    model: str | Path, *, dtype: Dtype = "auto", device: torch.device | None = None
) -> tuple[PreTrainedModel, Any]:
    """A supported model, ready for ``patch_model``, and its processor.

    Args:
        model: id on the Hugging Face hub, or a directory made by ``save_pretrained``.
        device: where to put it; the CPU by default.

    Raises:
        ModelLoadError: it cannot be read, its architecture is not supported, or it lacks what videos or chats need.
    """
    try:
        # Before the weights, which can be large and are not needed to refuse a model.
        kinds = ADAPTERS.get(AutoConfig.from_pretrained(model).model_type).kinds
        processor = AutoProcessor.from_pretrained(model)
        if "video" in kinds and not hasattr(processor, "video_processor"):
            raise ValueError("it has no video processor")
        if processor.chat_template is None:
            raise ValueError("its processor has no chat template")
        with_info: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype, output_loading_info=True)
        loaded, loading = with_info
        if loading["missing_keys"]:
            some = ", ".join(sorted(loading["missing_keys"])[:3])
            raise ValueError(f"the checkpoint lacks {len(loading['missing_keys'])} weights: {some}, …")
    except Exception as error:  # whatever transformers makes of a foreign folder: each kind of damage has its own
        raise ModelLoadError(f"cannot load model {str(model)!r}: {' '.join(str(error).split())[:500]}") from error
    return loaded.to(device or torch.device("cpu")).eval(), processor


def resolved_layers(model: str | Path, config: PatchConfig) -> dict[str, Any]:
    """How deep a model is, and before which of its decoder layers a config's ``layers`` method changes the sequence.

    Only the model's configuration is read.

    Raises:
        ModelLoadError: it cannot be read, or its architecture is not supported.
        ValueError: the method needs a deeper model.
    """
    try:
        about = AutoConfig.from_pretrained(model)
        ADAPTERS.get(about.model_type)
    except Exception as error:
        raise ModelLoadError(f"cannot load model {str(model)!r}: {' '.join(str(error).split())[:500]}") from error
    depth = about.get_text_config().num_hidden_layers
    layers = list(config.layers.prune_layers(depth)) if config.layers else []
    return {"model": about.model_type, "decoder_layers": depth, "layers": layers}


def video_metadata(video: Video) -> dict[str, Any]:
    """What processors want to know of a video whose frames were already chosen.

    They take a frame's time to be its index over the frame rate. That is wrong where the rate varies, so the times are
    given as indices of a video of 1000 frames a second.
    """
    return {
        "fps": 1000.0,
        "frames_indices": [round(1000 * second) for second in video.timestamps.tolist()],
        "total_num_frames": max(1, round(1000 * video.metadata.duration)),
    }


def prepare_inputs(processor: Any, frames: Tensor, question: str, metadata: Mapping[str, Any]) -> Any:
    """The model's inputs for one user turn of a video and a question.

    Args:
        frames: uint8 ``[T, 3, H, W]``; all of them are used.
        metadata: as ``video_metadata`` gives it.
    """
    return prepare_batch(processor, [frames], [question], [metadata])


def prepare_batch(
    processor: Any, videos: Sequence[Tensor], questions: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> Any:
    """The model's inputs for several conversations of one turn each, padded on the left.

    For families that take images only, the frames are images.
    """
    contents, pictures = video_content(processor, videos, metadata)
    prompts = []
    for content, question in zip(contents, questions, strict=True):
        message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        prompts.append(processor.apply_chat_template([message], add_generation_prompt=True))
    return processor(text=prompts, padding=True, padding_side="left", return_tensors="pt", **pictures)


def answer_video(
    model: PreTrainedModel,
    processor: Any,
    video: Video,
    question: str,
    *,
    max_new_tokens: int = 64,
    timestamps: bool = False,
) -> Answer:
    """Ask a patched model (by ``dense`` to reduce nothing), with greedy decoding.

    Args:
        timestamps: tell the time of each frame in words before it (``prompts.inject_timestamps``).

    Raises:
        PromptError: the processor refuses question or video.
        ValueError: the model is not patched.
    """
    try:
        inputs = prepare_inputs(processor, video.frames, question, video_metadata(video))
        if timestamps:
            inputs = inject_timestamps(inputs, processor, model.config, [video.timestamps.tolist()])
    except ValueError as error:
        raise PromptError(f"the model's processor refuses this prompt: {' '.join(str(error).split())}") from error
    inputs = inputs.to(model.device, model.dtype)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)  # type: ignore[operator]
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    report = last_report(model)
    (seen,) = frames_seen(model, report, [len(video.indices)])
    return Answer(
        text=processor.tokenizer.decode(new_tokens, skip_special_tokens=True).strip(),
        report=report,
        frame_indices=tuple(video.indices[row] for row in seen),
        frame_seconds=tuple(float(video.timestamps[row]) for row in seen),
    )


def frames_seen(model: PreTrainedModel, report: ForwardReport, frames: Sequence[int]) -> list[list[int]]:
    """Of each video the rows of its frames in the temporal units that the in-model ``frames`` stage kept.

    Args:
        frames: how many each video has.
    """
    if report.frames is None:
        return [list(range(count)) for count in frames]
    adapter = find_adapter(model)
    # Processors fill the last unit by repeating a frame.
    size = adapter.frames_per_unit(adapter.core(model))
    return [
        [row for unit in units for row in range(unit * size, min((unit + 1) * size, count))]
        for units, count in zip(report.frames, frames, strict=True)
    ]
