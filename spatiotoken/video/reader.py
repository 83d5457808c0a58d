"""The interface every backend implements, and what the backends share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .types import VideoMetadata, VideoReadError

# Matroska keeps times in whole milliseconds, so a frame due at 2/30 s is stored as presented at 0.067 s: without
# this allowance "the frame shown at 2/30 s" would be the one before.
TIME_ROUNDING = 0.0005 + 1e-6


class BackendUnavailableError(ImportError):
    """A backend's library is not installed, or is installed but cannot be loaded."""


class NotExactError(VideoReadError):
    """The backend may be able to decode the file, but cannot promise to return the very frames asked for."""


class VideoReader(ABC):
    """One open video stream.

    Frame `i` is the i-th frame a player shows, counted from 0 in presentation order. Frames that the file's edit
    list cuts off (an mp4 cut with `ffmpeg -ss ... -c copy` still holds them, back to the preceding key frame) are not
    shown and not counted. Times are seconds since frame 0 was presented.
    """

    metadata: VideoMetadata

    @abstractmethod
    def shown_at(self, times: Sequence[float]) -> list[int]:
        """The index of the frame on screen at each of `times` (ascending, >= 0): the last one presented by then."""

    @abstractmethod
    def times(self) -> Sequence[float]:
        """When each frame is presented. Without decoding where the file is indexed by presentation time."""

    def keyframes(self) -> list[int]:
        """Frames that are coded without others, which decode several times as fast as a run of frames does.

        Raises:
            ValueError: this reader cannot tell, or not for this file.
        """
        raise ValueError(f"{self.metadata.path}: backend {self.metadata.backend!r} does not tell which are key frames")

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Iterator[tuple[Tensor, float]]:
        """Yield (uint8 [3, H, W], time) of each frame of the strictly increasing, valid `indices`, one at a time.

        Raises:
            VideoReadError: a frame cannot be decoded, or is not the one that was asked for.
        """

    def read_small(self, indices: Sequence[int], short_side: int) -> Iterator[tuple[Tensor, float]]:
        """As `read`, with frames whose shorter side is longer than `short_side` averaged down to that."""
        size = small_size(self.metadata.height, self.metadata.width, short_side)
        for frame, time in self.read(indices):
            if frame.shape[1:] != size:
                frame = interpolate(frame[None].float(), size, mode="area").round().to(torch.uint8)[0]
            yield frame, time

    @abstractmethod
    def close(self) -> None:
        """Release the file."""

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def small_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width at which the shorter side is at most `short_side`."""
    scale = min(1.0, short_side / min(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def last_presented(starts: Sequence[float], times: Sequence[float]) -> list[int]:
    """For each of `times` the index of the last of the ascending `starts` at or before it."""
    return [max(bisect_right(starts, time + TIME_ROUNDING) - 1, 0) for time in times]


def is_indexed_container(path: str) -> bool:
    """Whether the file is MP4/MOV or Matroska/WebM, by its first bytes.

    These store every frame's presentation time. In others (MPEG-TS, AVI, raw streams) times are missing or guessed,
    and torchcodec and decord were measured to return wrong frames from them.
    """
    with open(path, "rb") as file:
        head = file.read(12)
    matroska = head[:4] == b"\x1aE\xdf\xa3"
    mp4 = head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
    return matroska or mp4


def ends_early(declared_frames: int | None, declared_seconds: float | None, frames: int, seconds: float) -> bool:
    """Whether a file holds less than its header declares, which is so when its end is missing.

    Fewer frames alone do not tell: those an edit list cuts off are declared too, but then the time is not shorter.
    """
    if not declared_frames or not declared_seconds or frames >= declared_frames:
        return False
    return seconds < declared_seconds - 1.5 * seconds / frames
