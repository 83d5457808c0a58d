"""Evaluation on a Ray cluster: the tasks of a plan as Ray Data tasks, each worker with a model of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from spatiotoken.answer import resolve_device, resolve_dtype
from spatiotoken.evaluation.asking import Asker
from spatiotoken.evaluation.journal import Answered
from spatiotoken.evaluation.plan import Plan, PlanError, Task
from spatiotoken.evaluation.run import Engine
from spatiotoken.probe.evaluate import load_probe_model

RETRIES = 3
"""How often a task is given to another worker when its own is lost."""


def ray_engine(*, workers: int, gpus: float, address: str = "auto", share_tower: bool = True) -> Engine:
    """Asks on a Ray cluster that runs already. Videos and annotations have to be where the plan says on every node.

    Args:
        workers: how many models are loaded.
        gpus: what each of them takes; 0 for the CPU.
        address: of the cluster; "auto" for the one on this machine. Where the caller has connected, that one.

    Raises:
        PlanError: Ray is not installed, or there is no cluster.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise PlanError("--engine ray needs Ray: pip install 'spatiotoken[ray]'") from error
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False)
        except ConnectionError as error:
            raise PlanError(f"no Ray cluster at address {address!r}: start one with `ray start --head`") from error

    def ask(plan: Plan, tasks: list[Task]) -> Iterator[list[Answered]]:
        if not tasks:
            return
        told = [{"task": json.dumps(asdict(task))} for task in tasks]
        answered = ray.data.from_items(told, override_num_blocks=len(tasks)).map_batches(
            _Worker,
            fn_constructor_args=(plan.model_dump_json(), gpus > 0, share_tower),
            batch_size=1,
            concurrency=workers,
            num_gpus=gpus,
            max_restarts=RETRIES,
            max_task_retries=RETRIES,
        )
        for row in answered.iter_rows():
            yield [Answered(**one) for one in json.loads(row["rows"])]

    return ask


class _Worker:
    """A model on one of the cluster's machines."""

    def __init__(self, plan: str, on_gpu: bool, share_tower: bool) -> None:
        self._plan = Plan.model_validate_json(plan)
        device = resolve_device("cuda" if on_gpu else "cpu")
        loaded, processor = load_probe_model(self._plan.model, dtype=resolve_dtype(self._plan.dtype), device=device)
        self._asker = Asker(self._plan, loaded, processor, share_tower=share_tower)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        told = []
        for text in batch["task"]:
            settings = json.loads(text)
            task = Task(**(settings | {"configs": tuple(settings["configs"])}))
            told.append(json.dumps([asdict(row) for row in self._asker.ask(task, self._asker.look(task))]))
        return {"rows": told}
