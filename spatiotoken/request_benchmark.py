"""Whole requests, dense beside patched: time to first token and to the last of the answer.

Beside each config what its arithmetic predicts, and *the bound*: the same model unpatched, natively given as many
visual tokens as the config leaves. What a config takes beyond that, after the tower, is our overhead.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from spatiotoken.benchmark import UNPATCHED, check_rounds, in_turn, markdown, ratio_of_medians
from spatiotoken.benchmark_models import Workload, build_model, build_request
from spatiotoken.benchmark_timing import (
    Shares,
    Times,
    counted_rows,
    host_waits,
    native_features,
    native_prompt,
    predicted_first_token,
    shares_left,
    timed_request,
)
from spatiotoken.config import PatchConfig, load_config, presets
from spatiotoken.patches.adapter import find_adapter
from spatiotoken.report import ForwardReport

NEW_TOKENS, REPEATS = 32, 3
PRESETS = (
    "dense",
    "random",
    "downsample",
    "evs",
    "evs-10",
    "divprune",
    "visionzip",
    "holitom",
    "fastvid",
    "fastv",
    "pyramiddrop",
)
"""And all that have a method of the ``vision`` stage."""
BASELINES = ("random", "downsample")
"""Beside each method of the ``tokens`` stage, with the share of the tokens that it keeps."""
MERGED = "evs-10"
"""Whose ``tokens`` method the configs get that combine stages: it reads nothing but the features."""
HALF = "half the frames"
BOUND, REALISED, EMPTY = 1.10, 0.8, 1.03
"""Most of the ratios to the bound and of ``dense`` to unpatched, least of realised over predicted."""


@dataclass(frozen=True)
class RequestTiming:
    """One config.

    Attributes:
        visual_kept: visual tokens that entered the language model.
        times: of each round, in the order in which they ran.
        first_token_ms, total_ms: medians.
        left: of the arithmetic.
        predicted: speed-up of the time to first token that this predicts.
        realised: the unpatched model's median over this one's, ``realised_interval`` its 95 % bootstrap interval.
        whole: the same of the time to the last token.
        native_ms: median time to first token of the unpatched model, natively given as many tokens and no tower; None
            for configs that go on dropping, or compute sparsely, within the language model.
        bound: time after the tower over that, with ``bound_interval``.
        method_share: what the methods took in the prefill, as a share of the unpatched time to first token.
        waits: of the host for the GPU in one prefill; None on a CPU.
    """

    config: str
    visual_kept: int
    times: tuple[Times, ...]
    first_token_ms: float
    total_ms: float
    left: Shares
    predicted: float
    realised: float
    realised_interval: tuple[float, float]
    whole: float
    native_ms: float | None
    bound: float | None
    bound_interval: tuple[float, float] | None
    method_share: float
    waits: int | None

    @property
    def reached(self) -> float:
        """Share of the predicted speed-up that was realised."""
        return self.realised / self.predicted


@dataclass(frozen=True)
class RequestComparison:
    """Timings of one workload, the unpatched model first; ``unusable`` tells why configs cannot be used with it."""

    workload: dict[str, Any]
    prompt_tokens: int
    visual_tokens: int
    new_tokens: int
    timings: tuple[RequestTiming, ...]
    unusable: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def request_configs(model: PreTrainedModel, frames: int) -> dict[str, PatchConfig]:
    """The default ones: presets, half the frames, and what the stages give together."""
    configs = {name: load_config(name) for name in PRESETS}
    configs["dense, fast_tower"] = load_config("dense", fast_tower=True)
    adapter = find_adapter(model)
    units = frames // adapter.frames_per_unit(adapter.core(model))
    half, merged = {"method": "uniform", "num_frames": max(1, units // 2)}, load_config(MERGED)
    configs[HALF] = load_config("dense", frames=half)
    configs[f"{HALF}, {MERGED}"] = load_config(merged, frames=half)
    for name, config in presets().items():
        if "vision" in config.methods():
            configs[name] = config
            if config.tokens is None:
                configs[f"{name}, {MERGED}"] = load_config(config, tokens=merged.tokens)
    return configs


def compare_requests(
    workloads: Sequence[Workload],
    configs: Sequence[str] | None = None,
    *,
    repeats: int = REPEATS,
    warmup: int = 0,
    new_tokens: int = NEW_TOKENS,
) -> Iterator[RequestComparison]:
    """Time requests to random models, unpatched and with each config, in turn.

    A time begins with the processor's output on the device: decoding a file and the processor are not in it (but in
    ``stage_benchmark``), nor is attaching a patch. Each workload's comparison comes as soon as it is there.

    Args:
        configs: presets' names or paths of YAML files, instead of ``request_configs``.
        repeats: timed rounds; each runs every config and its native prompt once, every other round backwards.
        warmup: rounds before those, beside the one that finds how many tokens each config keeps.

    Raises:
        ConfigError: a config that cannot be used with any model.
        ValueError: a number out of range.
    """
    check_rounds(repeats, warmup)
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be at least 1, not {new_tokens}")
    chosen = None if configs is None else {name: load_config(name) for name in configs}
    for workload in workloads:
        model, processor = build_model(workload)
        inputs = build_request(workload, model, processor)
        wanted = request_configs(model, workload.frames) if chosen is None else chosen
        yield _compare(workload, model, inputs, wanted, repeats, warmup, new_tokens)
        del model, inputs  # before the next one is built


def _compare(
    workload: Workload,
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    configs: Mapping[str, PatchConfig],
    repeats: int,
    warmup: int,
    new_tokens: int,
) -> RequestComparison:
    dense_rows, _ = counted_rows(model, inputs, None)
    left: dict[str, Shares] = {UNPATCHED: Shares()}
    reports: dict[str, ForwardReport] = {}
    every: dict[str, PatchConfig | None] = {UNPATCHED: None}
    unusable: dict[str, str] = {}

    def look(name: str, config: PatchConfig) -> None:
        try:
            rows, report = counted_rows(model, inputs, config)
        except ValueError as error:
            unusable[name] = " ".join(str(error).split())
            return
        assert report is not None
        every[name], reports[name], left[name] = config, report, shares_left(rows, dense_rows, report)

    for name, config in configs.items():
        look(name, config)
    for name, config in baselines(every, reports).items():
        look(name, config)

    visual = int((inputs["input_ids"] == model.config.video_token_id).sum())
    kept = {name: reports[name].visual_kept if name in reports else visual for name in every}
    bounded = {name for name, config in every.items() if config is None or not (config.layers or config.attention)}
    prompts = {tokens: native_prompt(model, inputs, tokens) for tokens in {kept[name] for name in bounded}}
    appended = visual - dense_rows.features
    times: dict[str, list[Times]] = {name: [] for name in every}
    native: dict[str, list[float]] = {name: [] for name in bounded}
    for turn in range(warmup + repeats):
        for name in in_turn(list(every), turn):
            found, _ = timed_request(model, inputs, every[name], new_tokens)
            if turn >= warmup:
                times[name].append(found)
            if name not in bounded:
                continue
            # Right behind, so that what else the machine does slows both.
            with native_features(model, kept[name] - appended):
                found, _ = timed_request(model, prompts[kept[name]], None, 1)
            if turn >= warmup:
                native[name].append(found.after_tower)

    dense = median_times(times[UNPATCHED])
    timings = []
    for name, row in times.items():
        own = median_times(row)
        realised, interval = _ratio(times[UNPATCHED], row, "first_token")
        native_ms, bound, bound_interval = None, None, None
        if name in bounded:
            native_ms = statistics.median(native[name])
            bound, bound_interval = ratio_of_medians([one.after_tower for one in row], native[name])
        timings.append(
            RequestTiming(
                config=name,
                visual_kept=kept[name],
                times=tuple(row),
                first_token_ms=own.first_token,
                total_ms=own.total,
                left=left[name],
                predicted=dense.first_token / predicted_first_token(dense, left[name]),
                realised=realised,
                realised_interval=interval,
                whole=_ratio(times[UNPATCHED], row, "total")[0],
                native_ms=native_ms,
                bound=bound,
                bound_interval=bound_interval,
                method_share=own.method / dense.first_token,
                waits=host_waits(model, inputs, every[name]),
            )
        )
    return RequestComparison(
        workload=workload.to_dict(),
        prompt_tokens=inputs["input_ids"].numel(),
        visual_tokens=visual,
        new_tokens=new_tokens,
        timings=tuple(timings),
        unusable=unusable,
    )


def baselines(
    configs: Mapping[str, PatchConfig | None], reports: Mapping[str, ForwardReport]
) -> dict[str, PatchConfig]:
    """The ``BASELINES`` at the share that each config keeps which has a ``tokens`` method and nothing else.

    Configs that keep as many share theirs.
    """
    alone = [name for name, config in configs.items() if config is not None and list(config.methods()) == ["tokens"]]
    known = {(reports[name].stages["tokens"].method, reports[name].visual_kept) for name in alone}
    found = {}
    for name in alone:
        stage = reports[name].stages["tokens"]
        for baseline in BASELINES:
            mark = (baseline, reports[name].visual_kept)
            if stage.method not in BASELINES and mark not in known:
                known.add(mark)
                tokens = {"method": baseline, "retention": stage.tokens_out / stage.tokens_in}
                found[f"{baseline} as {name}"] = load_config({"tokens": tokens})
    return found


def median_times(rounds: Sequence[Times]) -> Times:
    """Of each part by itself."""
    first = rounds[0]
    return replace(first, **{name: statistics.median(getattr(one, name) for one in rounds) for name in asdict(first)})


def request_table(comparison: RequestComparison) -> str:
    """Markdown."""
    header = ["config", "visual tokens", "first token, ms", "speed-up", "95 %", "predicted", "realised / predicted"]
    header += [f"{comparison.new_tokens} tokens, ms", "speed-up", "after the tower / native", "95 %", "methods, %"]
    waits = any(one.waits is not None for one in comparison.timings)
    rows = []
    for one in comparison.timings:
        row = [one.config, str(one.visual_kept), f"{one.first_token_ms:.0f}", f"{one.realised:.2f}"]
        row += [_interval(one.realised_interval), f"{one.predicted:.2f}", f"{one.reached:.2f}"]
        row += [f"{one.total_ms:.0f}", f"{one.whole:.2f}"]
        row += ["-", "-"] if one.bound is None else [f"{one.bound:.3f}", _interval(one.bound_interval)]
        row.append(f"{100 * one.method_share:.1f}")
        rows.append(row + ([str(one.waits)] if waits else []))
    about = comparison.workload
    text = (
        f"{about['model_type']}, size {about['size']}, {about['frames']} frames, {about['attention']}: a prompt of "
        f"{comparison.prompt_tokens} tokens, {comparison.visual_tokens} of them visual, medians of "
        f"{len(comparison.timings[0].times)} rounds. Methods: what they took until the first token, of the unpatched "
        f"model's time to it.\n\n{markdown(header + ['host waits'] * waits, rows)}\n\n{_goals(comparison)}"
    )
    return text + unusable_note(comparison.unusable)


def unusable_note(unusable: Mapping[str, str]) -> str:
    """A paragraph, if there is anything to tell."""
    if not unusable:
        return ""
    return "\n\nNot for this model: " + "; ".join(f"{name}: {why}" for name, why in unusable.items())


def _goals(comparison: RequestComparison) -> str:
    bounds = [(one.bound, one.config) for one in comparison.timings if one.bound is not None]
    reached = [(one.reached, one.config) for one in comparison.timings[1:]]
    empty = [1 / one.realised for one in comparison.timings if one.config == "dense"]
    lines = [f"at most {BOUND} after the tower over native, most {_named(max(bounds))}"]
    if reached:
        lines.append(f"at least {REALISED} of the predicted speed-up, least {_named(min(reached))}")
    if empty:
        lines.append(f"dense at most {EMPTY} of unpatched, {empty[0]:.3f}")
    return f"Goals: {'; '.join(lines)}."


def _named(found: tuple[float, str]) -> str:
    return f"{found[0]:.2f} ({found[1]})"


def _interval(interval: tuple[float, float] | None) -> str:
    assert interval is not None
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def _ratio(above: Sequence[Times], below: Sequence[Times], part: str) -> tuple[float, tuple[float, float]]:
    return ratio_of_medians([getattr(one, part) for one in above], [getattr(one, part) for one in below])
