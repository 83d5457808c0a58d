"""The frames that a question is asked about: of a video file, of a part of it, or of a directory of frames."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from spatiotoken.evaluation.base import Clip, Question
from spatiotoken.frames import FrameSelector
from spatiotoken.video import Video, VideoReadError, load_video
from spatiotoken.video.backends import open_reader

_PICTURES = frozenset({".jpg", ".jpeg", ".png"})
_FRAMES_FPS = 3.0
"""Of directories that say nothing else: the rate of TVQA's, the only ones among the datasets."""


def spread_over(num_frames: int, first: int, last: int) -> list[int]:
    """At most ``num_frames`` indices at equal distances, ``first`` and ``last`` among them, as evaluations take them.

    One frame is the first. Halves are rounded to even numbers, as numpy's ``linspace().round()`` does.
    """
    count = min(num_frames, last - first + 1)
    if count == 1:
        return [first]
    return [first + round(step * (last - first) / (count - 1)) for step in range(count)]


def read_clip(question: Question, num_frames: int) -> Clip:
    """At most ``num_frames`` frames at equal distances over the question's part of its video, both ends among them.

    Raises:
        VideoReadError: the file or directory is missing, damaged or empty, or the part lies behind its end.
    """
    if question.video.is_dir():
        return _read_pictures(question, num_frames)
    with open_reader(question.video, "auto") as reader:
        about = reader.metadata
        first, last = 0, about.num_frames - 1
        if question.span is not None:
            # The rate may vary, so the reader is asked which frames are on screen then.
            first, last = reader.shown_at(_within(question, about.duration))
    return _clip(load_video(question.video, indices=spread_over(num_frames, first, last)))


def select_clip(question: Question, selector: FrameSelector, candidate_fps: float) -> Clip:
    """The frames that a method chooses while the file is decoded.

    Raises:
        VideoReadError: the file cannot be read; or it is a directory, or only a part of it is asked about.
    """
    if question.video.is_dir() or question.span is not None:
        raise VideoReadError(
            f"{question.video}: frames are chosen while decoding only in whole video files; leave --candidate-fps out"
        )
    return _clip(load_video(question.video, selector=selector, question=question.prompt, candidate_fps=candidate_fps))


def _clip(video: Video) -> Clip:
    return Clip(video.frames, tuple(video.timestamps.tolist()), video.indices, video.metadata.duration)


def _within(question: Question, duration: float) -> tuple[float, float]:
    """Beginning and end of the part that is asked about, in seconds."""
    assert question.span is not None
    start, end = question.span
    if not 0 <= start < min(end, duration):
        raise VideoReadError(f"{question.video}: {start} to {end} seconds are no part of its {duration:.1f} seconds")
    return start, min(end, duration)


def _read_pictures(question: Question, num_frames: int) -> Clip:
    directory, fps = question.video, question.fps or _FRAMES_FPS
    files = sorted((file for file in directory.iterdir() if file.suffix.lower() in _PICTURES), key=_number)
    if not files:
        raise VideoReadError(f"{directory}: there are no pictures in it")
    first, last = 0, len(files) - 1
    if question.span is not None:
        start, end = _within(question, len(files) / fps)
        first, last = min(round(start * fps), last), min(round(end * fps), last)
    indices = spread_over(num_frames, first, last)
    frames = _stacked([files[index] for index in indices])
    return Clip(frames, tuple(index / fps for index in indices), tuple(indices), len(files) / fps)


def _number(file: Path) -> tuple[int, str]:
    """Order of frames whose numbers are not filled up with zeros."""
    digits = re.findall(r"\d+", file.stem)
    return (int(digits[-1]) if digits else 0), file.name


def _stacked(files: Sequence[Path]) -> Tensor:
    pictures = []
    for file in files:
        try:
            with Image.open(file) as picture:
                pictures.append(pil_to_tensor(picture.convert("RGB")))
        except (OSError, UnidentifiedImageError) as error:
            raise VideoReadError(f"{file}: {' '.join(str(error).split())}") from error
        if pictures[-1].shape != pictures[0].shape:
            raise VideoReadError(f"{file}: it is of another size than {files[0].name}")
    return torch.stack(pictures)
