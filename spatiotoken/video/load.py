"""Loading frames of a video file."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .backends import open_reader
from .reader import VideoReader
from .selection import FrameSelector, Selection, check_rate, moments, select_from
from .types import Video, VideoMetadata, read_error

if TYPE_CHECKING:
    from spatiotoken.frames.encoders import FrameEncoder


def probe_video(path: str | os.PathLike[str], backend: str = "auto") -> VideoMetadata:
    """Describe the video stream that `load_video` would read. Raises as `load_video` does."""
    with open_reader(path, backend) as reader:
        return reader.metadata


def load_video(
    path: str | os.PathLike[str],
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    indices: Sequence[int] | None = None,
    backend: str = "auto",
    selector: FrameSelector | None = None,
    question: str | None = None,
    candidate_fps: float = 1.0,
    keyframes_only: bool = False,
    encoder: FrameEncoder | None = None,
) -> Video:
    """Read frames of the best video stream of a file: all of them, or those asked for in one of four ways.

    Frame `i` is the i-th frame that a player shows, from 0; frames cut off by an mp4's edit list are not shown.
    Every frame returned is the very one that decoding the whole stream gives. Memory taken is that of the frames
    returned and what the decoder needs for itself, whatever the length of the file.

    Args:
        path: a local file.
        num_frames: so many frames, the centres of equal parts of the video: index `floor((i + 0.5) * N / num_frames)`.
        fps: the frames on screen at 0, 1/fps, 2/fps, ... seconds, each once even where it stays on screen for longer.
        indices: these frames; strictly increasing.
        backend: "auto", "torchcodec", "pyav" or "decord"; see `VideoMetadata.backend` for the one "auto" took.
        selector: a method of the `frames` stage (`load_config("kmeans").frames`). It is told of small versions of the
            frames on screen every 1/candidate_fps seconds, and chooses those to return; the video is decoded twice. Of
            a short video it is shown more, so that there are twice as many as it may choose; and all frames where it
            wants to know nothing but their times.
        question: what is asked, for selectors that compare frames with it.
        candidate_fps: with `selector`, how many candidates it is given per second.
        keyframes_only: with `selector`, the stream's key frames are the candidates instead, which on long videos takes
            a tenth of the time; how many there are is the encoder's choice (often one in some seconds).
        encoder: what describes candidates, opened before (`spatiotoken.frames.encoders`), for use on many videos; by
            default the selector's scorer.

    Raises:
        ValueError: contradicting or impossible arguments.
        ImportError: the backend is not installed.
        VideoReadError: the file cannot be read, is damaged where a frame is wanted, or has fewer frames than asked.
    """
    _check_arguments(num_frames, fps, indices, selector, candidate_fps)
    with open_reader(path, backend) as reader:
        about = reader.metadata
        if selector is not None:
            rate = None if keyframes_only else candidate_fps
            return _read_chosen(reader, select_from(reader, selector, question, rate, encoder))
        if indices is not None:
            chosen = [int(index) for index in indices]
            if chosen[-1] >= about.num_frames:
                raise ValueError(f"{about.path}: index {chosen[-1]} is out of range, it has {about.num_frames} frames")
        elif num_frames is not None:
            _check_enough(about, num_frames)
            chosen = [(2 * i + 1) * about.num_frames // (2 * num_frames) for i in range(num_frames)]
        elif fps is not None:
            chosen = _unique(reader.shown_at(moments(about.duration, fps)))
        else:
            chosen = list(range(about.num_frames))
        return _read(reader, chosen)


def load_thumbnails(
    path: str | os.PathLike[str], indices: Sequence[int], *, short_side: int, backend: str = "auto"
) -> Tensor:
    """uint8 [K, 3, h, w] of these frames, with a shorter side of at most `short_side`. Raises as `load_video` does."""
    with open_reader(path, backend) as reader:
        return torch.stack([frame for frame, _ in reader.read_small(indices, short_side)])


def _check_arguments(
    num_frames: int | None,
    fps: float | None,
    indices: Sequence[int] | None,
    selector: FrameSelector | None,
    candidate_fps: float,
) -> None:
    asked = {"num_frames": num_frames, "fps": fps, "indices": indices, "selector": selector}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"give at most one of num_frames, fps, indices and selector, not {' and '.join(given)}")
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, not {num_frames}")
    for name, rate in (("fps", fps), ("candidate_fps", candidate_fps)):
        if rate is not None:
            check_rate(name, rate)
    if indices is not None:
        for index in indices:
            operator.index(index)
        if len(indices) == 0:
            raise ValueError("indices must not be empty")
        if indices[0] < 0 or any(b <= a for a, b in zip(indices, indices[1:], strict=False)):
            raise ValueError("indices must be strictly increasing and not negative")


def _check_enough(about: VideoMetadata, asked: int) -> None:
    if asked > about.num_frames:
        raise read_error(about.path, f"{asked} frames were asked for, but there are {about.num_frames}")


def _unique(ascending: list[int]) -> list[int]:
    return list(dict.fromkeys(ascending))


def _read_chosen(reader: VideoReader, selection: Selection) -> Video:
    """The chosen frames in full, at the size and mixed as the selector says.

    Raises:
        ValueError: they are of several sizes.
    """
    choice = selection.choice
    sizes = set(choice.scales or (1.0,))
    if len(sizes) > 1:
        raise ValueError(
            "the selector wants frames of several sizes, which one tensor cannot hold: give it to patch_model, which "
            "makes them small inside the model"
        )
    if choice.mixing is None:
        video = _read(reader, selection.indices)
    else:
        video = _read_mixed(reader, selection, choice.mixing)
    (scale,) = sizes
    if scale == 1:
        return video
    size = [max(1, int(side * scale)) for side in video.frames.shape[2:]]
    small = [interpolate(frame[None].float(), size, mode="bicubic", antialias=True)[0] for frame in video.frames]
    return replace(video, frames=torch.stack(small).round().clamp(0, 255).to(torch.uint8))


def _read_mixed(reader: VideoReader, selection: Selection, mixing: Tensor) -> Video:
    """Each chosen frame as the mean of several candidates, which are read one at a time."""
    about = reader.metadata
    used = mixing.any(dim=0).nonzero()[:, 0].tolist()
    total = torch.zeros(len(selection.indices), 3, about.height, about.width)
    for position, (frame, _) in zip(used, reader.read([selection.candidates[at] for at in used]), strict=True):
        for row in mixing[:, position].nonzero()[:, 0].tolist():
            total[row].add_(frame, alpha=float(mixing[row, position]))
    times = torch.tensor([selection.seconds[at] for at in selection.choice.indices], dtype=torch.float64)
    return Video(total.round_().clamp_(0, 255).to(torch.uint8), times, selection.indices, about)


def _read(reader: VideoReader, indices: Sequence[int]) -> Video:
    about = reader.metadata
    frames = torch.empty((len(indices), 3, about.height, about.width), dtype=torch.uint8)
    times = torch.empty(len(indices), dtype=torch.float64)
    for row, (frame, time) in enumerate(reader.read(indices)):
        if frame.shape != frames.shape[1:]:
            raise read_error(about.path, f"frame {indices[row]} is of another size than the first")
        frames[row] = frame
        times[row] = time
    return Video(frames=frames, timestamps=times, indices=tuple(indices), metadata=about)
