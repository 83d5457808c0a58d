"""Reading through torchcodec, which uses the FFmpeg libraries installed on the system."""

from __future__ import annotations

import re
from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import count
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor

from .reader import (
    TIME_ROUNDING,
    BackendUnavailableError,
    NotExactError,
    VideoReader,
    ends_early,
    is_indexed_container,
)
from .types import VideoMetadata, read_error

# Where in its C++ source an error arose, which torchcodec's messages begin with.
_CPP_PLACE = re.compile(r"^\w+, \S+:\d+, ")
# A stream in one of these may be cover art, and torchcodec does not tell cover art from video.
_STILL_CODECS = {"bmp", "gif", "mjpeg", "png", "tiff", "webp"}
# VP8 keeps pictures that are never shown as packets of their own, which torchcodec counts as frames.
_HIDDEN_PICTURE_CODECS = {"vp8"}


class TorchCodecReader(VideoReader):
    """Reading with torchcodec's `seek_mode="exact"`, where that is exact. It conceals damage within a stream.

    Refused with NotExactError: containers other than MP4/MOV and Matroska/WebM (MPEG-TS cannot be decoded, AVI gives
    wrong frames), streams that may be cover art, VP8, and files whose first frame cannot be decoded, where every
    index is off.
    """

    def __init__(self, path: str) -> None:
        try:
            decoder: Any = import_module("torchcodec.decoders").VideoDecoder
        except (ImportError, OSError, RuntimeError) as error:
            cause = " ".join(str(error).split())[:300]
            raise BackendUnavailableError(
                f"backend 'torchcodec' needs torchcodec (pip install torchcodec) and FFmpeg's libraries: {cause}"
            ) from error
        self._path = path
        if not is_indexed_container(path):
            raise NotExactError(f"{path}: torchcodec is exact only on MP4/MOV and Matroska/WebM")
        stream = self._best_stream(decoder)
        with self._named_errors():
            self._decoder = decoder(
                path, stream_index=stream, num_ffmpeg_threads=torch.get_num_threads(), seek_mode="exact"
            )
            about = self._decoder.metadata
            self._begin = float(about.begin_stream_seconds)
            duration = float(about.end_stream_seconds) - self._begin
            frames = len(self._decoder)
            first = self._decoder.get_frame_at(0)
        if not hasattr(about, "rotation"):
            raise BackendUnavailableError(
                "backend 'torchcodec' needs a newer torchcodec: this one does not turn frames"
            )
        if round(about.rotation or 0) % 90:
            raise NotExactError(f"{path}: torchcodec does not turn frames by {about.rotation} degrees")
        if abs(first.pts_seconds - self._begin) > 1e-9:
            raise NotExactError(f"{path}: torchcodec cannot decode the first frame, so its frame indices are off")
        if ends_early(about.num_frames_from_header, about.duration_seconds_from_header, frames, duration):
            raise read_error(path, "it is damaged or its end is missing")
        # Ascending (time, index) of the frames whose times are known: torchcodec tells a frame's time with the frame.
        self._known = [(0.0, 0)]
        self.metadata = VideoMetadata(
            path=path,
            backend="torchcodec",
            num_frames=frames,
            fps=frames / duration if duration else 0.0,
            duration=duration,
            height=first.data.shape[1],
            width=first.data.shape[2],
            rotation=round(about.rotation or 0),
            codec=about.codec,
            stream_index=self._decoder.stream_index,
        )

    def shown_at(self, times: Sequence[float]) -> list[int]:
        """The frame on screen at each time, found by decoding: one or two frames a time where the rate is constant."""
        self._time(self.metadata.num_frames - 1)
        return [self._find(time) for time in times]

    def times(self) -> Sequence[float]:
        # It tells a frame's time only with the frame.
        return [self._time(index) for index in range(self.metadata.num_frames)]

    def read(self, indices: Sequence[int]) -> Iterator[tuple[Tensor, float]]:
        before = -1.0
        for index in indices:
            with self._named_errors():
                frame = self._decoder.get_frame_at(index)
            time = frame.pts_seconds - self._begin
            if time <= before:
                raise read_error(self._path, f"torchcodec gave frame {index} out of order, at {time} s")
            before = time
            yield frame.data, time

    def close(self) -> None:
        self.__dict__.pop("_decoder", None)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, IndexError) as error:
            clear_frames(error.__traceback__)  # they hold the decoder, and it the file
            raise read_error(self._path, _CPP_PLACE.sub("", str(error))) from error

    def _best_stream(self, decoder: Any) -> int:
        """Index of the video stream with most pixels, then most frames declared."""
        found = []
        for index in count():
            try:
                about = decoder(self._path, stream_index=index, seek_mode="approximate").metadata
            except (RuntimeError, ValueError) as error:
                if "not a video stream" in str(error):
                    continue
                if "not a valid stream" in str(error):
                    break
                raise NotExactError(
                    f"{self._path}: torchcodec cannot list its streams: {' '.join(str(error).split())}"
                ) from error
            if about.codec in _STILL_CODECS | _HIDDEN_PICTURE_CODECS:
                raise NotExactError(f"{self._path}: torchcodec is not exact with a {about.codec} stream")
            found.append(((about.width or 0) * (about.height or 0), about.num_frames_from_header or 0, -index))
        if not found:
            raise read_error(self._path, "it has no video stream")
        return -max(found)[2]

    def _time(self, index: int) -> float:
        with self._named_errors():
            time: float = self._decoder.get_frame_at(index).pts_seconds - self._begin
        if (time, index) not in self._known:
            insort(self._known, (time, index))
        return time

    def _find(self, time: float) -> int:
        """Close in on the frame: guess it as if the rate were constant, look at its neighbour, and halve, in turn."""
        time += TIME_ROUNDING
        for step in count():
            at = bisect_right(self._known, time, key=lambda known: known[0])
            low_time, low = self._known[at - 1]
            if at == len(self._known):
                return low
            high_time, high = self._known[at]
            if high == low + 1:
                return low
            if step % 3 == 0:
                guess = low + int((time - low_time) / (high_time - low_time) * (high - low))
            elif step % 3 == 1:
                guess = low + 1
            else:
                guess = (low + high) // 2
            self._time(min(max(guess, low + 1), high - 1))
        raise AssertionError("unreachable")
