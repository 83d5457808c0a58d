"""Accuracy against retention of every preset on the probe models: a picture and a page of tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spatiotoken.config import load_config, presets
from spatiotoken.probe.dataset import examples
from spatiotoken.probe.evaluate import BASELINES, ProbeRun, ask, at_retention, load_probe_model
from spatiotoken.probe.models import PROBE_MODEL_TYPES
from spatiotoken.probe.scenes import FAMILIES

BASELINE_RETENTIONS = (0.75, 0.5, 0.25, 0.125, 0.0625)

_INTRODUCTION = """\
# Accuracy on the probe

Every preset on the probe models that come with the package, on the first {limit} questions of the test split
({frames} frames of 64 x 64 pixels; {each} questions of each family). Made by

    {command}

The probe models are small and know nothing but coloured shapes, so this page tells what a reduction destroys, and not
how a released model would bear it. *Retention* is the share of visual tokens that the average decoder layer has,
*evidence* the share of the visual tokens which show the answer that reach the last layer, by themselves or merged into
others. `dense` reduces nothing. Intervals are 95 % bootstrap intervals over questions. The last rows are
the baselines at other retentions. Run with
{machine}; times are in [benchmarks.md](benchmarks.md).

![accuracy against retention]({picture})
"""


def curves(
    model_types: Sequence[str] = PROBE_MODEL_TYPES, *, limit: int, num_frames: int = 16
) -> dict[str, list[ProbeRun]]:
    """All presets, and the baselines at several retentions, on each probe model."""
    configs = {name: load_config(name) for name in sorted(presets(), key=lambda name: (name != "dense", name))}
    for method in BASELINES:
        for retention in BASELINE_RETENTIONS:
            configs[f"{method} {retention:g}"] = at_retention(method, retention)
    found = {}
    for model_type in model_types:
        model, processor = load_probe_model(model_type)
        tallies = ask(model, processor, configs, examples("test", limit, num_frames=num_frames))
        found[model_type] = [tally.run(name) for name, tally in tallies.items()]
    return found


def draw(runs: Mapping[str, Sequence[ProbeRun]], path: Path) -> None:
    """One panel for each model: presets as points, baselines as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(runs), 5.2), layout="constrained")
    for axes, (model, model_runs) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
        dense = model_runs[0]
        for method, style in zip(BASELINES, ("o-", "s-"), strict=True):
            line = [run for run in model_runs if run.config.startswith(f"{method} ")]
            axes.plot(
                [dense.retention, *(run.retention for run in line)],
                [dense.accuracy, *(run.accuracy for run in line)],
                style,
                label=method,
                color="0.6",
                markersize=4,
            )
        for run in model_runs:
            if " " in run.config or run.config in BASELINES:
                continue
            axes.errorbar(
                run.retention,
                run.accuracy,
                yerr=[[run.accuracy - run.interval[0]], [run.interval[1] - run.accuracy]],
                fmt="D",
                capsize=2,
            )
            axes.annotate(
                run.config, (run.retention, run.accuracy), textcoords="offset points", xytext=(5, 5), fontsize=8
            )
        axes.set(title=model, xlabel="retention of visual tokens", ylabel="accuracy", xlim=(0, 1.12))
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def write_page(
    runs: Mapping[str, Sequence[ProbeRun]], directory: Path, *, limit: int, num_frames: int, command: str, machine: str
) -> Path:
    """``probe.md`` and ``probe.png`` in a directory.

    Returns:
        The page's path.
    """
    picture = directory / "probe.png"
    draw(runs, picture)
    head = {"limit": limit, "frames": num_frames, "each": limit // len(FAMILIES), "command": command}
    parts = [_INTRODUCTION.format(**head, machine=machine, picture=picture.name)]
    for model, model_runs in runs.items():
        parts.append(f"## {model}\n\n" + "\n".join(_table(model_runs)) + "\n")
    page = directory / "probe.md"
    page.write_text("\n".join(parts), encoding="utf-8")
    return page


def _table(runs: Sequence[ProbeRun]) -> Iterable[str]:
    titles = ["config", "visual tokens", "retention", "accuracy", "interval", *FAMILIES, "evidence"]
    yield _row(titles)
    yield _row(["---"] * len(titles))
    for run in runs:
        low, high = run.interval
        families = [_percent(run.families[family].accuracy) if family in run.families else "" for family in FAMILIES]
        yield _row(
            [
                f"`{run.config}`",
                f"{run.visual_kept:.0f}",
                _percent(run.retention),
                _percent(run.accuracy),
                f"{100 * low:.1f} to {100 * high:.1f}",
                *families,
                _percent(run.evidence_recall),
            ]
        )


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
