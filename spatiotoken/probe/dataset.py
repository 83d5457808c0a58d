"""Probe videos with a question each: as tensors one by one, as a Hugging Face dataset, or as files with real video."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spatiotoken.probe.questions import briefed_questions, evidence
from spatiotoken.probe.render import render
from spatiotoken.probe.scenes import FAMILIES, FPS, SIDE, sample_scenes

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Example:
    """A video with one question.

    Attributes:
        sample: number of the scene.
        options: the answers that the question's text allows, all equally likely.
        frames: uint8 ``[T, 3, 64, 64]``.
        evidence: int64 ``[things, T, 4]`` boxes ``(top, left, bottom, right)`` that show the answer, in pixels with
            exclusive ends; all zero where there is nothing to see.
    """

    sample: int
    family: str
    question: str
    answer: str
    options: tuple[str, ...]
    frames: Tensor
    evidence: Tensor


def scene_seed(seed: int, split: str) -> int:
    """The seed for ``sample_scenes``: no two pairs of seed and split share one.

    Raises:
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known are {', '.join(SPLITS)}")
    return len(SPLITS) * seed + SPLITS.index(split)


def examples(
    split: str,
    size: int,
    *,
    seed: int = 0,
    num_frames: int = 16,
    families: Collection[str] | None = None,
    first: int = 0,
    batch: int = 64,
) -> Iterator[Example]:
    """``size`` examples of a split, made while they are taken: memory is that of one batch.

    Args:
        num_frames: of each video, at least 8.
        families: of questions; all of them unless given. They take turns, as do the answers of each.
        first: how many examples to pass over.
        batch: examples made at a time; it does not change them.

    Raises:
        ValueError: an argument is out of range or unknown, told at once and not with the first example.
    """
    if size < 1 or batch < 1:
        raise ValueError(f"size and batch must be at least 1, got {size} and {batch}")
    if first < 0:
        raise ValueError(f"first must be at least 0, got {first}")
    chosen = set(FAMILIES if families is None else families)
    unknown = sorted(chosen - set(FAMILIES))
    if unknown or not chosen:
        raise ValueError(f"families must be some of {', '.join(FAMILIES)}, got {', '.join(unknown) or 'none'}")
    scenes_seed = scene_seed(seed, split)
    sample_scenes(scenes_seed, torch.tensor([0]), num_frames=num_frames)  # raises what it would raise later
    turns = torch.tensor([index for index, name in enumerate(FAMILIES) if name in chosen])
    return _made(scenes_seed, turns, range(first, first + size), num_frames, batch)


def _made(scenes_seed: int, turns: Tensor, wanted: range, num_frames: int, batch: int) -> Iterator[Example]:
    """Examples whose sample numbers, modulo the number of families, are ``turns`` over and over."""
    for begin in wanted[::batch]:
        places = torch.arange(begin, min(begin + batch, wanted.stop))
        samples = places // len(turns) * len(FAMILIES) + turns[places % len(turns)]
        scenes = sample_scenes(scenes_seed, samples, num_frames=num_frames)
        videos, boxes = render(scenes), scenes.boxes()
        for row, (sample, question) in enumerate(zip(samples.tolist(), briefed_questions(scenes), strict=True)):
            yield Example(
                sample=sample,
                family=question.family,
                question=question.text,
                answer=question.answer,
                options=question.options,
                frames=videos[row].clone(),  # a view would keep the whole batch in memory
                evidence=evidence(boxes[row], question),
            )


def probe_dataset(
    split: str,
    size: int,
    *,
    seed: int = 0,
    num_frames: int = 16,
    families: Collection[str] | None = None,
) -> Dataset:
    """The same examples as a dataset in memory (12 kB a frame); nothing is written to the cache directory.

    Columns: ``sample``, ``family``, ``question``, ``answer``, ``options``, ``fps``, ``evidence``, a list of
    ``{frame, top, left, bottom, right}`` in pixels with exclusive ends, and ``video``, uint8 ``[T, 3, 64, 64]``.

    Raises:
        ValueError: as ``examples``.
    """
    import datasets

    box = {name: datasets.Value("int32") for name in ("frame", "top", "left", "bottom", "right")}
    text = datasets.Value("string")
    features = datasets.Features(
        sample=datasets.Value("int64"),
        family=text,
        question=text,
        answer=text,
        options=datasets.List(text),
        fps=datasets.Value("float64"),
        evidence=datasets.List(box),
        video=datasets.Array4D((num_frames, 3, SIDE, SIDE), "uint8"),
    )
    name = datasets.NamedSplit(split)
    rows = (
        _described(example) | {"video": example.frames.numpy()}
        for example in examples(split, size, seed=seed, num_frames=num_frames, families=families)
    )
    # In parts, for Arrow counts the numbers in one array with 32 bits, and a generator's dataset would be cached on
    # disk under a name that does not change with this module.
    parts = []
    while part := list(islice(rows, 64)):
        parts.append(datasets.Dataset.from_list(part, features=features, split=name))
    return datasets.concatenate_datasets(parts, split=name)


