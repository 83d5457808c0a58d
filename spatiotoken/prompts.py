"""Prompts that tell a model more of a video than its frames: a thumbnail beside it, or the time of each frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spatiotoken.frames.ts_llava import linspace_indices, thumbnail
from spatiotoken.patches.adapter import ADAPTERS


def thumbnail_inputs(
    processor: Any,
    frames: Tensor,
    question: str,
    metadata: Mapping[str, Any],
    *,
    count: int = 6,
    thumbnail_first: bool = True,
) -> Any:
    """The model's inputs for one user turn of a thumbnail, the video and a question, as TS-LLaVA has it (2411.11066).

    The thumbnail is as large as a frame, and an image like any other: with ``images: false`` it stays whole while the
    tokens of the video are reduced. Families that cut images into tiles do so with the thumbnail; the authors do not.
    For families that take images only, which the method is for, the frames are images too: patch such a model by
    ``patch_model(model, "ts_llava_tokens", images="frames", **{"tokens.thumbnail": "first"})``.

    Args:
        frames: uint8 ``[T, 3, H, W]``; all of them are used.
        metadata: as ``answer.video_metadata`` gives it; not used for families that take images only.
        count: how many frames the thumbnail shows, at equal distances (all, if there are no more); the authors try 4, 6
            and 8.
        thumbnail_first: the authors' code can have the thumbnail on either side; behind the video is its default.

    Raises:
        ValueError: the processor refuses the prompt, or frames are too small for the thumbnail.
    """
    few = frames[linspace_indices(frames.shape[0], min(count, frames.shape[0])).to(frames.device)]
    small = thumbnail(few, (frames.shape[-2], frames.shape[-1]))
    kinds, pictures = video_content(processor, [frames], [metadata])
    content = [{"type": "image"}, *kinds[0]] if thumbnail_first else [*kinds[0], {"type": "image"}]
    others = pictures.get("images", [])
    pictures["images"] = [small, *others] if thumbnail_first else [*others, small]
    content.append({"type": "text", "text": question})
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=[prompt], padding=True, padding_side="left", return_tensors="pt", **pictures)


def video_content(
    processor: Any, videos: Sequence[Tensor], metadata: Sequence[Mapping[str, Any]]
) -> tuple[list[list[dict[str, str]]], dict[str, Any]]:
    """How a processor is given videos: the content of a message for each, and the processor's arguments.

    Families that take images only, whose processors have no ``video_processor``, get the frames as images.

    Args:
        videos: uint8 ``[T, 3, H, W]`` each; all frames are used.
        metadata: of each video, as ``answer.video_metadata`` gives it.
    """
    if not hasattr(processor, "video_processor"):
        return [[{"type": "image"}] * len(video) for video in videos], {
            "images": [x for video in videos for x in video]
        }
    arguments = {"video_metadata": [dict(entry) for entry in metadata], "do_sample_frames": False}
    return [[{"type": "video"}] for _ in videos], {"videos": list(videos), **arguments}


def inject_timestamps(inputs: Any, processor: Any, config: Any, seconds: Sequence[Sequence[float]]) -> Any:
    """``inputs`` with the time of each frame as text, ``<12.5s>``, before the tokens of that frame.

    Time injection of DATE (2509.09263), for families whose positions do not tell the time; features go to the
    placeholders in order, whatever stands between. The authors, who use Qwen2.5-VL, put the text behind each frame and
    number M-RoPE positions anew. Frames that a patched model leaves out keep their text: choose them beforehand.

    Args:
        inputs: of the processor: ``input_ids`` and ``pixel_values_videos``, and any number of other tensors ``[B, L]``,
            which are 0 at inserted text (the kind of text among token types), ``attention_mask`` 1. Left as they are.
        config: the model's.
        seconds: of each frame of each video, in the order of the prompts.

    Returns:
        The same kind of mapping, its rows padded on the left.

    Raises:
        ValueError: a family that tells the time by itself, or one that is not supported; times that do not belong to
            the videos.
    """
    trailing = _trailing(config)
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    frames = inputs["pixel_values_videos"].shape[:2] if "pixel_values_videos" in inputs else (0, 0)
    counts = [len(times) for times in seconds]
    if not counts or counts != [frames[1]] * frames[0]:
        raise ValueError(f"there are times for {counts} frames, where the videos have {[frames[1]] * frames[0]}")
    starts = _frame_starts(ids == config.video_token_id, frames, trailing)
    texts = iter([f"<{float(second):.1f}s>" for times in seconds for second in times])
    rows = []
    for valid, starting in zip(mask.bool().tolist(), starts.tolist(), strict=True):
        row: list[int] = []  # where each token comes from; below zero, -1 - an inserted token
        for place in (place for place, is_valid in enumerate(valid) if is_valid):
            if starting[place]:
                row += [-1 - token for token in processor.tokenizer(next(texts), add_special_tokens=False)["input_ids"]]
            row.append(place)
        rows.append(row)
    length = max(map(len, rows))
    # Padding is an inserted token too, one that is not attended to.
    padding = [-1 - processor.tokenizer.pad_token_id]
    source = torch.tensor([padding * (length - len(row)) + row for row in rows], device=ids.device)
    attended = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=ids.device)
    changed = {
        name: value.gather(1, source.clamp(min=0)).masked_fill(source < 0, 0)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.shape == ids.shape
    }
    changed["input_ids"] = torch.where(source < 0, -1 - source, changed["input_ids"])
    changed["attention_mask"] = attended.to(mask.dtype)
    return type(inputs)({**inputs, **changed})


def _trailing(config: Any) -> tuple[int, ...]:
    """How many tokens may follow the frames of a video; refuses families that tell the time by themselves."""
    adapter = ADAPTERS.get(config.model_type)
    if adapter.remembers_rope or "video" not in adapter.kinds:
        why = "tells the time by itself" if adapter.remembers_rope else "takes images only: put text between them"
        names = [
            name
            for name, other in sorted(ADAPTERS.items().items())
            if not other.remembers_rope and "video" in other.kinds
        ]
        raise ValueError(f"{config.model_type} {why}; timestamps can be injected for: {', '.join(names)}")
    return ADAPTERS.get(config.model_type).trailing


def _frame_starts(placeholders: Tensor, frames: Sequence[int], trailing: Sequence[int]) -> Tensor:
    """``[B, L]`` True at the first token of each frame. All videos have as many frames, and as many tokens.

    Args:
        placeholders: ``[B, L]`` True at the tokens of videos.
        frames: how many videos, and frames of each.
    """
    size, rest = divmod(int(placeholders.sum()), frames[0])
    per_frame, behind = divmod(size, frames[1])
    if rest or not per_frame or behind not in trailing:
        raise ValueError(
            f"{int(placeholders.sum())} video tokens do not belong to {frames[0]} videos of {frames[1]} frames"
        )
    nth = (placeholders.flatten().cumsum(0) - 1).view_as(placeholders) % size
    return placeholders & (nth % per_frame == 0) & (nth < frames[1] * per_frame)
