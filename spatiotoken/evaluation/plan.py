"""What one evaluation asks: all that its results depend on, as it is saved, compared and sent to workers."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import spatiotoken
from spatiotoken.config import PatchConfig, load_config
from spatiotoken.evaluation.base import DATASETS, DatasetError, Question, VideoQA
from spatiotoken.registry import STAGES


class PlanError(ValueError):
    """A plan that cannot be carried out, or not in that directory."""


@dataclass(frozen=True)
class Task:
    """Questions of one dataset that are asked together, ``start`` to ``stop`` in its order, under some configs."""

    dataset: str
    start: int
    stop: int
    configs: tuple[str, ...]


class Plan(BaseModel):
    """All that the answers depend on but the versions of the libraries.

    Attributes:
        datasets: by name the options of each.
        configs: by name the settings of each.
        candidate_fps: configs with a ``frames`` method choose among so many frames a second while a file is decoded;
            None has them choose inside the model, among ``num_frames``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    dtype: str = "auto"
    datasets: dict[str, dict[str, Any]]
    configs: dict[str, dict[str, Any]]
    num_frames: int = Field(32, ge=1)
    batch_size: int = Field(1, ge=1)
    limit: int | None = Field(None, ge=1)
    candidate_fps: float | None = Field(None, gt=0)

    @cached_property
    def built_configs(self) -> dict[str, PatchConfig]:
        return {name: load_config(settings) for name, settings in self.configs.items()}

    @cached_property
    def built_datasets(self) -> dict[str, VideoQA]:
        return {name: build_dataset(name, options) for name, options in self.datasets.items()}

    @cached_property
    def questions(self) -> dict[str, list[Question]]:
        """Of each dataset those that are asked.

        Raises:
            DatasetError: annotations cannot be read, or two questions have one id.
        """
        return {name: _asked(dataset, self.limit) for name, dataset in self.built_datasets.items()}

    def tasks(self) -> Iterator[Task]:
        """What is asked together does not depend on what was answered before, nor on how many processes there are."""
        for name, questions in self.questions.items():
            for start in range(0, len(questions), self.batch_size):
                yield Task(name, start, min(start + self.batch_size, len(questions)), tuple(self.configs))

    def of(self, task: Task) -> list[Question]:
        return self.questions[task.dataset][task.start : task.stop]


def make_plan(
    model: str,
    datasets: Mapping[str, Mapping[str, Any]],
    configs: Sequence[str],
    *,
    overrides: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Plan:
    """A checked plan.

    Args:
        datasets: by name the options of each.
        configs: names of presets, or paths of .yaml files.
        overrides: of every config that has such a method.

    Raises:
        ValueError: an unknown dataset, option or config, two configs of one name, or a number out of range.
    """
    resolved: dict[str, dict[str, Any]] = {}
    used: set[str] = set()
    for config in configs:
        name = Path(config).stem if config.endswith((".yaml", ".yml")) else config
        if name in resolved:
            raise PlanError(f"two configs are called {name!r}")
        own = load_config(config)
        # `dense` among others has no method to set anything of.
        settable = PatchConfig.model_fields.keys() - set(STAGES) | own.methods().keys()
        mine = {key: value for key, value in (overrides or {}).items() if key.partition(".")[0] in settable}
        resolved[name] = load_config(own, **mine).to_dict()
        used |= mine.keys()
    if unused := (overrides or {}).keys() - used:
        raise PlanError(f"none of the configs has what is to be set: {', '.join(sorted(unused))}")
    try:
        plan = Plan(
            model=model,
            datasets={name: _plain(options) for name, options in datasets.items()},
            configs=resolved,
            **settings,
        )
    except ValidationError as error:
        raise PlanError(_told(error)) from error
    if not plan.datasets or not plan.configs:
        raise PlanError("there must be a dataset and a config")
    _ = plan.built_datasets  # whose options are checked now
    return plan


def build_dataset(name: str, options: Mapping[str, Any]) -> VideoQA:
    """
    Raises:
        ValueError: an unknown dataset, or an option that it does not have.
    """
    kind = DATASETS.get(name)
    try:
        return kind(**options)
    except ValidationError as error:
        raise PlanError(f"dataset {name!r}: {_told(error)}; its options: {', '.join(kind.model_fields)}") from error


def digest(questions: Sequence[Question]) -> str:
    """Tells whether two runs ask the same."""
    asked = [[one.id, one.prompt, one.answer, list(one.options)] for one in questions]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    return {
        "spatiotoken": spatiotoken.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def check_output(plan: Plan, output: Path) -> None:
    """Write down what is asked in a new directory, or make sure that one with answers is of the same run.

    Configs and datasets may be added to a run, and its limit may be changed.

    Raises:
        PlanError: the directory holds answers to something else; the message names what differs.
    """
    path = output / "plan.json"
    mine = _manifest(plan)
    if path.exists():
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise PlanError(f"{path} is damaged ({error}): take another --output") from error
        for part, values in mine.items():
            for name, value in values.items():
                there = theirs.get(part, {})
                if name in there and there[name] != value:
                    raise PlanError(
                        f"{output} holds a run with {part} {name} = {json.dumps(there[name])[:200]}, "
                        f"not {json.dumps(value)[:200]}: take another --output"
                    )
        mine = {part: theirs.get(part, {}) | values for part, values in mine.items()}
    output.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(mine, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """A process that is killed meanwhile leaves the old file."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _manifest(plan: Plan) -> dict[str, dict[str, Any]]:
    fixed = plan.model_dump(include={"model", "dtype", "num_frames", "batch_size", "candidate_fps"})
    digests = {} if plan.limit is not None else {name: digest(asked) for name, asked in plan.questions.items()}
    manifest = {
        "settings": fixed,
        "versions": versions(),
        "configs": plan.configs,
        "datasets": plan.datasets,
        "questions": digests,
    }
    return json.loads(json.dumps(manifest))  # as it is read back, with lists for tuples


def _asked(dataset: VideoQA, limit: int | None) -> list[Question]:
    # Without categories that count alike, no more questions are made than are asked.
    most = None if dataset.macro else limit
    questions = list(itertools.islice(dataset.questions(), most))
    ids = {question.id for question in questions}
    if len(ids) < len(questions):
        raise DatasetError(f"{dataset.name} has {len(questions) - len(ids)} questions with the id of another one")
    if not questions:
        raise DatasetError(f"{dataset.name} has no questions")
    return questions if most == limit else _evenly(questions, str(dataset.macro), limit)


def _evenly(questions: Sequence[Question], kind: str, limit: int | None) -> list[Question]:
    """The first ``limit`` if the groups of a kind take turns, in their old order."""
    turns: Counter[str] = Counter()
    ranks = []
    for at, question in enumerate(questions):
        group = question.groups.get(kind, "")
        ranks.append((turns[group], at))
        turns[group] += 1
    return [questions[at] for at in sorted(at for _, at in sorted(ranks)[:limit])]


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}


def _told(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors())
