"""Accuracy against retention of every method and preset on the probe models: a picture and a page of tables."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spatiotoken.config import PatchConfig, load_config, presets
from spatiotoken.probe.dataset import examples
from spatiotoken.probe.evaluate import BASELINES, ProbeRun, ask, load_probe_model
from spatiotoken.probe.keyframes import CANDIDATES, KEPT, KeyframeRun, at_hand, find_needles, selectors
from spatiotoken.probe.models import PROBE_MODEL_TYPES
from spatiotoken.probe.scenes import FAMILIES
from spatiotoken.probe.short_prompts import PROBE_SETTINGS
from spatiotoken.registry import METHODS

RETENTIONS = (0.5, 0.25, 0.15, 0.1)
"""Asked of every method that has a retention ratio."""
TOWER_RETENTIONS = (0.75, 0.5, 0.25)
"""The same of `vision` methods."""
SWEEPS: dict[tuple[str, str], tuple[dict[str, Any], ...]] = {
    ("vision", "early_merge"): tuple({"similarity": value, "behind": (0, 0.33, 0.67)} for value in (0.95, 0.8, 0.5)),
    ("tokens", "correlation_guided"): tuple({"repeats": value} for value in (0.9, 0.6, 0.3, 0.1)),
    ("tokens", "dycoke"): tuple({"merging_ratio": value} for value in (0.3, 0.6, 0.9, 1.0)),
    ("tokens", "llava_scissor"): tuple({"threshold": value} for value in (0.95, 0.9, 0.8, 0.7)),
    ("tokens", "long_tail"): tuple({"min_retention": value} for value in (0.9, 0.0)),
    ("tokens", "prunevid"): tuple({"cluster_ratio": value, "unclustered": 1} for value in (0.5, 0.25, 0.15, 0.1)),
    ("layers", "framefusion"): tuple({"cost": value} for value in (0.5, 0.25, 0.15, 0.1)),
    ("layers", "sttm"): tuple(
        {"spatial": spatial, "temporal": temporal}
        for spatial, temporal in ((0.95, 0.95), (0.95, 0.8), (0.85, 0.65), (0.8, 0.5))
    ),
    ("layers", "aim_prune"): tuple({"start": start, "end": end} for start, end in ((3, 5), (1, 4), (1, 3))),
    ("layers", "corematching"): tuple({"min_retention": value} for value in (0.7, 0.4, 0.1)),
    ("layers", "dyvte"): tuple({"layer": value, "threshold": 1} for value in (4, 3, 2)),
    ("layers", "lazyllm"): tuple({"shares": (value,) * 3} for value in (0.7, 0.4, 0.15)),
    ("layers", "mustdrop"): tuple({"overall": value, "individual": 1000} for value in (0.6, 0.9, 1.2)),
    ("layers", "pyramiddrop"): tuple({"layers": (1, 3, 5), "keep": (k, k / 2, k / 4)} for k in (0.9, 0.6, 0.3)),
    ("layers", "sparsevlm"): tuple({"keep": keep} for keep in ((0.8, 0.75, 0.7), (0.55, 0.45, 0.28), (0.3, 0.2, 0.1))),
    ("layers", "spatten"): tuple({"shares": shares} for shares in ((0.9, 0.6), (0.7, 0.12), (0.3, 0.05))),
    ("layers", "todre_drop"): tuple({"layer": value, "threshold": 1} for value in (4, 3, 2)),
    ("layers", "transprune"): tuple({"layers": (1, 3, 5), "keep": (k, k / 2, k / 4)} for k in (0.9, 0.6, 0.3)),
    ("layers", "zipvl_tokens"): tuple({"tau": value, "layer": 1} for value in (0.97, 0.94, 0.9)),
}
"""What is asked instead of methods without a retention ratio: settings, from mild to strong. For most `layers` methods
the one in the middle leaves half of the visual tokens to the average layer of the probe models, which have six."""
AT_HALF = {"fastv": {"layer": 1, "retention": 0.4}, "holitom_merge": {"layer": 1, "retention": 0.4}}
"""The same for those that have a retention ratio."""

_NEEDLES = 96
_SHORT = " on short prompts"
_WITHIN_TOWER = "within the vision tower"


@dataclass(frozen=True)
class Curves:
    """What was measured on one probe model.

    Attributes:
        runs: of each config.
        needles: of each frame selector.
    """

    runs: Sequence[ProbeRun]
    needles: Sequence[KeyframeRun]


_INTRODUCTION = """\
# Accuracy on the probe

