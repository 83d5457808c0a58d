"""What choosing frames costs while a long file is decoded: beside decoding the candidates alone."""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spatiotoken.benchmark import machine
from spatiotoken.config import load_config
from spatiotoken.video import load_video, probe_video
from spatiotoken.video.backends import open_reader
from spatiotoken.video.selection import SHORT_SIDE, moments

FRAME_CONFIGS = ("kmeans", "dpp", "kffocus", "uniform")
KEPT = 32
FPS = 24
_SCENE_SECONDS = 20
_DRIFT = 3
"""Pixels that the picture moves by from frame to frame."""


@dataclass(frozen=True)
class FrameTiming:
    """One selector.

    Attributes:
        frames: how many it kept.
        ratio: of ``load_video`` with it to decoding the candidates alone, the median over rounds that ran both.
        peak_memory_bytes: most that a process held that did nothing else.
    """

    config: str
    frames: int
    seconds: float
    ratio: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class FrameComparison:
    """All selectors on one file.

    Attributes:
        candidates: frames decoded small, ``candidates_seconds`` the median time for that.
    """

    machine: Mapping[str, Any]
    video: Mapping[str, Any]
    candidates: int
    candidates_seconds: float
    timings: Sequence[FrameTiming]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def write_long_video(path: Path, minutes: float, height: int = 720, width: int = 1280) -> None:
    """H.264 of textured scenes that drift and are cut every 20 seconds, with x264's usual distance of key frames."""
    generator = torch.Generator().manual_seed(0)
    write_video(path, _pictures(round(60 * minutes * FPS), height, width, generator), height, width, FPS)


def write_video(path: Path, pictures: Iterable[Tensor], height: int, width: int, rate: int) -> None:
    """H.264 of uint8 ``[3, H, W]`` pictures, ``rate`` a second."""
    import av

    with av.open(os.fspath(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _pictures(count: int, height: int, width: int, generator: torch.Generator) -> Iterator[Tensor]:
    span = _DRIFT * FPS * _SCENE_SECONDS
    for number in range(count):
        place = number % (FPS * _SCENE_SECONDS)
        if place == 0:
            coarse = torch.rand(1, 3, 24, 24 + span // 32, generator=generator) * 255
            wide = torch.nn.functional.interpolate(coarse, (height, width + span), mode="bicubic").clamp(0, 255)
            scene = wide[0].to(torch.uint8)
        yield scene[:, :, _DRIFT * place : _DRIFT * place + width]


def compare_selectors(configs: Sequence[str], path: Path, *, repeats: int, threads: int) -> FrameComparison:
    """Time each config's ``frames`` method keeping 32, in turns with decoding the candidates alone.

    Raises:
        ValueError: a config has no ``frames`` method, or one that cannot choose without a question.
    """
    for config in configs:
        method = load_config(config).frames
        if method is None or method.needs & {"relevance", "score"}:
            raise ValueError(f"config {config!r} has no frames method that chooses without a question")
    alone: list[float] = []
    runs: dict[str, list[tuple[float, int, int]]] = {config: [] for config in configs}
    candidates = 0
    for _ in range(repeats):
        seconds, candidates, _ = _in_process(_decode_candidates, path, threads)
        alone.append(seconds)
        for config in configs:
            runs[config].append(_in_process(_load, path, threads, config))
    timings = []
    for config, found in runs.items():
        ratios = [seconds / base for (seconds, _, _), base in zip(found, alone, strict=True)]
        timings.append(
            FrameTiming(
                config,
                found[0][1],
                statistics.median(seconds for seconds, _, _ in found),
                statistics.median(ratios),
                max(memory for _, _, memory in found),
            )
        )
    about = probe_video(path)
    described = {"codec": about.codec, "size": f"{about.width}x{about.height}", "minutes": about.duration / 60}
    where = machine(torch.device("cpu"), torch.float32) | {"threads": threads}
    return FrameComparison(where, described, candidates, statistics.median(alone), timings)


def _in_process(job: Any, path: Path, threads: int, *arguments: Any) -> tuple[float, int, int]:
    """Seconds, frames and peak memory of a job in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(job, path, threads, *arguments).result()


def _decode_candidates(path: Path, threads: int) -> tuple[float, int, int]:
    torch.set_num_threads(threads)
    begin = time.perf_counter()
    with open_reader(path, "auto") as reader:
        candidates = list(dict.fromkeys(reader.shown_at(moments(reader.metadata.duration, 1.0))))
        for _ in reader.read_small(candidates, SHORT_SIDE):
            pass
    return time.perf_counter() - begin, len(candidates), _peak_memory()


def _load(path: Path, threads: int, config: str) -> tuple[float, int, int]:
    torch.set_num_threads(threads)
    selector = load_config(config, **{"frames.num_frames": KEPT}).frames
    assert selector is not None
    begin = time.perf_counter()
    video = load_video(path, selector=selector)
    return time.perf_counter() - begin, len(video.indices), _peak_memory()


def _peak_memory() -> int:
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
