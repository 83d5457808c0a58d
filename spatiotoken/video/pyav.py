"""Reading through PyAV, which brings its own FFmpeg."""

from __future__ import annotations

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .reader import BackendUnavailableError, VideoReader, ends_early, last_presented, small_size
from .types import VideoMetadata, read_error

if TYPE_CHECKING:
    from av import Packet, VideoFrame, VideoStream
    from av.container import InputContainer

logger = logging.getLogger(__name__)

# How many frames at the head are decoded to check that packets' times are frames' times.
_HEAD = 8
# How many key frames a seek tries, going back, before the file is read from its start.
_SEEK_TRIES = 3


class _KeyFrame(NamedTuple):
    pts: int
    dts: int | None
    size: int


class PyAVReader(VideoReader):
    """Exact reading of any file FFmpeg can read.

    Opening reads all packets once, without decoding; their sorted presentation times are the frames. That holds only
    where each packet is one frame with a time of its own. Where times are missing or made up (AVI, raw streams), some
    pictures are never shown (VP8), or the first frames decoded are not the ones foreseen (pictures at the head that
    depend on a part cut away), all frames are decoded once instead, none kept, and reading never seeks.

    Reading decodes on, or from the key frame before a wanted frame when that is nearer. Every frame decoded is
    compared with the one foreseen; after a seek that did not give it the file is read from its start, and
    VideoReadError is raised where that does not give it either.
    """

    def __init__(self, path: str) -> None:
        try:
            import av
        except (ImportError, OSError) as error:
            raise BackendUnavailableError(f"backend 'pyav' needs PyAV (pip install av): {error}") from error
        self._av = av
        self._path = path
        # One for all frames: a frame's own conversion would set up scaling anew.
        self._converter = av.video.reformatter.VideoReformatter()
        self._container, self._stream = self._open()
        self._tick: Fraction = self._stream.time_base or Fraction(1)
        try:
            self._index()
        except BaseException:
            self.close()
            raise

    def shown_at(self, times: Sequence[float]) -> list[int]:
        return last_presented(self._times, times)

    def times(self) -> Sequence[float]:
        return self._times

    def keyframes(self) -> list[int]:
        if not self._seeks:
            raise ValueError(f"{self._path}: its packets do not tell which frames are key frames")
        places = (bisect_left(self._pts, key.pts) for key in self._keyframes)
        return sorted({place for place in places if place < len(self._pts)})

    def read(self, indices: Sequence[int]) -> Iterator[tuple[Tensor, float]]:
        for index in indices:
            yield self._pixels(self._frame(index)), self._times[index]

    def read_small(self, indices: Sequence[int], short_side: int) -> Iterator[tuple[Tensor, float]]:
        # Made small before it is made RGB, which is several times as fast.
        for index in indices:
            yield self._pixels(self._frame(index), short_side), self._times[index]

    def close(self) -> None:
        self._container.close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except self._av.FFmpegError as error:
            raise read_error(self._path, f"{error.strerror} ({type(error).__name__})") from error
        except UnicodeDecodeError as error:  # text within a damaged stream that FFmpeg would log
            raise read_error(self._path, f"it is damaged ({error})") from error

    def _open(self) -> tuple[InputContainer, VideoStream]:
        with self._named_errors():
            container = self._av.open(self._path, metadata_errors="replace")  # titles may be in any encoding
        cover = self._av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & cover and s.codec_context is not None]
        if not streams:
            container.close()
            raise read_error(self._path, "it has no video stream")
        stream = max(streams, key=lambda s: (s.width * s.height, s.frames, -s.index))
        stream.codec_context.thread_type = "AUTO"
        stream.codec_context.thread_count = torch.get_num_threads()
        return container, stream

    def _restart(self) -> None:
        """Go to the start by opening anew: seeking to the start is not exact in every container."""
        self._container.close()
        self._container, self._stream = self._open()
        self._next = 0
        self._landed = False
        self._frames: Iterator[VideoFrame] = self._decode(self._packets())

    def _packets(self) -> Iterator[Packet[VideoStream]]:
        with self._named_errors():
            yield from self._container.demux(self._stream)

    def _decode(self, packets: Iterator[Packet[VideoStream]]) -> Iterator[VideoFrame]:
        with self._named_errors():
            for packet in packets:
                for frame in packet.decode():
                    if isinstance(frame, self._av.VideoFrame):
                        yield frame

    def _index(self) -> None:
        """Find all frames' times, and describe the stream."""
        # In the decoder's output order, which differs from sorted order only where times are made up.
        self._pts: list[Any] = []
        self._keyframes: list[_KeyFrame] = []
        durations: dict[int, int] = {}
        timed = True
        damaged = False
        for packet in self._packets():
            if packet.size == 0:  # asks the decoder for its last frames
                continue
            damaged |= packet.is_corrupt
            if packet.pts is None:
                timed = False
                continue
            if packet.is_keyframe:
                self._keyframes.append(_KeyFrame(packet.pts, packet.dts, packet.size))
            if not packet.is_discard:
                self._pts.append(packet.pts)
                durations[packet.pts] = packet.duration or 0
        self._pts.sort()
        self._keyframes.sort(key=lambda key: key.pts)

        self._restart()
        head = list(islice(self._frames, _HEAD))
        if not head:
            raise read_error(self._path, "it has no frame that can be decoded")
        first, container = head[0], self._container.format.name
        codec = self._stream.codec_context.codec.canonical_name
        made_up = not timed or len(durations) < len(self._pts) or container == "avi" or codec == "vp8"
        self._seeks = not made_up and [frame.pts for frame in head] == self._pts[: len(head)]
        if self._seeks:
            self._frames = chain(head, self._frames)
        else:
            logger.debug("%s: packets do not tell the frames' times, decoding all frames to find them", self._path)
            self._restart()
            self._pts = [frame.pts for frame in self._frames]
            self._restart()
        duration = self._find_times(durations)
        frames = len(self._pts)
        declared = self._stream.duration and float(self._stream.duration * self._tick)
        if damaged or ends_early(self._stream.frames, declared, frames, duration):
            raise read_error(self._path, "it is damaged or its end is missing")
        if first.rotation % 90:
            raise read_error(self._path, f"it is to be turned by {first.rotation} degrees, not a multiple of 90")
        upright = first.rotation % 180 == 0
        self.metadata = VideoMetadata(
            path=self._path,
            backend="pyav",
            num_frames=frames,
            fps=frames / duration if duration else 0.0,
            duration=duration,
            height=first.height if upright else first.width,
            width=first.width if upright else first.height,
            rotation=first.rotation,
            codec=codec,
            stream_index=self._stream.index,
        )

    def _find_times(self, durations: dict[int, int]) -> float:
        """Set the time of each frame, and return the time at which the last one ends."""
        rate = self._stream.guessed_rate or self._stream.average_rate
        # Sorted, because some demuxers hand out the right times in decoding order.
        known = sorted(pts for pts in self._pts if pts is not None)
        if len(set(known)) == len(self._pts):
            self._times = [float((pts - known[0]) * self._tick) for pts in known]
            last = durations.get(known[-1]) or (1 / (rate * self._tick) if rate else 0)
            return float((known[-1] - known[0] + last) * self._tick)
        if not rate:
            raise read_error(self._path, "it tells neither the frames' times nor their rate")
        self._times = [float(i / rate) for i in range(len(self._pts))]
        return float(len(self._pts) / rate)

    def _frame(self, index: int) -> VideoFrame:
        """Decode frame `index`, from where decoding stands or from a key frame."""
        if index < self._next or (self._seeks and self._keyframe_before(index)[1] > self._next):
            self._go_before(index)
        while True:
            frame = next(self._frames, None)
            if frame is not None and self._landed and frame.pts is not None and frame.pts < self._pts[self._next]:
                continue  # depends on pictures before the key frame that was landed on
            if frame is not None and frame.pts == self._pts[self._next]:
                self._next += 1
                if self._next == index + 1:
                    return frame
            elif self._landed:
                logger.debug("%s: decoding from a key frame did not give frame %d", self._path, self._next)
                self._seeks = False
                self._restart()
            else:
                got = "the stream ended" if frame is None else f"one with presentation time {frame.pts} came"
                raise read_error(self._path, f"frame {self._next} was expected from the decoder, but {got}")

    def _keyframe_before(self, index: int) -> tuple[int, int]:
        """Position of the last key frame at or before frame `index`, -1 for none, and the first frame it gives."""
        at = bisect_right(self._keyframes, self._pts[index], key=lambda key: key.pts) - 1
        return at, bisect_left(self._pts, self._keyframes[at].pts) if at >= 0 else 0

    def _go_before(self, index: int) -> None:
        if self._seeks:
            at, _ = self._keyframe_before(index)
            for key in reversed(self._keyframes[max(at + 1 - _SEEK_TRIES, 0) : at + 1]):
                # Some containers are indexed by presentation time, others by decoding time.
                if self._land(key.pts, index) or (key.dts is not None and self._land(key.dts, index)):
                    return
        self._restart()

    def _land(self, offset: int, index: int) -> bool:
        """Seek to `offset`; whether that came to a known key frame from which frame `index` can be decoded."""
        with self._named_errors():
            self._container.seek(offset, stream=self._stream)
        packets = self._packets()
        for packet in packets:
            if packet.is_keyframe and packet.pts is not None:
                break
        else:
            return False
        if packet.pts > self._pts[index] or _KeyFrame(packet.pts, packet.dts, packet.size) not in self._keyframes:
            return False

        def from_key() -> Iterator[Packet[VideoStream]]:
            yield packet
            yield from packets

        self._next = bisect_left(self._pts, packet.pts)
        self._landed = True
        self._frames = self._decode(from_key())
        return True

    def _pixels(self, frame: VideoFrame, short_side: int | None = None) -> Tensor:
        if frame.is_corrupt:
            raise read_error(self._path, f"the frame at {frame.time} s is damaged")
        size: dict[str, Any] = {}
        if short_side is not None and min(frame.height, frame.width) > short_side:
            height, width = small_size(frame.height, frame.width, short_side)
            size = {"height": height, "width": width, "interpolation": "AREA"}
        rgb = torch.from_numpy(self._converter.reformat(frame, format="rgb24", **size).to_ndarray()).permute(2, 0, 1)
        return torch.rot90(rgb, frame.rotation // 90, (1, 2)) if frame.rotation else rgb
