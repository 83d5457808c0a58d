"""Prefill times of configs side by side, in one process and on one prompt."""

from __future__ import annotations

import multiprocessing
import os
import platform
import random
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from spatiotoken.answer import Dtype, load_model, prepare_inputs
from spatiotoken.config import load_config
from spatiotoken.patching import last_report, patched
from spatiotoken.probe import build_tiny
from spatiotoken.report import peak_memory_bytes

UNPATCHED = "unpatched"
PRESETS = (
    "dense",
    "random",
    "downsample",
    "evs",
    "divprune",
    "fastv",
    "light",
    "balanced",
    "aggressive",
    "sliding_vertical",
)

_SIDE = 280
"""Pixels of a square frame: 20 x 20 patches of Qwen2.5-VL, merged to 10 x 10 tokens for each pair of frames."""
_TOKENS_PER_UNIT, _FRAMES_PER_UNIT = 100, 2
_RESAMPLES = 2000
_T = TypeVar("_T")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Timing:
    """Prefill times of one config.

    Attributes:
        milliseconds: of each repeat, in the order in which they ran.
        median_ms: their median.
        ratio: median over the unpatched median, below 1 where the config is quicker.
        ratio_interval: 95 % bootstrap interval of the ratio, over rounds.
        visual_kept: visual tokens that entered the language model.
        stages: tokens that each stage left.
    """

    config: str
    milliseconds: tuple[float, ...]
    median_ms: float
    ratio: float
    ratio_interval: tuple[float, float]
    visual_kept: int
    stages: dict[str, int]


@dataclass(frozen=True)
class Comparison:
    """Timings on one prompt, the unpatched model first."""

    machine: dict[str, Any]
    model: dict[str, Any]
    prompt_tokens: int
    visual_tokens: int
    timings: tuple[Timing, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    configs: Sequence[str],
    *,
    repeats: int = 21,
    warmup: int = 3,
    visual_tokens: int = 2000,
    hidden_size: int = 512,
    num_layers: int = 4,
    dtype: Dtype = torch.float32,
    device: torch.device | None = None,
) -> Comparison:
    """Time the prefill of a random model of Qwen2.5-VL's architecture, unpatched and with each config, in turn.

    A time goes from the processor's output to the logits of the last token: vision tower, reductions and language
    model. Attaching a patch is not in it.

    Args:
        configs: presets' names or paths of YAML files.
        repeats: timed rounds; each runs every config once.
        warmup: rounds before those.
        visual_tokens: of the prompt, rounded to a multiple of 100.

    Raises:
        ConfigError: a config that cannot be used.
        ValueError: repeats, warm-up or visual tokens out of range.
    """
    check_rounds(repeats, warmup)
    units = round(visual_tokens / _TOKENS_PER_UNIT)
    if units < 1:
        raise ValueError(f"visual_tokens must be at least {_TOKENS_PER_UNIT}, not {visual_tokens}")
    device = device or torch.device("cpu")
    loaded = {name: load_config(name) for name in configs}
    model, inputs = _model_and_prompt(hidden_size, num_layers, units, dtype, device)
    visual = int((inputs["input_ids"] == model.config.video_token_id).sum())

    reports: dict[str, Any] = {}
    times: dict[str, list[float]] = {name: [] for name in (UNPATCHED, *configs)}
    for turn in range(warmup + repeats):
        for name, row in times.items():
            with nullcontext() if name == UNPATCHED else patched(model, loaded[name]):
                elapsed = prefill_ms(model, inputs)
                if name != UNPATCHED:
                    reports[name] = last_report(model)
            if turn >= warmup:
                row.append(elapsed)

    timings = []
    for name, row in times.items():
        ratio, interval = ratio_of_medians(row, times[UNPATCHED])
        report = reports.get(name)
        timings.append(
            Timing(
                config=name,
                milliseconds=tuple(row),
                median_ms=statistics.median(row),
                ratio=ratio,
                ratio_interval=interval,
                visual_kept=visual if report is None else report.visual_kept,
                stages={} if report is None else {stage: entry.tokens_out for stage, entry in report.stages.items()},
            )
        )
    return Comparison(
        machine=machine(device, model.dtype),
        model={"model_type": model.config.model_type, "hidden_size": hidden_size, "num_layers": num_layers},
        prompt_tokens=inputs["input_ids"].numel(),
        visual_tokens=visual,
        timings=tuple(timings),
    )