def write_videos(
    directory: str | os.PathLike[str],
    split: str,
    size: int,
    *,
    seed: int = 0,
    num_frames: int = 16,
    families: Collection[str] | None = None,
    scale: int = 4,
) -> Path:
    """Write the same examples as video files, ``000123.mp4`` for sample 123, and ``questions.jsonl``.

    A line of that has ``file``, ``sample``, ``family``, ``question``, ``answer``, ``options``, ``fps``, ``evidence`` (a
    list of ``{frame, top, left, bottom, right}``) and ``side``, the size of the square picture in whose pixels the
    boxes are. It is written last: without it a directory is not complete.

    Args:
        scale: as ``write_video``.

    Returns:
        The path of ``questions.jsonl``.

    Raises:
        FileExistsError: the directory is not empty, or not a directory.
        ValueError: as ``examples`` and ``write_video``.
    """
    folder = Path(directory)
    made = examples(split, size, seed=seed, num_frames=num_frames, families=families)
    _check_scale(SIDE, SIDE, scale)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; videos are written to a new or empty directory only")
    lines = []
    for example in made:
        file = f"{example.sample:06d}.mp4"
        write_video(folder / file, example.frames, FPS, scale)
        lines.append(json.dumps({"file": file} | _described(example) | {"side": SIDE}) + "\n")
    path, unfinished = folder / "questions.jsonl", folder / "questions.jsonl.part"
    unfinished.write_text("".join(lines), encoding="utf-8")
    unfinished.replace(path)
    return path


def write_video(path: str | os.PathLike[str], frames: Tensor, fps: float, scale: int = 4) -> None:
    """Write nearly lossless H.264. The same build of the encoder gives the same bytes.

    Args:
        frames: uint8 RGB ``[T, 3, H, W]``.
        fps: frames per second.
        scale: times that each pixel is repeated in both directions. With 2 or more, halved colour resolution hardly
            costs colour.

    Raises:
        ValueError: frames of another type or shape, none, or with an odd number of pixels in a direction once scaled;
            a rate or scale that is not positive.
    """
    import av

    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or not frames.numel():
        raise ValueError(f"frames must be uint8 [T, 3, H, W], got {frames.dtype} {list(frames.shape)}")
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    height, width = _check_scale(frames.shape[2], frames.shape[3], scale)
    pictures = frames.permute(0, 2, 3, 1).repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    # `bitexact` leaves versions out of the file; with more threads the bits would depend on the machine.
    with av.open(os.fspath(path), "w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(
            "libx264",
            rate=Fraction(fps).limit_denominator(1001),
            options={"crf": "8", "flags": "+bitexact", "threads": "1"},
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number, picture in enumerate(pictures.cpu().numpy()):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def clip_metadata(frames: int) -> dict[str, Any]:
    """What processors want to know of a probe video."""
    return {"fps": FPS, "frames_indices": list(range(frames)), "total_num_frames": frames}


def _check_scale(height: int, width: int, scale: int) -> tuple[int, int]:
    """The scaled size in pixels."""
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    if height * scale % 2 or width * scale % 2:
        raise ValueError(f"{height} x {width} pixels at scale {scale} make an odd number, which yuv420p cannot hold")
    return height * scale, width * scale


def _described(example: Example) -> dict[str, Any]:
    """What there is to say about an example beside its video."""
    boxes = [
        {"frame": time, "top": top, "left": left, "bottom": bottom, "right": right}
        for time, things in enumerate(example.evidence.transpose(0, 1).tolist())
        for top, left, bottom, right in things
        if bottom > top
    ]
    return {
        "sample": example.sample,
        "family": example.family,
        "question": example.question,
        "answer": example.answer,
        "options": list(example.options),
        "fps": FPS,
        "evidence": boxes,
    }
