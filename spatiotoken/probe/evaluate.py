"""What a config costs in accuracy: probe questions asked of one model under several configs, side by side."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spatiotoken.answer import Dtype, load_model, prepare_batch
from spatiotoken.config import PatchConfig, load_config
from spatiotoken.evaluation.statistics import bootstrap_interval
from spatiotoken.patches.adapter import find_adapter
from spatiotoken.patching import last_report, patched
from spatiotoken.probe.dataset import Example, clip_metadata, examples
from spatiotoken.probe.models import PROBE_MODEL_TYPES, probe_checkpoint
from spatiotoken.probe.scenes import FAMILIES, coverage
from spatiotoken.report import ForwardReport

BASELINES = ("random", "downsample")
PROBE_MARK = "spatiotoken_probe"
"""Key of a model's config that says it was trained on the probe, and needs no more than the question."""
_BATCH = 24
_SENTENCE_TOKENS = 16  # for models that may say more than one word


@dataclass(frozen=True)
class Score:
    """Share of right answers, its 95 % bootstrap interval, of how many questions, and what guessing gets."""

    accuracy: float
    interval: tuple[float, float]
    n: int
    chance: float


@dataclass(frozen=True)
class ProbeRun:
    """One config on a set of questions; token counts and times are means over the questions.

    Attributes:
        families: score of each family of questions.
        evidence_recall: share of the visual tokens that show the answer which the last decoder layer still had, itself
            or merged into another.
        visual, visual_kept: visual tokens of a prompt, and those of them that entered the language model.
        retention: visual tokens of the average decoder layer, as a share of ``visual``.
        tower: rows of the vision tower's average layer, as a share of all that it has.
        density: share of the causal pairs that attention computed in the prefill.
        prefill_ms: time of a batch's prefill over its questions.
    """

    config: str
    accuracy: float
    interval: tuple[float, float]
    families: dict[str, Score]
    evidence_recall: float
    visual: float
    visual_kept: float
    retention: float
    tower: float
    density: float
    prefill_ms: float


@dataclass(frozen=True)
class Baseline(ProbeRun):
    """Another config on the same questions.

    Attributes:
        difference: accuracy of the config in question less this one's, with a paired bootstrap interval.
    """

    difference: float
    difference_interval: tuple[float, float]


@dataclass(frozen=True)
class ProbeResult(ProbeRun):
    """A config beside the unpatched model and the baselines at the same retention."""

    model: str
    num_frames: int
    baselines: dict[str, Baseline]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Tally:
    """What was seen of one config, question by question."""

    def __init__(self) -> None:
        self.families: list[str] = []
        self.chances: list[float] = []
        self.answers: list[str] = []
        self.right: list[bool] = []
        self.recalls: list[float] = []
        self.visual = 0
        self.visual_kept = 0
        self.layer_visual = 0.0
        self.towers: list[float] = []
        self.densities: list[float] = []
        self.milliseconds = 0.0

    @property
    def retention(self) -> float:
        return self.layer_visual / self.visual

    def add(
        self, batch: Sequence[Example], answers: Sequence[str], report: ForwardReport, evidence: Sequence[Tensor]
    ) -> None:
        """A batch's answers, and of each question the visual tokens that show its answer, ``[N]`` bool."""
        self.families += [example.family for example in batch]
        self.chances += [1 / len(example.options) for example in batch]
        self.answers += answers
        self.right += [
            parse_answer(text, example.options) == example.answer for text, example in zip(answers, batch, strict=True)
        ]
        if report.seen is None and report.visual_kept < report.visual_tokens:
            raise RuntimeError("tokens were dropped, but the report cannot say which")
        for row, shows in enumerate(evidence):
            seen = torch.ones_like(shows) if report.seen is None else torch.tensor(report.seen[row][: shows.numel()])
            self.recalls.append((seen & shows).sum().item() / shows.sum().item())
        self.visual += report.visual_tokens
        self.visual_kept += report.visual_kept
        layers = report.layer_tokens
        self.layer_visual += sum(layers) / len(layers) - report.text_tokens
        rows = report.tower_rows
        share = sum(rows) / len(rows) / report.stages["vision"].tokens_in if rows else 1.0
        self.towers += [share] * len(batch)
        layer_densities = [entry.density for entry in report.attention] or [1.0]
        self.densities += [sum(layer_densities) / len(layer_densities)] * len(batch)
        self.milliseconds += report.prefill_ms

    def run(self, config: str) -> ProbeRun:
        """All of it in figures."""
        right = torch.tensor(self.right, dtype=torch.float64)
        families = {}
        for family in FAMILIES:
            rows = [row for row, name in enumerate(self.families) if name == family]
            if rows:
                part = right[rows]
                chance = sum(self.chances[row] for row in rows) / len(rows)
                families[family] = Score(part.mean().item(), bootstrap_interval(part), len(rows), chance)
        n = len(self.right)
        return ProbeRun(
            config=config,
            accuracy=right.mean().item(),
            interval=bootstrap_interval(right),
            families=families,
            evidence_recall=sum(self.recalls) / n,
            visual=self.visual / n,
            visual_kept=self.visual_kept / n,
            retention=self.retention,
            tower=sum(self.towers) / n,
            density=sum(self.densities) / n,
            prefill_ms=self.milliseconds / n,
        )


def load_probe_model(
    model: str | Path, *, dtype: Dtype = torch.float32, device: torch.device | None = None
) -> tuple[PreTrainedModel, Any]:
    """A probe model by its type's name, or any other by its hub id or directory.

    Raises:
        ModelLoadError: it cannot be loaded or is not supported.
    """
    path = probe_checkpoint(str(model)) if str(model) in PROBE_MODEL_TYPES else model
    return load_model(path, dtype=dtype, device=device)


