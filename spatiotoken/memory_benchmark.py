"""Peak memory of a prefill above the weights, unpatched and with each config, each in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from spatiotoken.benchmark import UNPATCHED, in_process, markdown, peak_growth
from spatiotoken.benchmark_models import Workload, build_model, build_request
from spatiotoken.benchmark_timing import generate
from spatiotoken.config import PatchConfig, load_config, presets
from spatiotoken.patching import last_report, patched
from spatiotoken.request_benchmark import unusable_note

MEMORY_CONFIGS = ("dense", "random", "downsample", "evs", "divprune-25", "visionzip-25", "holitom-25", "fastv")
"""At 25 % where they have a retention ratio; and all presets with a method of the ``vision`` stage."""
GOAL = 0.60
"""Most of the unpatched model's, at 25 % retention and 256 frames of size ``7b``."""


@dataclass(frozen=True)
class MemoryPeak:
    """One config.

    Attributes:
        visual_kept: visual tokens that entered the language model.
        peak_bytes: most that the process held in a prefill, beyond what it held before it. Not its first, which loads
            libraries and scratch memory for good.
        ratio: to the unpatched model's; None where that needed nothing that can be told.
    """

    config: str
    visual_kept: int
    peak_bytes: int
    ratio: float | None


@dataclass(frozen=True)
class MemoryComparison:
    """Peaks of one workload, the unpatched model first."""

    workload: dict[str, Any]
    visual_tokens: int
    peaks: tuple[MemoryPeak, ...]
    unusable: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def memory_configs() -> dict[str, PatchConfig]:
    """The default ones."""
    towers = {name: config for name, config in presets().items() if "vision" in config.methods()}
    return {name: load_config(name) for name in MEMORY_CONFIGS} | towers


def compare_memory(workloads: Sequence[Workload], configs: Sequence[str] | None = None) -> Iterator[MemoryComparison]:
    """Each workload's comparison comes as soon as it is there.

    Args:
        configs: presets' names or paths of YAML files, instead of ``memory_configs``.

    Raises:
        ConfigError: a config that cannot be used with any model.
    """
    chosen = memory_configs() if configs is None else {name: load_config(name) for name in configs}
    for workload in workloads:
        dense, visual = in_process(_peak, workload, None)
        peaks, unusable = [MemoryPeak(UNPATCHED, visual, dense, 1.0)], {}
        for name, config in chosen.items():
            try:
                grown, kept = in_process(_peak, workload, config.to_dict())
            except ValueError as error:
                unusable[name] = " ".join(str(error).split())
                continue
            peaks.append(MemoryPeak(name, kept, grown, grown / dense if dense else None))
        yield MemoryComparison(workload.to_dict(), visual, tuple(peaks), unusable)


def memory_table(comparison: MemoryComparison) -> str:
    """Markdown."""
    header = ("config", "visual tokens", "peak above the weights, MiB", "share of unpatched")
    rows = [
        (
            *(one.config, str(one.visual_kept), f"{one.peak_bytes / 2**20:.1f}"),
            "-" if one.ratio is None else f"{one.ratio:.2f}",
        )
        for one in comparison.peaks
    ]
    about = comparison.workload
    return (
        f"{about['model_type']}, size {about['size']}, {about['frames']} frames, {about['attention']}: one prefill of "
        f"{comparison.visual_tokens} visual tokens. Goal: at most {GOAL:.2f} at 25 % retention, 256 frames, size 7b."
        f"\n\n{markdown(header, rows)}{unusable_note(comparison.unusable)}"
    )


def _peak(workload: Workload, config: Mapping[str, Any] | None) -> tuple[int, int]:
    """Bytes by which a prefill grows the process, at most, and visual tokens that entered the language model."""
    torch.set_num_threads(workload.threads)
    model, processor = build_model(workload)
    inputs = build_request(workload, model, processor)
    with nullcontext() if config is None else patched(model, config):
        # A little less than nothing where what the first run left behind is used again.
        grown = max(0, peak_growth(lambda: generate(model, inputs, 1), model.device))
        if config is None:
            return grown, int((inputs["input_ids"] == model.config.video_token_id).sum())
        return grown, last_report(model).visual_kept