Every preset, every method of the stages `vision`, `tokens` and `layers` at several budgets, and sparse prefill, on the
probe models that come with the package: the first {limit} questions of the test split ({frames} frames of 64 x 64
pixels; {each} questions of each family). Made by

    {command}

The probe models are small and know nothing but coloured shapes, so this page tells what a reduction destroys, and not
how a released model would bear it. A frame has only 16 tokens, so methods that divide a frame finely have little to
choose from. *Retention* is the share of visual tokens that the average decoder layer has, *evidence* the share of the
visual tokens which show the answer that reach the last layer, by themselves or merged into others. `dense` reduces
nothing. Answers are chosen among a question's options. Intervals are 95 % bootstrap intervals over questions.
A method stands with its own retention ratio in percent (`divprune-25`), which for `layers` is what remains after its
layer, or with the settings that it has instead. Frame selectors whose preset names a model of its own (DINOv2, CLIP,
SigLIP 2) are told of frames by `pixels` here, and by the probe model's own `tower` where they read the question, for no
model could be downloaded; most presets keep more frames than these videos have, so their section at the end of each
model's tells more. Run with {machine}; times are in [benchmarks.md](benchmarks.md).

![accuracy against retention]({picture})
"""


_HALF_HEAD = """\
### Inside the language model, at half

Of each `layers` method what comes closest to half of the visual tokens in the average decoder layer, beside the
baselines, which leave out half before the model. *Beats random*: its accuracy is above that of `random`; "in doubt"
where `random`'s lies in its interval.
"""
_TOWER_HEAD = """\
### Within the vision tower

`vision` methods leave the language model all of its tokens, each with what the tower made of the patch that stands for
its own. *Rows* are those of the average tower layer, as a share of all; a frame has 64 of them in these towers, and
`-50` is what a method leaves behind its last layer.
"""
_SPARSE_HEAD = """\
### Sparse prefill

With their presets, which are for prompts of many thousand tokens, `attention` methods leave these prompts of a few
hundred to dense attention. Here they have blocks of 8 tokens or so (`PROBE_SETTINGS` in
`spatiotoken/probe/short_prompts.py`). *Density* is the share of the causal pairs that is computed, the mean over
layers.
"""
_NEEDLE_HEAD = """\
### Which frames are seen

