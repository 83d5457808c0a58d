"""What the methods of the ``layers`` stage save of a whole prefill, beside what the number of tokens promises.

The vision tower is replaced by made-up features, so that it neither hides what the language model takes nor takes part
in the peak of the memory.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from spatiotoken.answer import Dtype, load_model
from spatiotoken.benchmark import (
    UNPATCHED,
    check_rounds,
    in_process,
    machine,
    markdown,
    peak_growth,
    prefill_ms,
    ratio_of_medians,
)
from spatiotoken.config import PatchConfig, load_config, presets
from spatiotoken.patching import last_report, patched
from spatiotoken.probe import build_tiny
from spatiotoken.registry import METHODS
from spatiotoken.report import ForwardReport
from spatiotoken.token_benchmark import synthetic_video

FASTV = "fastv, layer 2"
REFERENCES = (FASTV, "pyramiddrop")
"""Whose average retention the baselines get."""
BASELINES = ("random", "downsample")
GOAL = 0.9
"""Least share of the predicted speed-up that the references should reach."""
_SIDE = 10
"""Rows and columns of tokens of a temporal unit."""
_QUESTION = "What is happening in this video?"


@dataclass(frozen=True)
class LayerTiming:
    """One config.

    Attributes:
        prune_layers: decoder layers before which it may drop or merge tokens.
        retention: share of the visual tokens that entered a decoder layer, mean over layers.
        share: tokens that entered decoder layers, text included, over those without a patch.
        predicted: speed-up if time went with these, 1 / ``share``.
        predicted_flops: speed-up if it went with the estimated arithmetic, in which attention is quadratic.
        milliseconds: of each round, in the order in which they ran.
        speedup: median of the unpatched model over this one's; ``speedup_interval`` its 95 % bootstrap interval.
        ratio: ``speedup`` over ``predicted``.
        method_ms: median of what the method itself took.
        peak_memory_bytes: most that a process held during a prefill, beyond what it held before it; None if not
            measured. Not its first, which loads libraries, weights and scratch memory for good.
    """

    config: str
    prune_layers: tuple[int, ...]
    retention: float
    share: float
    predicted: float
    predicted_flops: float
    milliseconds: tuple[float, ...]
    median_ms: float
    speedup: float
    speedup_interval: tuple[float, float]
    ratio: float
    method_ms: float
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class LayerComparison:
    """Timings on one prompt, the unpatched model first."""

    machine: dict[str, Any]
    model: dict[str, Any]
    prompt_tokens: int
    visual_tokens: int
    timings: tuple[LayerTiming, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Setting:
    """What a process needs to run the prefill."""

    path: str
    visual_tokens: int
    dtype: Dtype
    device: str
    threads: int


def layer_configs() -> dict[str, PatchConfig]:
    """Every registered method of the ``layers`` stage, and nothing else, as the preset of its name sets it or else with
    its defaults; and FastV before layer 2, as published."""
    named = presets()
    configs = {}
    for name, method in sorted(METHODS["layers"].items().items()):
        preset = named[name].layers if name in named else None
        configs[name] = load_config({"layers": preset if preset is not None and preset.name == name else method()})
    return configs | {FASTV: load_config({"layers": {"method": "fastv", "layer": 2, "retention": 0.5}})}


def compare_layers(
    configs: Mapping[str, PatchConfig],
    *,
    repeats: int = 5,
    warmup: int = 0,
    visual_tokens: int = 4000,
    hidden_size: int = 512,
    num_layers: int = 12,
    dtype: Dtype = torch.float32,
    device: torch.device | None = None,
    memory: bool = False,
) -> LayerComparison:
    """Time the prefill of a random model of Qwen2.5-VL's architecture, unpatched and with each config, in turn.

    A time goes from the features of the video to the logits of the last token. Attaching a patch is not in it.

    Args:
        configs: by name. Beside each of the ``REFERENCES`` the ``BASELINES`` run at its average retention.
        repeats: timed rounds; each runs every config once.
        warmup: rounds before those, beside the one that finds how many tokens each config keeps.
        visual_tokens: of the prompt, rounded to a multiple of 100.
        memory: measure the peak memory too, in a process for each config.

    Raises:
        ValueError: repeats, warm-up or visual tokens out of range, or a method that needs a deeper model.
    """
    check_rounds(repeats, warmup)
    if round(visual_tokens / _SIDE**2) < 1:
        raise ValueError(f"visual_tokens must be at least {_SIDE**2}, not {visual_tokens}")
    device = device or torch.device("cpu")
    with tempfile.TemporaryDirectory() as directory:
        build_tiny("qwen2_5_vl", directory, hidden_size=hidden_size, num_layers=num_layers)
        setting = _Setting(directory, visual_tokens, dtype, str(device), torch.get_num_threads())
        model, inputs = _model_and_prompt(setting)
        prefill_ms(model, inputs)
        every: dict[str, PatchConfig | None] = {UNPATCHED: None, **configs}
        reports = {name: _run(model, inputs, config)[1] for name, config in configs.items()}
        for reference in REFERENCES:
            if reference in configs:
                for baseline in BASELINES:
                    tokens = {"method": baseline, "retention": _retention(reports[reference])}
                    every[f"{baseline} as {reference}"] = load_config({"tokens": tokens})
        times: dict[str, list[float]] = {name: [] for name in every}
        method_times: dict[str, list[float]] = {name: [] for name in every}
        for turn in range(warmup + repeats):
            for name, config in every.items():
                elapsed, report = _run(model, inputs, config)
                if turn >= warmup:
                    times[name].append(elapsed)
                    method_times[name].append(0.0)
                if report is not None:
                    reports[name] = report
                    if turn >= warmup:
                        method_times[name][-1] = sum(stage.milliseconds for stage in report.stages.values())
        peaks = {}
        if memory:
            for name, config in every.items():
                peaks[name] = in_process(_peak_memory, setting, None if config is None else config.to_dict())

    timings = []
    for name, row in times.items():
        report, config = reports.get(name), every[name]
        share = predicted_flops = 1.0
        if report is not None:
            share = sum(report.layer_tokens) / (report.prompt_tokens * num_layers)
            predicted_flops = report.prefill_flops_dense / report.prefill_flops
        speedup, interval = ratio_of_medians(times[UNPATCHED], row)
        timings.append(
            LayerTiming(
                config=name,
                prune_layers=config.layers.prune_layers(num_layers) if config and config.layers else (),
                retention=_retention(report),
                share=share,
                predicted=1 / share,
                predicted_flops=predicted_flops,
                milliseconds=tuple(row),
                median_ms=statistics.median(row),
                speedup=speedup,
                speedup_interval=interval,
                ratio=speedup * share,
                method_ms=statistics.median(method_times[name]),
                peak_memory_bytes=peaks.get(name),
            )
        )
    return LayerComparison(
        machine=machine(device, model.dtype),
        model={"model_type": model.config.model_type, "hidden_size": hidden_size, "num_layers": num_layers},
        prompt_tokens=inputs["input_ids"].numel(),
        visual_tokens=int((inputs["input_ids"] == model.config.video_token_id).sum()),
        timings=tuple(timings),
    )


def layer_table(comparison: LayerComparison) -> str:
    """Markdown."""
    dense = comparison.timings[0]
    header = ["config", "before layers", "retention", "token-layers", "predicted", "by arithmetic"]
    header += ["ms", "measured", "95 %", "measured / predicted", "method, ms"]
    if dense.peak_memory_bytes is not None:
        header += ["peak, MiB", "beside unpatched, MiB"]
    rows = []
    for one in comparison.timings:
        low, high = one.speedup_interval
        row = [one.config, _layers(one.prune_layers), f"{one.retention:.3f}", f"{one.share:.3f}"]
        row += [f"{one.predicted:.2f}", f"{one.predicted_flops:.2f}", f"{one.median_ms:.0f}", f"{one.speedup:.2f}"]
        row += [f"{low:.2f} to {high:.2f}", f"{one.ratio:.2f}", f"{one.method_ms:.1f}"]
        if one.peak_memory_bytes is not None and dense.peak_memory_bytes is not None:
            over = one.peak_memory_bytes - dense.peak_memory_bytes
            row += [f"{one.peak_memory_bytes / 2**20:.0f}", f"{over / 2**20:+.1f}"]
        rows.append(row)
    about = comparison.model
    return (
        f"Prefill of {comparison.prompt_tokens} tokens, {comparison.visual_tokens} of them visual, by a random "
        f"{about['model_type']} of {about['num_layers']} layers and hidden size {about['hidden_size']}, without its "
        "vision tower. Retention: visual tokens that enter a layer, mean over layers. Speed-ups: predicted by the "
        "number of tokens in all layers, and by their arithmetic; measured over the unpatched model's "
        f"{dense.median_ms:.0f} ms, medians of {len(dense.milliseconds)} rounds.\n\n{markdown(header, rows)}\n\n"
        + _goal(comparison.timings)
    )


def _layers(layers: Sequence[int]) -> str:
    if len(layers) > 4 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers)) or "-"


def _goal(timings: Collection[LayerTiming]) -> str:
    found = [f"{one.config} {one.ratio:.2f}" for one in timings if one.config in REFERENCES]
    return f"Goal, measured / predicted of at least {GOAL}: {'; '.join(found) or 'not run'}."


def _retention(report: ForwardReport | None) -> float:
    """Share of the visual tokens that entered a decoder layer, mean over layers."""
    if report is None:
        return 1.0
    visual = sum(report.layer_tokens) / len(report.layer_tokens) - report.text_tokens
    return visual / report.visual_tokens


def _run(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], config: PatchConfig | None
) -> tuple[float, ForwardReport | None]:
    if config is None:
        return prefill_ms(model, inputs), None
    with patched(model, config):
        return prefill_ms(model, inputs), last_report(model)


def _model_and_prompt(setting: _Setting) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The model, whose tower gives the same made-up features to every call, and its arguments."""
    device = torch.device(setting.device)
    model, processor = load_model(setting.path, dtype=setting.dtype, device=device)
    grid = (round(setting.visual_tokens / _SIDE**2), _SIDE, _SIDE)
    width = model.config.get_text_config().hidden_size
    features = synthetic_video(grid, width, dtype=model.dtype, device=device).embeddings

    def get_video_features(pixel_values_videos: Tensor, video_grid_thw: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=(features,))  # type: ignore[arg-type]

    core: Any = model.model
    core.get_video_features = get_video_features
    content = [{"type": "video"}, {"type": "text", "text": _QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    ids, picture = processor.tokenizer(text).input_ids, model.config.video_token_id
    place = ids.index(picture)
    input_ids = torch.tensor([[*ids[:place], *[picture] * len(features), *ids[place + 1 :]]], device=device)
    merge = model.config.vision_config.spatial_merge_size
    return model, {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": 2 * (input_ids == picture).int(),
        "pixel_values_videos": features.new_zeros(1),
        "video_grid_thw": torch.tensor([[grid[0], merge * grid[1], merge * grid[2]]], device=device),
    }


def _peak_memory(setting: _Setting, config: Mapping[str, Any] | None) -> int:
    """Bytes by which a prefill grows the process, at most."""
    torch.set_num_threads(setting.threads)
    model, inputs = _model_and_prompt(setting)
    with nullcontext() if config is None else patched(model, config):
        return peak_growth(lambda: prefill_ms(model, inputs), model.device)