def prefill_ms(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> float:
    """Milliseconds of one forward over the prompt, with a cache, up to the logits of its last token."""
    return call_ms(lambda: model(**inputs, logits_to_keep=1, use_cache=True), model.device)


def call_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of ``call``, for inference."""
    with torch.inference_mode():
        wait_for(device)
        start = time.perf_counter()
        call()
        wait_for(device)
        return (time.perf_counter() - start) * 1e3


def wait_for(device: torch.device) -> None:
    """Until all that it was given is done: only a GPU runs behind the host's clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_rounds(repeats: int, warmup: int) -> None:
    """Raises ``ValueError`` for numbers of rounds out of range."""
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup not negative, not {repeats} and {warmup}")


def ratio_of_medians(times: Sequence[float], baseline: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Median of ``times`` over that of ``baseline``, and its 95 % bootstrap interval; rounds are resampled as pairs."""
    draw = random.Random(0)
    rounds = range(len(times))
    ratios = []
    for _ in range(_RESAMPLES):
        picked = draw.choices(rounds, k=len(rounds))
        ratios.append(statistics.median(times[i] for i in picked) / statistics.median(baseline[i] for i in picked))
    cuts = statistics.quantiles(ratios, n=40, method="inclusive")
    return statistics.median(times) / statistics.median(baseline), (cuts[0], cuts[-1])


def in_turn(names: Sequence[_T], turn: int) -> Sequence[_T]:
    """The order of a round: every other one runs backwards, so that nobody always follows the same one."""
    return names if turn % 2 == 0 else names[::-1]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, in which ``|`` becomes ``/``."""
    cells = (header, ["---"] * len(header), *rows)
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells)


def in_process(job: Callable[..., _T], *arguments: Any) -> _T:
    """What ``job`` says in a new process of its own, for memory: nothing that ran before it counts."""
    # By default glibc keeps some of what was freed, differently in each run: tens of MiB.
    with _environment("MALLOC_MMAP_THRESHOLD_", "131072"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(job, *arguments).result()


def peak_growth(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes by which what the process holds grows during ``call``, at most.

    That of its second run: the first loads libraries, weights and scratch memory for good.
    """
    call()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # on Linux: forget the peak so far
        _CLEAR.write_text("5")
    before = _most_held(device)
    call()
    return _most_held(device) - before


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the times depend on beside the code."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        # Far above the threads in use, other processes ran too, and times of several threads are worth nothing.
        "load_average": os.getloadavg()[0],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
    }


def _model_and_prompt(
    hidden_size: int, num_layers: int, units: int, dtype: Dtype, device: torch.device
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    with tempfile.TemporaryDirectory() as directory:
        path = build_tiny("qwen2_5_vl", directory, hidden_size=hidden_size, num_layers=num_layers)
        model, processor = load_model(path, dtype=dtype, device=device)
    frames = _moving_square(units * _FRAMES_PER_UNIT)
    processor.video_processor.size = {"shortest_edge": _SIDE**2, "longest_edge": _SIDE**2 * len(frames)}
    metadata = {"fps": 2.0, "frames_indices": list(range(len(frames))), "total_num_frames": len(frames)}
    inputs = prepare_inputs(processor, frames, "What is happening in this video?", metadata)
    return model, dict(inputs.to(device, model.dtype))


def _moving_square(frames: int) -> Tensor:
    """uint8 ``[T, 3, 280, 280]``: a square crosses a background of random tiles, so that some tokens change."""
    tiles = torch.randint(0, 120, (3, 20, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    video = tiles.repeat_interleave(14, 1).repeat_interleave(14, 2).repeat(frames, 1, 1, 1)
    for t, frame in enumerate(video):
        left = 10 * t % (_SIDE - 70)
        frame[:, 100:170, left : left + 70] = 240
    return video


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():  # Linux, where `platform` knows only the architecture
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    command = ("git", "describe", "--always", "--dirty", "--exclude", "*")
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # not a checkout
    return found.stdout.strip()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _most_held(device: torch.device) -> int:
    """Bytes since the peak was last forgotten."""
    if device.type == "cpu" and _STATUS.exists():
        # `ru_maxrss` would hold the parent's memory too, from the moment between fork and exec.
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
        assert found is not None
        return int(found[1]) * 1024
    return peak_memory_bytes(device)