{limit} questions after a letter that flashes somewhere in {candidates} frames, of which each `frames` method keeps
{kept}. *Evidence* is the share of the frames with the letter that are kept, *accuracy* what the model answers from
nothing else. A letter has eight possible answers.
"""


def configs() -> dict[str, PatchConfig]:
    """By name: ``dense``, the other presets, each method at several budgets, and sparse prefill on short prompts."""
    known = presets()
    # On prompts as short as these their presets leave everything to dense attention.
    for name in METHODS["attention"].items():
        del known[name]
    found = {"dense": known.pop("dense"), **{name: at_hand(config) for name, config in known.items()}}
    for stage in ("vision", "tokens", "layers"):
        for name, method in sorted(METHODS[stage].items().items()):
            if (stage, name) in SWEEPS:
                for settings in SWEEPS[stage, name]:
                    found[f"{name} {_label(settings)}"] = load_config({stage: {"method": name, **settings}})
            elif "retention" in method.model_fields:
                for retention in TOWER_RETENTIONS if stage == "vision" else RETENTIONS:
                    config = load_config({stage: {"method": name, "retention": retention}})
                    found[f"{name}-{round(100 * retention)}"] = config
            if name in AT_HALF:
                settings = AT_HALF[name]
                found[f"{name} {_label(settings)}"] = load_config({stage: {"method": name, **settings}})
    for name, short in PROBE_SETTINGS.items():
        found[f"{name}{_SHORT}"] = load_config({"attention": {"method": name, "backend": "gather", **short}})
    return found


def _label(settings: Mapping[str, Any]) -> str:
    shown = {
        key: "/".join(f"{part:g}" for part in value) if isinstance(value, tuple) else f"{value:g}"
        for key, value in settings.items()
    }
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def curves(model_types: Sequence[str] = PROBE_MODEL_TYPES, *, limit: int, num_frames: int = 16) -> dict[str, Curves]:
    """All of ``configs``, and the needles that selectors find, on each probe model in a process of its own."""
    workers = len(model_types)
    threads = max(1, torch.get_num_threads() // workers)
    # Not forked: threads of this process would be missing in its copy.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        jobs = {model: pool.submit(_curves_of, model, limit, num_frames, threads) for model in model_types}
        return {model: job.result() for model, job in jobs.items()}


def _curves_of(model_type: str, limit: int, num_frames: int, threads: int) -> Curves:
    torch.set_num_threads(threads)
    model, processor = load_probe_model(model_type)
    tallies = ask(model, processor, configs(), examples("test", limit, num_frames=num_frames))
    runs = [tally.run(name) for name, tally in tallies.items()]
    return Curves(runs, find_needles(selectors(), _NEEDLES, model, processor))


def draw(curves: Mapping[str, Curves], path: Path) -> None:
    """A row of panels for each model, one for each kind of method: its curves, and those of the baselines."""
    from matplotlib.figure import Figure

    kinds: dict[str, list[str]] = {}
    for stage in ("tokens", "layers"):
        for name, method in sorted(METHODS[stage].items().items()):
            if name not in BASELINES:
                kinds.setdefault(getattr(method, "kind", stage), []).append(name)
    kinds[_WITHIN_TOWER] = sorted(METHODS["vision"].items())
    figure = Figure(figsize=(6 * len(kinds), 5 * len(curves)), layout="constrained")
    panels = figure.subplots(len(curves), len(kinds), squeeze=False, sharex=True, sharey="row")
    for row, (model, measured) in zip(panels, curves.items(), strict=True):
        model_runs = measured.runs
        for axes, (kind, names) in zip(row, kinds.items(), strict=True):
            baselines = () if kind == _WITHIN_TOWER else BASELINES
            for name, style in zip(baselines, ("--", ":"), strict=False):
                axes.plot(*_points(name, model_runs), style, color="0.4", label=name)
            for number, name in enumerate(names):
                marker = "osD^v"[number // 10]
                axes.plot(*_points(name, model_runs), f"{marker}-", markersize=4, linewidth=1, label=name)
            share = "rows of the average tower layer" if kind == _WITHIN_TOWER else "retention of visual tokens"
            axes.set(title=f"{model}: {kind}", xlabel=share, xlim=(0, 1.02))
            axes.grid(alpha=0.3)
            axes.legend(loc="lower right", fontsize=8)
        row[0].set(ylabel="accuracy")
    figure.savefig(path, dpi=80)


def _points(method: str, runs: Sequence[ProbeRun]) -> tuple[list[float], list[float]]:
    """Retention (in the tower, if that is where it is) and accuracy of a method at its budgets, and unreduced."""
    own = [run for run in runs if run.config == "dense" or run.config.startswith((f"{method}-", f"{method} "))]
    shares = {id(run): run.tower if method in METHODS["vision"].items() else run.retention for run in own}
    own.sort(key=lambda run: shares[id(run)])
    return [shares[id(run)] for run in own], [run.accuracy for run in own]


def write_page(
    curves: Mapping[str, Curves], directory: Path, *, limit: int, num_frames: int, command: str, machine: str
) -> Path:
    """``probe.md`` and ``probe.png`` in a directory.

    Returns:
        The page's path.
    """
    picture = directory / "probe.png"
    draw(curves, picture)
    head = {"limit": limit, "frames": num_frames, "each": limit // len(FAMILIES), "command": command}
    parts = [_INTRODUCTION.format(**head, machine=machine, picture=picture.name)]
    for model, measured in curves.items():
        sparse = [run for run in measured.runs if run.config.endswith(_SHORT)]
        within = [run for run in measured.runs if _is_vision(run.config)]
        others = [run for run in measured.runs if run not in sparse and run not in within]
        parts.append(f"## {model}\n\n" + "\n".join(_table(others)) + "\n")
        parts.append(_HALF_HEAD)
        parts.append("\n".join(_half_table(others)) + "\n")
        parts.append(_TOWER_HEAD)
        parts.append("\n".join(_tower_table([others[0], *within])) + "\n")
        parts.append(_SPARSE_HEAD)
        parts.append("\n".join(_sparse_table([others[0], *sparse])) + "\n")
        parts.append(_NEEDLE_HEAD.format(limit=_NEEDLES, candidates=CANDIDATES, kept=KEPT))
        parts.append("\n".join(_needle_table(measured.needles)) + "\n")
    page = directory / "probe.md"
    page.write_text("\n".join(parts), encoding="utf-8")
    return page


def _table(runs: Sequence[ProbeRun]) -> Iterable[str]:
    titles = ["config", "visual tokens", "retention", "accuracy", "interval", *FAMILIES, "evidence"]
    yield _row(titles)
    yield _row(["---"] * len(titles))
    for run in runs:
        families = [_percent(run.families[family].accuracy) if family in run.families else "" for family in FAMILIES]
        yield _row(
            [
                f"`{run.config}`",
                f"{run.visual_kept:.0f}",
                _percent(run.retention),
                _percent(run.accuracy),
                _interval(run.interval),
                *families,
                _percent(run.evidence_recall),
            ]
        )


def _half_table(runs: Sequence[ProbeRun]) -> Iterable[str]:
    titles = ["config", "retention", "accuracy", "interval", "evidence", "beats random"]
    yield _row(titles)
    yield _row(["---"] * len(titles))
    known = {run.config: run for run in runs}
    random = known["random-50"]
    rows = [random, known["downsample-50"]]
    for name in sorted(METHODS["layers"].items()):
        own = [run for run in runs if run.config == name or run.config.startswith((f"{name}-", f"{name} "))]
        # Presets may have a part before the language model too.
        own = [run for run in own if run.config != name]
        if own:
            rows.append(min(own, key=lambda run: abs(run.retention - 0.5)))
    for run in rows:
        better = "" if run is random else "yes" if run.accuracy > random.accuracy else "no"
        if better and run.interval[0] <= random.accuracy <= run.interval[1]:
            better += ", in doubt"
        cells = [
            _percent(run.retention),
            _percent(run.accuracy),
            _interval(run.interval),
            _percent(run.evidence_recall),
        ]
        yield _row([run.config, *cells, better])


def _is_vision(config: str) -> bool:
    """Whether a config is that of a `vision` method alone."""
    return any(config == name or config.startswith((f"{name}-", f"{name} ")) for name in METHODS["vision"].items())


def _tower_table(runs: Sequence[ProbeRun]) -> Iterable[str]:
    yield from _share_table(
        "rows", [(f"`{run.config}`" if _is_vision(run.config) else run.config, run.tower, run) for run in runs]
    )


def _sparse_table(runs: Sequence[ProbeRun]) -> Iterable[str]:
    named = [f"`{run.config.removesuffix(_SHORT)}`" if run.config.endswith(_SHORT) else run.config for run in runs]
    yield from _share_table("density", [(name, run.density, run) for name, run in zip(named, runs, strict=True)])


def _share_table(title: str, rows: Sequence[tuple[str, float, ProbeRun]]) -> Iterable[str]:
    """
    Args:
        title: of the share that each row has beside its name.
    """
    titles = ["method", title, "accuracy", "interval", *FAMILIES]
    yield _row(titles)
    yield _row(["---"] * len(titles))
    for name, share, run in rows:
        families = [_percent(run.families[family].accuracy) if family in run.families else "" for family in FAMILIES]
        yield _row([name, _percent(share), _percent(run.accuracy), _interval(run.interval), *families])


def _needle_table(runs: Sequence[KeyframeRun]) -> Iterable[str]:
    titles = ["method", "scorer", "frames kept", "evidence", "interval", "accuracy", "interval"]
    yield _row(titles)
    yield _row(["---"] * len(titles))
    for run in runs:
        cells = [f"`{run.method}`", run.scorer or "–", f"{run.kept:.1f}"]
        cells += [_percent(run.recall), _interval(run.recall_interval)]
        cells += [_percent(run.accuracy or 0), _interval(run.accuracy_interval or (0, 0))]
        yield _row(cells)


def _interval(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
