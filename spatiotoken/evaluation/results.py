"""Figures of an evaluation: accuracy with intervals, by category, beside the reference config, and what it cost."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spatiotoken.evaluation.base import Question, VideoQA
from spatiotoken.evaluation.journal import Answered
from spatiotoken.evaluation.plan import Plan, digest, versions, write_whole
from spatiotoken.evaluation.statistics import bootstrap_interval, mcnemar

REFERENCE = "dense"
"""What other configs are compared with; without it the first one."""


@dataclass(frozen=True)
class Results:
    """What is written: ``results`` are the same for the same answers, ``timings`` are not.

    Attributes:
        asked: how many answers there should be, over all datasets and configs.
        failed: how many of them are none, because the video could not be read.
    """

    results: dict[str, Any]
    timings: dict[str, Any]
    asked: int
    failed: int

    def write(self, output: Path) -> None:
        """``results.json``, ``timings.json`` and ``results.md``."""
        write_whole(output / "results.json", json.dumps(self.results, indent=2, ensure_ascii=False) + "\n")
        write_whole(output / "timings.json", json.dumps(self.timings, indent=2) + "\n")
        write_whole(output / "results.md", self.page())

    def page(self) -> str:
        """All of it as Markdown tables."""
        parts = []
        for name, dataset in self.results["datasets"].items():
            parts.append(f"## {name}\n\n{_about(dataset)}\n\n{_main_table(dataset, self.timings[name])}")
            for kind in dataset["groups"]:
                parts.append(f"### {name} by {kind}\n\n{_group_table(dataset, kind)}")
        return "\n\n".join(parts) + "\n"


def summarize(plan: Plan, answers: Mapping[tuple[str, str, str], Answered]) -> Results:
    """Figures of the answers that a plan asks for.

    Raises:
        ValueError: some are missing.
    """
    datasets, timings = {}, {}
    asked = failed = 0
    for name, questions in plan.questions.items():
        rows = {config: _rows(name, config, questions, answers) for config in plan.configs}
        datasets[name] = _dataset(plan.built_datasets[name], questions, rows)
        timings[name] = {config: _timing(found) for config, found in rows.items()}
        asked += sum(map(len, rows.values()))
        failed += sum(row.error is not None for found in rows.values() for row in found)
    results = {"plan": plan.model_dump(mode="json"), "versions": versions(), "datasets": datasets}
    return Results(results, timings, asked, failed)


def _rows(
    dataset: str, config: str, questions: Sequence[Question], answers: Mapping[tuple[str, str, str], Answered]
) -> list[Answered]:
    found = [answers.get((dataset, config, question.id)) for question in questions]
    missing = found.count(None)
    if missing:
        raise ValueError(f"{missing} of {len(found)} answers to {dataset} under {config} are missing: other shards'?")
    return [row for row in found if row is not None]


def _dataset(dataset: VideoQA, questions: Sequence[Question], rows: Mapping[str, list[Answered]]) -> dict[str, Any]:
    reference = REFERENCE if REFERENCE in rows else next(iter(rows))
    kinds = list(dict.fromkeys(kind for question in questions for kind in question.groups))
    configs = {}
    for config, own in rows.items():
        figures = _figures(dataset, questions, own, kinds)
        if config != reference and figures["metrics"]:
            figures["difference"] = _difference(dataset, questions, own, rows[reference])
        configs[config] = figures
    return {
        "digest": digest(questions),
        "questions": len(questions),
        "metrics": list(
            dict.fromkeys([*dataset.metrics, *(name for one in configs.values() for name in one["metrics"])])
        ),
        "macro": dataset.macro,
        "reference": reference,
        "groups": {
            kind: in_natural_order({one.groups[kind] for one in questions if kind in one.groups}) for kind in kinds
        },
        "configs": configs,
    }


def _figures(
    dataset: VideoQA, questions: Sequence[Question], rows: Sequence[Answered], kinds: Sequence[str]
) -> dict[str, Any]:
    """Of one config. Means are over the questions that could be asked."""
    pairs = [(question, row) for question, row in zip(questions, rows, strict=True) if row.error is None]
    scored = [(question, row.scores) for question, row in pairs if row.scores]
    metrics = {}
    # A dataset may have been told of further metrics, such as a judge's.
    for metric in dict.fromkeys(name for _, scores in scored for name in scores):
        values = torch.tensor([scores[metric] for _, scores in scored], dtype=torch.float64)
        interval = bootstrap_interval(values, [str(question.video) for question, _ in scored])
        metrics[metric] = {"mean": values.mean().item(), "interval": list(interval)}
    headline = None
    if scored:
        first = dataset.metrics[0]
        by_group = _means(scored, dataset.macro, first) if dataset.macro else {}
        headline = sum(one["mean"] for one in by_group.values()) / len(by_group) if by_group else metrics[first]["mean"]
    first = dataset.metrics[0]
    return {
        "answered": len(pairs),
        "failed": len(rows) - len(pairs),
        "not_parsed": sum(row.parsed is None for _, row in pairs),
        "headline": headline,
        "metrics": metrics,
        "groups": {kind: _means(scored, kind, first) for kind in kinds} if scored else {},
        **{name: _mean([getattr(row, name) for _, row in pairs]) for name in _COSTS},
    }


_COSTS = ("prompt_tokens", "visual_tokens", "visual_kept", "retention", "density")


def _means(scored: Sequence[tuple[Question, dict[str, float]]], kind: str, metric: str) -> dict[str, Any]:
    values: dict[str, list[float]] = {}
    for question, scores in scored:
        if kind in question.groups:
            values.setdefault(question.groups[kind], []).append(scores[metric])
    return {
        group: {"mean": sum(values[group]) / len(values[group]), "n": len(values[group])}
        for group in in_natural_order(values)
    }


def in_natural_order(groups: Iterable[str]) -> list[str]:
    """With numbers in them by their size."""
    return sorted(
        groups, key=lambda group: [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", group)]
    )


def _difference(
    dataset: VideoQA, questions: Sequence[Question], rows: Sequence[Answered], reference: Sequence[Answered]
) -> dict[str, Any] | None:
    """Of the first metric, over the questions that both answered; None if there are none."""
    metric = dataset.metrics[0]
    both = [
        (one.scores[metric], other.scores[metric], str(question.video))
        for question, one, other in zip(questions, rows, reference, strict=True)
        if one.scores and other.scores
    ]
    if not both:
        return None
    mine, others, videos = zip(*both, strict=True)
    values = torch.tensor(mine, dtype=torch.float64) - torch.tensor(others, dtype=torch.float64)
    binary = {*mine, *others} <= {0.0, 1.0}
    return {
        "n": len(both),
        "mean": values.mean().item(),
        "interval": list(bootstrap_interval(values, videos)),
        "mcnemar_p": mcnemar([bool(x) for x in mine], [bool(x) for x in others]) if binary else None,
    }


def _timing(rows: Sequence[Answered]) -> dict[str, Any]:
    """Times are of the questions that were asked together, so of batches of the plan's size."""
    asked = [row for row in rows if row.error is None]
    return {
        "ttft_ms": _middle([row.ttft_ms for row in asked]),
        "decode_ms": _middle([row.decode_ms for row in asked]),
        "peak_memory_bytes": max((row.peak_memory_bytes or 0 for row in asked), default=None),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _about(dataset: Mapping[str, Any]) -> str:
    failed = max(figures["failed"] for figures in dataset["configs"].values())
    text = f"{dataset['questions']} questions"
    if failed:
        text += f", of which {failed} could not be asked, since their videos could not be read; they count nowhere"
    if dataset["macro"]:
        text += f". The headline is the mean over {dataset['macro']}s"
    return f"{text}. Intervals: 95 %, bootstrap over videos. Difference: from {dataset['reference']}, paired."


def _main_table(dataset: Mapping[str, Any], timings: Mapping[str, Any]) -> str:
    extra = [name for name in dataset["metrics"][1:]]
    head = ["config", dataset["metrics"][0], "interval", "difference", "McNemar p", *extra, "not parsed"]
    head += ["visual tokens", "retention", "density", "TTFT ms", "peak MiB"]
    body = []
    for config, figures in dataset["configs"].items():
        first = figures["metrics"].get(dataset["metrics"][0])
        difference, timing = figures.get("difference"), timings[config]
        body.append(
            [
                config,
                _show(figures["headline"], _percent),
                _show(first, lambda one: _range(one["interval"])),
                _show(difference, lambda one: f"{_percent(one['mean'])} ({_range(one['interval'])})"),
                _show(difference, lambda one: _show(one["mcnemar_p"], "{:.3f}".format)),
                *(_show(figures["metrics"].get(name), lambda one: _percent(one["mean"])) for name in extra),
                str(figures["not_parsed"]),
                _show(figures["visual_kept"], "{:.0f}".format),
                _show(figures["retention"], _percent),
                _show(figures["density"], _percent),
                _show(timing["ttft_ms"], "{:.0f}".format),
                _show(timing["peak_memory_bytes"], lambda size: f"{size / 2**20:.0f}"),
            ]
        )
    return _table(head, body)


def _group_table(dataset: Mapping[str, Any], kind: str) -> str:
    configs = dataset["configs"]
    body = []
    for group in dataset["groups"][kind]:
        found = {config: figures["groups"].get(kind, {}).get(group) for config, figures in configs.items()}
        count = max((one["n"] for one in found.values() if one), default=0)
        body.append([group, str(count), *(_show(one, lambda one: _percent(one["mean"])) for one in found.values())])
    return _table([kind, "n", *configs], body)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def _show(value: Any, how: Callable[[Any], str]) -> str:
    return "" if value is None else how(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _range(interval: Sequence[float]) -> str:
    return f"{_percent(interval[0])} to {_percent(interval[1])}"
