"""Where the time of a whole request goes, from a video file to the last new token, stage by stage."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from spatiotoken.answer import prepare_inputs, video_metadata
from spatiotoken.benchmark import UNPATCHED, check_rounds, in_turn, markdown, wait_for
from spatiotoken.benchmark_models import FPS, QUESTION, SCENE, Size, Workload, build_model, moving_pictures
from spatiotoken.benchmark_timing import timed_request
from spatiotoken.config import PatchConfig, load_config
from spatiotoken.frame_benchmark import write_video
from spatiotoken.request_benchmark import NEW_TOKENS, PRESETS, REPEATS, request_configs, unusable_note
from spatiotoken.video import load_video

STAGES = ("decode", "processor", "tower", "projector", "reduction", "prefill", "further tokens")
"""In the order in which the data passes them; all but the last are over when the first new token is there."""
STAGE_PRESETS = ("dense", "evs-10", "divprune", "visionzip", "fastv")
"""Of those of the e2e suite; what that combines beyond its presets is here too."""
FILE_SIZES: Mapping[Size, tuple[int, int]] = {"tiny": (64, 96), "cpu": (360, 640), "7b": (720, 1280)}
"""Height and width of a picture in the file."""
_STRIDE = 4
"""Pictures in the file for each that is read."""


@dataclass(frozen=True)
class StageTiming:
    """One config.

    Attributes:
        rounds: milliseconds of each stage, in the order in which the rounds ran.
        stages: their medians.
        first_token_ms, total_ms: medians of the sums, from the file to the first and to the last new token.
    """

    config: str
    rounds: tuple[dict[str, float], ...]
    stages: dict[str, float]
    first_token_ms: float
    total_ms: float


@dataclass(frozen=True)
class StageComparison:
    """Timings of one workload, the unpatched model first."""

    workload: dict[str, Any]
    file: str
    prompt_tokens: int
    new_tokens: int
    timings: tuple[StageTiming, ...]
    unusable: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_stages(
    workloads: Sequence[Workload],
    configs: Sequence[str] | None = None,
    *,
    repeats: int = REPEATS,
    warmup: int = 0,
    new_tokens: int = NEW_TOKENS,
) -> Iterator[StageComparison]:
    """Time requests about a file that is made for it; each reads, prepares and answers. Arguments as of
    ``compare_requests``. Each workload's comparison comes as soon as it is there.

    Raises:
        ConfigError: a config that cannot be used with any model.
        ValueError: a number out of range.
    """
    check_rounds(repeats, warmup)
    chosen = None if configs is None else {name: load_config(name) for name in configs}
    for workload in workloads:
        model, processor = build_model(workload)
        wanted = _default_configs(model, workload.frames) if chosen is None else chosen
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "video.mp4")
            height, width = FILE_SIZES[workload.size]
            pictures = moving_pictures(_STRIDE * workload.frames, height, width, _STRIDE * SCENE)
            write_video(path, pictures, height, width, round(_STRIDE * FPS))
            yield _compare(workload, model, processor, path, wanted, repeats, warmup, new_tokens)
        del model  # before the next one is built


def _compare(
    workload: Workload,
    model: PreTrainedModel,
    processor: Any,
    path: Path,
    configs: Mapping[str, PatchConfig],
    repeats: int,
    warmup: int,
    new_tokens: int,
) -> StageComparison:
    every: dict[str, PatchConfig | None] = {UNPATCHED: None}
    unusable: dict[str, str] = {}
    # What loads libraries and code is in no round.
    _, prompt_tokens = _timed(workload, model, processor, path, None, 1)
    for name, config in configs.items():
        try:
            _timed(workload, model, processor, path, config, 1)
        except ValueError as error:
            unusable[name] = " ".join(str(error).split())
        else:
            every[name] = config
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in every}
    for turn in range(warmup + repeats):
        for name in in_turn(list(every), turn):
            found, _ = _timed(workload, model, processor, path, every[name], new_tokens)
            if turn >= warmup:
                rounds[name].append(found)
    height, width = FILE_SIZES[workload.size]
    return StageComparison(
        workload=workload.to_dict(),
        file=f"H.264, {width} x {height}, {_STRIDE * workload.frames} pictures",
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        timings=tuple(stage_timing(name, row) for name, row in rounds.items()),
        unusable=unusable,
    )


def stage_timing(config: str, rounds: Sequence[dict[str, float]]) -> StageTiming:
    """Medians of ``rounds``, each milliseconds by stage."""
    return StageTiming(
        config=config,
        rounds=tuple(rounds),
        stages={stage: statistics.median(one[stage] for one in rounds) for stage in STAGES},
        first_token_ms=statistics.median(sum(one[stage] for stage in STAGES[:-1]) for one in rounds),
        total_ms=statistics.median(sum(one.values()) for one in rounds),
    )


def stage_table(comparison: StageComparison) -> str:
    """Markdown."""
    header = ["config", *STAGES, "first token", f"{comparison.new_tokens} tokens"]
    rows = []
    for one in comparison.timings:
        values = [*one.stages.values(), one.first_token_ms, one.total_ms]
        rows.append([one.config, *(f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in values)])
    about = comparison.workload
    return (
        f"{about['model_type']}, size {about['size']}, {about['frames']} frames of a file ({comparison.file}), "
        f"{about['attention']}: milliseconds of each stage of a request of {comparison.prompt_tokens} tokens, medians "
        f"of {len(comparison.timings[0].rounds)} rounds.\n\n{markdown(header, rows)}"
        + unusable_note(comparison.unusable)
    )


def _default_configs(model: PreTrainedModel, frames: int) -> dict[str, PatchConfig]:
    every = request_configs(model, frames)
    return {name: config for name, config in every.items() if name in STAGE_PRESETS or name not in PRESETS}


def _timed(
    workload: Workload, model: PreTrainedModel, processor: Any, path: Path, config: PatchConfig | None, new_tokens: int
) -> tuple[dict[str, float], int]:
    """Milliseconds by stage, and the tokens of the prompt."""
    start = time.perf_counter()
    video = load_video(path, num_frames=workload.frames)
    decoded = time.perf_counter()
    prepared = prepare_inputs(processor, video.frames, QUESTION, video_metadata(video))
    inputs = dict(prepared.to(model.device, model.dtype))
    wait_for(model.device)
    ready = time.perf_counter()
    times, _ = timed_request(model, inputs, config, new_tokens)
    values = ((decoded - start) * 1e3, (ready - decoded) * 1e3, times.tower, times.projector, times.reduction)
    return dict(zip(STAGES, (*values, times.prefill, times.further), strict=True)), inputs["input_ids"].numel()