def probe(
    model: PreTrainedModel,
    processor: Any,
    config: str | Path | Mapping[str, Any] | PatchConfig,
    *,
    name: str,
    limit: int,
    num_frames: int = 16,
) -> ProbeResult:
    """Ask the first ``limit`` questions of the test split: of the unpatched model, of the patched one, and under the
    baselines at the retention of the patched one.

    Raises:
        ValueError: wrong config, or ``limit`` or ``num_frames`` out of range.
    """
    resolved = load_config(config)
    configs = {name: resolved} if not resolved.methods() else {"dense": load_config("dense"), name: resolved}
    tallies = ask(model, processor, configs, examples("test", limit, num_frames=num_frames))
    mine = tallies[name]
    if mine.retention < 1:
        others = {other: at_retention(other, mine.retention) for other in BASELINES if other != name}
        tallies |= ask(model, processor, others, examples("test", limit, num_frames=num_frames))
    baselines = {
        other: Baseline(**vars(tally.run(other)), **_paired(mine, tally))
        for other, tally in tallies.items()
        if other != name
    }
    return ProbeResult(
        **vars(mine.run(name)), model=model.config.model_type, num_frames=num_frames, baselines=baselines
    )


def at_retention(method: str, retention: float) -> PatchConfig:
    """A ``tokens`` method alone, at that retention ratio."""
    return load_config({"tokens": {"method": method, "retention": retention}})


def ask(
    model: PreTrainedModel,
    processor: Any,
    configs: Mapping[str, PatchConfig],
    questions: Iterable[Example],
    *,
    blank: bool = False,
) -> dict[str, Tally]:
    """Ask all questions under each config, batch by batch in turns, so that their times can be compared.

    Args:
        blank: show grey frames instead of the video, to see what the text alone gives away.
    """
    speaks_plainly = not hasattr(model.config, PROBE_MARK)
    tallies = {name: Tally() for name in configs}
    for batch in _batches(questions):
        videos = [torch.full_like(example.frames, 128) if blank else example.frames for example in batch]
        texts = [instruction(example) if speaks_plainly else example.question for example in batch]
        inputs = prepare_batch(processor, videos, texts, [clip_metadata(len(video)) for video in videos])
        inputs = inputs.to(model.device, model.dtype)
        evidence = _evidence_tokens(model, inputs, batch)
        limits: dict[str, Any] = {"max_new_tokens": _SENTENCE_TOKENS}
        if not speaks_plainly:
            options = [example.options for example in batch]
            limits = among_options(processor.tokenizer, options, inputs["input_ids"].shape[1])
        for name, config in configs.items():
            with patched(model, config, processor=processor):
                output = model.generate(**inputs, **limits, do_sample=False)  # type: ignore[operator]
                report = last_report(model)
            new = output[:, inputs["input_ids"].shape[1] :]
            answers = [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
            tallies[name].add(batch, answers, report, evidence)
    return tallies


def among_options(tokenizer: Any, batch: Sequence[Sequence[str]], prompt: int) -> dict[str, Any]:
    """Arguments of ``generate`` by which an answer is one of the question's options, as in a multiple-choice test.

    Args:
        batch: options of each question.
        prompt: tokens before the answers.
    """
    end = tokenizer.eos_token_id
    options = [[[*tokenizer(option)["input_ids"], end] for option in row] for row in batch]

    def allowed(row: int, ids: Tensor) -> list[int]:
        said = ids[prompt:].tolist()
        following = [option[len(said)] for option in options[row] if option[: len(said)] == said and said != option]
        return following or [end]

    longest = max(len(option) for row in options for option in row)
    return {"prefix_allowed_tokens_fn": allowed, "max_new_tokens": longest}


def instruction(example: Example) -> str:
    """The question for a model that was not trained on the probe."""
    return f"{example.question} Answer with one word: {', '.join(example.options[:-1])} or {example.options[-1]}."


def parse_answer(text: str, options: Sequence[str]) -> str | None:
    """The option that an answer names: the first in its text, whatever its case; None if it names none."""
    by_name = {option.lower(): option for option in options}
    return next((by_name[word] for word in re.findall(r"\w+", text.lower()) if word in by_name), None)


def _paired(mine: Tally, other: Tally) -> dict[str, Any]:
    differences = torch.tensor(mine.right, dtype=torch.float64) - torch.tensor(other.right, dtype=torch.float64)
    return {"difference": differences.mean().item(), "difference_interval": bootstrap_interval(differences)}


def _batches(questions: Iterable[Example]) -> Iterator[list[Example]]:
    waiting = iter(questions)
    while batch := list(itertools.islice(waiting, _BATCH)):
        yield batch


def _evidence_tokens(model: PreTrainedModel, inputs: Mapping[str, Any], batch: Sequence[Example]) -> list[Tensor]:
    """For each example ``[N]`` bool on the CPU: visual tokens that show the answer, in the order of the grid."""
    adapter = find_adapter(model)
    core = adapter.core(model)
    items = adapter.items(core, "video", inputs)
    together = adapter.frames_per_unit(core)
    found = []
    for item, example in zip(items, batch, strict=True):
        units, height, width = item.segments[0].grid
        cells = coverage(example.evidence, (height, width)).any(dim=0)
        filled = torch.cat([cells, cells[-1:].expand(units * together - cells.shape[0], -1, -1)])
        found.append(filled.view(units, together, height, width).any(dim=1).flatten())
    return found
