"""Loading frames of a video file."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from .backends import open_reader
from .features import frame_features
from .reader import VideoReader
from .types import Video, VideoMetadata, read_error

if TYPE_CHECKING:
    from spatiotoken.structures import FrameChoice, Frames


_MAX_FPS = 1000
"""More than any camera's rate; beyond it a typing error would fill the memory with times."""


class FrameSelector(Protocol):
    """Chooses frames by their features and times."""

    def select(self, frames: Frames) -> FrameChoice: ...


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
    candidate_fps: float = 1.0,
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
        selector: looks at small versions (`frame_features`) of the frames on screen every 1/candidate_fps seconds,
            and chooses those to return; the video is decoded twice.
        candidate_fps: with `selector`, how many candidates it is given per second.

    Raises:
        ValueError: contradicting or impossible arguments.
        ImportError: the backend is not installed.
        VideoReadError: the file cannot be read, is damaged where a frame is wanted, or has fewer frames than asked.
    """
    _check_arguments(num_frames, fps, indices, selector, candidate_fps)
    with open_reader(path, backend) as reader:
        about = reader.metadata
        if selector is not None:
            chosen = _select(reader, selector, candidate_fps)
        elif indices is not None:
            chosen = [int(index) for index in indices]
            if chosen[-1] >= about.num_frames:
                raise ValueError(f"{about.path}: index {chosen[-1]} is out of range, it has {about.num_frames} frames")
        elif num_frames is not None:
            _check_enough(about, num_frames)
            chosen = [(2 * i + 1) * about.num_frames // (2 * num_frames) for i in range(num_frames)]
        elif fps is not None:
            chosen = _unique(reader.shown_at(_times(about.duration, fps)))
        else:
            chosen = list(range(about.num_frames))
        return _read(reader, chosen)


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
        if rate is not None and not 0 < rate <= _MAX_FPS:
            raise ValueError(f"{name} must be positive and at most {_MAX_FPS}, not {rate}")
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


def _times(duration: float, fps: float) -> list[float]:
    """0, 1/fps, 2/fps, ... seconds, before the end of the video and at least one."""
    # A time nearer the end than float arithmetic can tell is the end.
    return [step / fps for step in range(max(1, math.ceil((duration - 1e-6) * fps)))]


def _unique(ascending: list[int]) -> list[int]:
    return list(dict.fromkeys(ascending))


def _select(reader: VideoReader, selector: FrameSelector, candidate_fps: float) -> list[int]:
    """Indices of the frames that the selector chooses among the candidates, of which only features are kept."""
    from spatiotoken.structures import Frames

    candidates = _unique(reader.shown_at(_times(reader.metadata.duration, candidate_fps)))
    features = []
    times = []
    for frame, time in reader.read(candidates):
        features.append(frame_features(frame[None])[0])
        times.append(time)
    frames = Frames(features=torch.stack(features), timestamps=torch.tensor(times, dtype=torch.float64))
    choice = list(selector.select(frames).indices)
    if not choice or choice[0] < 0 or choice[-1] >= len(candidates) or choice != sorted(set(choice)):
        raise ValueError(f"the selector chose {choice}, not strictly increasing indices among {len(candidates)} frames")
    return [candidates[i] for i in choice]


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
