"""An evaluation from its plan to its results: what is left to ask, who asks it, and what is written down."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from spatiotoken.evaluation.asking import Asker
from spatiotoken.evaluation.journal import Answered, Journal
from spatiotoken.evaluation.plan import Plan, PlanError, Task, check_output
from spatiotoken.evaluation.results import Results, summarize

Answers = dict[tuple[str, str, str], Answered]
"""By dataset, config and id."""
Engine = Callable[[Plan, list[Task]], Iterable[list[Answered]]]
"""Asks tasks and gives the rows of each as soon as they are there, in any order."""


def evaluate(
    plan: Plan,
    output: Path,
    engine: Engine,
    *,
    shard: tuple[int, int] = (0, 1),
    retry_failed: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Results | None:
    """Ask what has no answer in ``output`` yet, and write results there.

    Under ``accelerate launch`` each process asks its part, and the first one writes the results.

    Args:
        shard: which part of the tasks is asked here, and of how many; of all parts the results are written by a run
            without shards, which asks nothing any more.
        retry_failed: ask again where a video could not be read.
        progress: told how many answers there are here, and how many there will be.

    Returns:
        What was written; None of a shard, and in all processes but the first.

    Raises:
        PlanError: ``output`` holds another run, or the shard is none.
        DatasetError: annotations cannot be read.
    """
    part, parts = shard
    if not 0 <= part < parts:
        raise PlanError(f"shard {part} of {parts} does not exist: they are counted from 0")
    state = PartialState()
    if state.is_main_process:
        check_output(plan, output)
    state.wait_for_everyone()
    journal = Journal(output, f"{part * state.num_processes + state.process_index}-of-{parts * state.num_processes}")
    answers = _by_question(journal.read())
    # By number, not by who has time: what a process has asked before is its own when it resumes.
    mine = part * state.num_processes + state.process_index
    tasks = [task for at, task in enumerate(plan.tasks()) if at % (parts * state.num_processes) == mine]
    left = [task for task in (_unanswered(plan, task, answers, retry_failed) for task in tasks) if task is not None]
    total = sum(_size(task) for task in tasks)
    done = total - sum(_size(task) for task in left)
    progress(done, total)
    for rows in engine(plan, left):
        journal.write(rows)
        answers |= {row.key: row for row in rows}
        done += len(rows)
        progress(done, total)
    if state.num_processes > 1:
        answers = _by_question(gather_object(list(answers.values())))
    if parts > 1 or not state.is_main_process:
        return None
    results = summarize(plan, answers)
    results.write(output)
    return results


def local_engine(asker: Asker) -> Engine:
    """One model in this process; the next task's videos are read while it answers."""

    def ask(plan: Plan, tasks: list[Task]) -> Iterator[list[Answered]]:
        with ThreadPoolExecutor(max_workers=1) as reader:
            coming = [reader.submit(asker.look, tasks[0])] if tasks else []
            for at, task in enumerate(tasks):
                seen = coming.pop().result()
                if at + 1 < len(tasks):
                    coming.append(reader.submit(asker.look, tasks[at + 1]))
                yield asker.ask(task, seen)

    return ask


def _by_question(rows: Iterable[Answered]) -> Answers:
    """Where a video could not be read at first, what was answered later, in whatever file that is."""
    answers: Answers = {}
    for row in rows:
        if row.error is None or row.key not in answers:
            answers[row.key] = row
    return answers


def _unanswered(plan: Plan, task: Task, answers: Mapping[Any, Answered], retry_failed: bool) -> Task | None:
    """The configs of a task that lack an answer. All questions are asked again, since they were asked together."""

    def lacks(config: str) -> bool:
        rows = [answers.get((task.dataset, config, question.id)) for question in plan.of(task)]
        return any(row is None or (retry_failed and row.error is not None) for row in rows)

    configs = tuple(config for config in task.configs if lacks(config))
    return replace(task, configs=configs) if configs else None


def _size(task: Task) -> int:
    return (task.stop - task.start) * len(task.configs)
