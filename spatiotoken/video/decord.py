"""Reading through decord, which is no longer maintained: for those who ask for it or have nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from traceback import clear_frames

import torch
from torch import Tensor

from .reader import BackendUnavailableError, NotExactError, VideoReader, is_indexed_container, last_presented
from .types import VideoMetadata, read_error

# When and where in its C++ source an error arose, which decord's messages are strewn with.
_CPP_PLACE = re.compile(r"\[[\d:]+\] \S+:\d+: ")
# decord repeats a frame in place of one that is missing. This share of the frames being repeated is an error: none.
_NO_REPEATS = 1e-9


class DecordReader(VideoReader):
    """Reading with decord from the start on, frame after frame: its seeking returns wrong frames on open GOPs.

    decord does not say which frame it decoded, only when each should be presented, so what can be checked is:

    - times that are not ascending from 0: NotExactError. Catches mp4 cut with an edit list (the frames cut off have
      negative times) and files whose times are made up (AVI) or partly missing.
    - containers other than MP4/MOV and Matroska/WebM: NotExactError. On MPEG-TS decord's times look right, but it
      leaves out the first GOP, so the container itself has to be the sign.
    - a frame that decord repeats for want of the right one: VideoReadError, when reading comes to it.

    Not caught: frames missing in the midst of a stream while the times declared stay ascending; and the choice among
    several video streams, which is FFmpeg's, not necessarily the one with most pixels.
    """

    def __init__(self, path: str) -> None:
        try:
            import decord
        except (ImportError, OSError, RuntimeError) as error:
            raise BackendUnavailableError(f"backend 'decord' needs decord (pip install decord): {error}") from error
        self._decord = decord
        self._path = path
        if not is_indexed_container(path):
            raise NotExactError(f"{path}: decord is exact only on MP4/MOV and Matroska/WebM")
        self._restart()
        with self._named_errors():
            frames = len(self._reader)
            times = torch.from_numpy(self._reader.get_frame_timestamp(list(range(frames)))).double()
            shape = self._reader.next().shape
        starts = times[:, 0]
        if starts[0] != 0 or not bool((starts.diff() > 0).all()):
            raise NotExactError(
                f"{path}: decord's presentation times do not ascend from 0, so its frames are not those a player shows"
            )
        self._times: list[float] = starts.tolist()
        duration = float(times[-1, 1])
        self.metadata = VideoMetadata(
            path=path,
            backend="decord",
            num_frames=frames,
            fps=frames / duration if duration else 0.0,
            duration=duration,
            height=shape[0],
            width=shape[1],
            rotation=None,
            codec=None,
            stream_index=None,
        )
        self._restart()

    def shown_at(self, times: Sequence[float]) -> list[int]:
        return last_presented(self._times, times)

    def times(self) -> Sequence[float]:
        return self._times

    def read(self, indices: Sequence[int]) -> Iterator[tuple[Tensor, float]]:
        for index in indices:
            if index < self._next:
                self._restart()
            with self._named_errors():
                while self._next <= index:
                    frame = self._reader.next()
                    self._next += 1
            yield torch.from_numpy(frame.asnumpy()).permute(2, 0, 1), self._times[index]

    def close(self) -> None:
        self.__dict__.pop("_reader", None)

    def _restart(self) -> None:
        with self._named_errors():
            self._reader = self._decord.VideoReader(
                self._path, num_threads=torch.get_num_threads(), fault_tol=_NO_REPEATS
            )
        self._next = 0

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (self._decord.DECORDError, RuntimeError, StopIteration) as error:
            clear_frames(error.__traceback__)  # they hold the reader, and it the file
            cause = _CPP_PLACE.sub("", str(error)) or "the stream ended before the last frame"
            raise read_error(self._path, cause) from error
