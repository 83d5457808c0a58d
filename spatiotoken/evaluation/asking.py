"""Questions put to one model under several configs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from spatiotoken.answer import frames_seen, prepare_batch
from spatiotoken.config import PatchConfig
from spatiotoken.evaluation.base import Clip, Question, VideoQA
from spatiotoken.evaluation.clips import read_clip, select_clip
from spatiotoken.evaluation.journal import Answered
from spatiotoken.evaluation.plan import Plan, Task
from spatiotoken.evaluation.sharing import SharedTower, leaves_the_tower_alone, shared_tower
from spatiotoken.patching import last_report, patched
from spatiotoken.report import ForwardReport
from spatiotoken.video import BackendUnavailableError, VideoReadError


@dataclass(frozen=True)
class Seen:
    """The clips of a task by question, or why there is none: those that all configs share, and those of single ones."""

    shared: Mapping[str, Clip | str]
    chosen: Mapping[tuple[str, str], Clip | str]

    def clip(self, config: str, question: Question) -> Clip | str:
        return self.chosen.get((config, question.id)) or self.shared[question.id]


class Asker:
    """Asks a model what a plan says.

    Args:
        share_tower: compute the tower's output once for all configs that leave the tower alone. The time it took is
            added to the times of those that did not wait for it.
    """

    def __init__(self, plan: Plan, model: PreTrainedModel, processor: Any, *, share_tower: bool = True) -> None:
        self.plan = plan
        self.model = model
        self.processor = processor
        self.share_tower = share_tower

    def check(self) -> None:
        """
        Raises:
            ValueError: a config or a dataset does not fit the model.
        """
        for name, dataset in self.plan.built_datasets.items():
            try:
                dataset.check(self.model.config)
            except ValueError as error:
                raise ValueError(f"dataset {name!r}: {error}") from error
        for name, config in self.plan.built_configs.items():
            try:
                with patched(self.model, config, processor=self.processor):
                    pass
            except ValueError as error:
                raise ValueError(f"config {name!r}: {error}") from error

    def look(self, task: Task) -> Seen:
        """Read the videos that a task needs; needs no model, so it may run beside ``ask``."""
        shared, chosen = {}, {}
        configs = {name: self.plan.built_configs[name] for name in task.configs}
        for question in self.plan.of(task):
            for name, config in configs.items():
                if self._while_decoding(task, config):
                    chosen[name, question.id] = _read(self._select, config, question)
                elif question.id not in shared:
                    shared[question.id] = _read(self._frames, task, question)
        return Seen(shared, chosen)

    def ask(self, task: Task, seen: Seen) -> list[Answered]:
        """The answers, config by config.

        Raises:
            RuntimeError: anything went wrong but the reading of a video; the message says what was being asked.
        """
        dataset = self.plan.built_datasets[task.dataset]
        rows: list[Answered] = []
        with ExitStack() as stack:
            tower = stack.enter_context(shared_tower(self.model)) if self.share_tower else None
            prepared: dict[tuple[str, ...], Any] = {}
            for name in task.configs:
                config = self.plan.built_configs[name]
                if tower is not None:
                    tower.active = leaves_the_tower_alone(config)
                for group in self._together(task, name, seen, rows):
                    clips = [clip for one in group if isinstance(clip := seen.clip(name, one), Clip)]
                    # Configs that see the same frames of the same questions get the very same inputs.
                    own = name if self._while_decoding(task, config) else ""
                    key = (own, *(one.id for one in group))
                    if key not in prepared:
                        prepared[key] = self._inputs(dataset, group, clips)
                    try:
                        rows += self._answers(task, name, config, dataset, group, clips, prepared[key], tower)
                    except Exception as error:
                        ids = ", ".join(question.id for question in group)
                        raise RuntimeError(f"{task.dataset} {ids} under {name}: {error}") from error
        return rows

    def _together(self, task: Task, name: str, seen: Seen, rows: list[Answered]) -> list[list[Question]]:
        """Questions of a task with as many frames each, since some processors stack videos; errors go to ``rows``."""
        groups: dict[int, list[Question]] = {}
        for question in self.plan.of(task):
            clip = seen.clip(name, question)
            if isinstance(clip, str):
                rows.append(Answered(task.dataset, name, question.id, error=clip))
            else:
                groups.setdefault(len(clip.frames), []).append(question)
        return list(groups.values())

    def _inputs(self, dataset: VideoQA, group: Sequence[Question], clips: Sequence[Clip]) -> Any:
        prompts = [dataset.prompt(question, clip) for question, clip in zip(group, clips, strict=True)]
        inputs = prepare_batch(
            self.processor, [clip.frames for clip in clips], prompts, [clip.metadata() for clip in clips]
        )
        return inputs.to(self.model.device, self.model.dtype)

    def _answers(
        self,
        task: Task,
        name: str,
        config: PatchConfig,
        dataset: VideoQA,
        group: Sequence[Question],
        clips: Sequence[Clip],
        inputs: Any,
        tower: SharedTower | None,
    ) -> list[Answered]:
        inside = config.model_copy(update={"frames": None}) if self._while_decoding(task, config) else config
        length = inputs["input_ids"].shape[1]
        limits = dataset.limits(self.processor.tokenizer, group, length)
        if tower is not None:
            tower.saved_ms = 0.0
        with patched(self.model, inside, processor=self.processor):
            output = self.model.generate(**inputs, **limits, do_sample=False)  # type: ignore[operator]
            report = last_report(self.model)
        rows_seen = frames_seen(self.model, report, [len(clip.frames) for clip in clips])
        texts = self.processor.batch_decode(output[:, length:], skip_special_tokens=True)
        costs = _costs(report, len(group), tower.saved_ms if tower is not None else 0.0)
        rows = []
        for question, clip, text, kept in zip(group, clips, texts, rows_seen, strict=True):
            said = text.strip()
            parsed = dataset.parse(said, question)
            rows.append(
                Answered(
                    task.dataset,
                    name,
                    question.id,
                    prediction=said,
                    parsed=parsed,
                    scores=dataset.score(parsed, question),
                    frames=[clip.indices[row] for row in kept],
                    **costs,
                )
            )
        return rows

    def _while_decoding(self, task: Task, config: PatchConfig) -> bool:
        in_files = config.frames is not None and config.frames.selects_while_decoding
        has_files = not self.plan.built_datasets[task.dataset].makes_clips
        return self.plan.candidate_fps is not None and in_files and has_files

    def _select(self, config: PatchConfig, question: Question) -> Clip:
        assert config.frames is not None and self.plan.candidate_fps is not None
        return select_clip(question, config.frames, self.plan.candidate_fps)

    def _frames(self, task: Task, question: Question) -> Clip:
        dataset = self.plan.built_datasets[task.dataset]
        read = dataset.clip if dataset.makes_clips else read_clip
        return read(question, self.plan.num_frames)


def _read(read: Callable[..., Clip], *args: Any) -> Clip | str:
    """A clip, or what is wrong with its video."""
    try:
        return read(*args)
    except (VideoReadError, BackendUnavailableError) as error:
        return f"{type(error).__name__}: {error}"


def _costs(report: ForwardReport, questions: int, saved_ms: float) -> dict[str, Any]:
    layers = report.layer_tokens
    visual = report.visual_tokens
    kept = sum(layers) / len(layers) - report.text_tokens
    densities = [entry.density for entry in report.attention] or [1.0]
    return {
        "prompt_tokens": report.prompt_tokens / questions,
        "visual_tokens": visual / questions,
        "visual_kept": report.visual_kept / questions,
        "retention": kept / visual if visual else None,
        "density": sum(densities) / len(densities),
        "ttft_ms": report.prefill_ms + saved_ms,
        "decode_ms": report.decode_ms,
        "peak_memory_bytes": report.peak_memory_bytes,
    }
