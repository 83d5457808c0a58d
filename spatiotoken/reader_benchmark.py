"""Reading a video file: every installed backend, in every way in which the library reads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spatiotoken.benchmark import check_rounds, in_process, in_turn, markdown, peak_growth
from spatiotoken.video import BackendUnavailableError, probe_video
from spatiotoken.video.backends import open_reader
from spatiotoken.video.reader import VideoReader
from spatiotoken.video.selection import SHORT_SIDE, moments

BACKENDS = ("pyav", "torchcodec", "decord")
SAMPLED = 32


def _every_frame(reader: VideoReader) -> int:
    return sum(1 for _ in reader.read(range(reader.metadata.num_frames)))


def _sampled(reader: VideoReader) -> int:
    frames = reader.metadata.num_frames
    count = min(SAMPLED, frames)
    return sum(1 for _ in reader.read([(2 * i + 1) * frames // (2 * count) for i in range(count)]))


def _candidates(reader: VideoReader) -> int:
    chosen = list(dict.fromkeys(reader.shown_at(moments(reader.metadata.duration, 1.0))))
    return sum(1 for _ in reader.read_small(chosen, SHORT_SIDE))


def _key_frames(reader: VideoReader) -> int:
    return sum(1 for _ in reader.read_small(reader.keyframes(), SHORT_SIDE))


WAYS: Mapping[str, Callable[[VideoReader], int]] = {
    "whole": _every_frame,
    f"{SAMPLED} sampled": _sampled,
    "one a second, small": _candidates,
    "key frames, small": _key_frames,
}
"""Each says how many frames it read; small ones are what methods choose frames by."""


@dataclass(frozen=True)
class ReaderTiming:
    """One backend and way.

    Attributes:
        frames: read at a time.
        seconds: of each round, opening the file included.
        frames_per_second: at the median.
        peak_bytes: most that the process held while reading, beyond what it held before, the median over rounds.
    """

    backend: str
    way: str
    frames: int
    seconds: tuple[float, ...]
    frames_per_second: float
    peak_bytes: int


@dataclass(frozen=True)
class ReaderComparison:
    """All on one file.

    Attributes:
        unusable: why backends, or ways of theirs, were left out.
    """

    video: dict[str, Any]
    timings: tuple[ReaderTiming, ...]
    unusable: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_readers(path: Path, *, repeats: int = 3) -> ReaderComparison:
    """Read a file in turns, each time in a process of its own, which reads it once before it is timed.

    Frames are let go one by one, so the memory is that of the reader.

    Raises:
        ValueError: ``repeats`` out of range.
        VideoReadError: the file cannot be read.
    """
    check_rounds(repeats, 0)
    unusable: dict[str, str] = {}
    subjects = []
    for backend in BACKENDS:
        try:
            with open_reader(path, backend) as reader:
                for way in WAYS:
                    subjects.append((backend, way))
                try:
                    reader.keyframes()
                except ValueError as error:
                    subjects.remove((backend, "key frames, small"))
                    unusable[f"{backend}, key frames"] = str(error).removeprefix(f"{reader.metadata.path}: ")
        except BackendUnavailableError as error:
            unusable[backend] = str(error)
    found: dict[tuple[str, str], list[tuple[int, float, int]]] = {subject: [] for subject in subjects}
    threads = torch.get_num_threads()
    for turn in range(repeats):
        for backend, way in in_turn(subjects, turn):
            found[backend, way].append(in_process(_read, path, backend, way, threads))
    timings = []
    for (backend, way), rounds in found.items():
        frames, seconds = rounds[0][0], tuple(one[1] for one in rounds)
        rate, peak = frames / statistics.median(seconds), round(statistics.median(one[2] for one in rounds))
        timings.append(ReaderTiming(backend, way, frames, seconds, rate, peak))
    about = probe_video(path)
    video = {"codec": about.codec, "size": f"{about.width}x{about.height}", "frames": about.num_frames}
    return ReaderComparison(video, tuple(timings), unusable)


def reader_table(comparison: ReaderComparison) -> str:
    """Markdown."""
    rows = [
        (
            *(one.backend, one.way, str(one.frames), f"{statistics.median(one.seconds):.2f}"),
            *(f"{one.frames_per_second:.0f}", f"{one.peak_bytes / 2**20:.0f}"),
        )
        for one in comparison.timings
    ]
    table = markdown(("backend", "read", "frames", "s", "frames/s", "peak above the libraries, MiB"), rows)
    left_out = "".join(f"\n\nLeft out: {name} ({why})." for name, why in comparison.unusable.items())
    told = ", ".join(f"{name}: {value}" for name, value in comparison.video.items())
    return f"A file ({told}), medians of {len(comparison.timings[0].seconds)} rounds.\n\n{table}{left_out}"


def _read(path: Path, backend: str, way: str, threads: int) -> tuple[int, float, int]:
    """Frames, seconds and bytes by which the process grows at most."""
    torch.set_num_threads(threads)
    frames: list[int] = []
    seconds: list[float] = []

    def read() -> None:
        begin = time.perf_counter()
        with open_reader(path, backend) as reader:
            frames.append(WAYS[way](reader))
        seconds.append(time.perf_counter() - begin)

    grown = peak_growth(read, torch.device("cpu"))
    return frames[-1], seconds[-1], grown
