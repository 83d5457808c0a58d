"""What a read video is, and the one error for a file that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class VideoReadError(ValueError):
    """A video file that cannot be read as asked; the message names the file and the cause in one line."""


def read_error(path: str, cause: object) -> VideoReadError:
    """The error for `path`, with decoders' several-line messages folded into one line."""
    return VideoReadError(f"{path}: {' '.join(str(cause).split())}")


@dataclass(frozen=True)
class VideoMetadata:
    """What is known of the video stream that is read.

    Attributes:
        path: the file.
        backend: the reader that was used: "torchcodec", "pyav" or "decord".
        num_frames: exact number of frames shown, which is the number of valid frame indices.
        fps: average rate, `num_frames / duration`, frames per second.
        duration: seconds from the first frame's appearance to the last frame's end.
        height: of a frame in pixels, after rotation.
        width: of a frame in pixels, after rotation.
        rotation: degrees counterclockwise by which frames were turned to come out upright;
            None where the reader does not tell (decord; it does turn them).
        codec: the codec's name; None where the reader does not tell (decord).
        stream_index: index of the stream among all the file's streams; None where the reader does not tell (decord).
    """

    path: str
    backend: str
    num_frames: int
    fps: float
    duration: float
    height: int
    width: int
    rotation: int | None
    codec: str | None
    stream_index: int | None


@dataclass(frozen=True, eq=False)
class Video:
    """Frames read from a video.

    Attributes:
        frames: uint8 tensor [T, 3, H, W], RGB, upright.
        timestamps: float64 tensor [T], seconds since the first frame of the video was presented.
        indices: the T frames' indices in presentation order, strictly increasing; 0 is the first frame shown.
        metadata: the stream they are from.
    """

    frames: Tensor
    timestamps: Tensor
    indices: tuple[int, ...]
    metadata: VideoMetadata
