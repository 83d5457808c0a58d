"""Commands of the evaluation: ask a model the questions of datasets, and list them."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from spatiotoken.cli_common import (
    PROBE_MODEL,
    USAGE_ERROR,
    JsonFlag,
    Settings,
    bad_input,
    load,
    parse_settings,
    quiet_libraries,
    stdout,
)

if TYPE_CHECKING:
    from spatiotoken.evaluation.plan import Plan
    from spatiotoken.evaluation.run import Engine

SOME_FAILED = 3
"""Exit code where videos could not be read."""

_PerDataset = list[str] | None


def evaluate(
    dataset: Annotated[str, typer.Option(help="names of datasets, separated by commas; see `spatiotoken datasets`")],
    config: Annotated[str, typer.Option(help="presets or paths of .yaml files, separated by commas")],
    output: Annotated[Path, typer.Option(help="directory of answers and results; one with answers is gone on with")],
    model: Annotated[
        str, typer.Option(help="a model's id or directory; by default a small one that knows only the probe")
    ] = PROBE_MODEL,
    annotations: Annotated[
        _PerDataset, typer.Option(metavar="[DATASET=]PATH", help="file of annotations; by default the hub's")
    ] = None,
    video_dir: Annotated[_PerDataset, typer.Option(metavar="[DATASET=]DIR", help="directory of the videos")] = None,
    option: Annotated[
        _PerDataset, typer.Option(metavar="[DATASET.]KEY=VALUE", help="option of a dataset; repeatable")
    ] = None,
    settings: Settings = None,
    num_frames: Annotated[int, typer.Option(min=1, help="frames of each video, at equal distances")] = 32,
    candidate_fps: Annotated[
        float | None,
        typer.Option(help="configs with a frames method choose in the file, among so many frames a second"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="questions that are asked together")] = 1,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="only so many questions of each dataset; where categories count alike, of all of them"
        ),
    ] = None,
    shard: Annotated[str, typer.Option(metavar="I/N", help="ask only the I-th of N parts, from 0")] = "0/1",
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="ask again where a video could not be read")
    ] = False,
    share_tower: Annotated[
        bool, typer.Option(help="run the vision tower once for all configs that leave it alone")
    ] = True,
    engine: Annotated[str, typer.Option(help="local, or ray for a Ray cluster that runs already")] = "local",
    workers: Annotated[int, typer.Option(min=1, help="models that are loaded on the Ray cluster")] = 1,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto (the first GPU, else the CPU), cpu, cuda or cuda:N")] = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Ask the questions of video-QA datasets, under one or more configs. A killed run goes on where it was.

    Exit code 3 says that some videos could not be read.
    """
    from accelerate import PartialState

    from spatiotoken.evaluation.base import DatasetError
    from spatiotoken.evaluation.plan import PlanError, make_plan
    from spatiotoken.evaluation.run import evaluate as run

    names = _names("--dataset", dataset)
    options = {name: _options(name, names, annotations, video_dir, option) for name in names}
    if engine not in ("local", "ray"):
        raise USAGE_ERROR(f"unknown --engine {engine!r}; supported: local, ray")
    part = _shard(shard)
    with contextlib.redirect_stdout(sys.stderr):
        quiet_libraries()
        # Processes may be days apart when they meet at the end.
        state = PartialState(cpu=device == "cpu", timeout=timedelta(days=30))
        with bad_input(ValueError):
            plan = make_plan(
                model,
                options,
                _names("--config", config),
                overrides=parse_settings(settings),
                dtype=dtype,
                num_frames=num_frames,
                batch_size=batch_size,
                limit=limit,
                candidate_fps=candidate_fps,
            )
        with bad_input(DatasetError):
            _ = plan.questions  # read before a model is loaded
        if state.num_processes > 1 and device in ("auto", "cuda"):
            device = str(state.device)
        asking = _engine(engine, plan, dtype, device, workers, share_tower)
        with bad_input(PlanError, DatasetError), _progress(state.is_main_process) as progress:
            results = run(plan, output, asking, shard=part, retry_failed=retry_failed, progress=progress)
    if results is None:
        return
    if as_json:
        print(json.dumps(results.results, indent=2, ensure_ascii=False))
    else:
        print(results.page())
    if results.failed:
        share = f"{results.failed} of {results.asked} answers are missing"
        print(f"spatiotoken: {share}, since videos could not be read: see {output / 'rows'}", file=sys.stderr)
        raise typer.Exit(SOME_FAILED)


def datasets(as_json: JsonFlag = False) -> None:
    """List the datasets that ``spatiotoken eval`` knows, and their options."""
    from spatiotoken.evaluation.base import DATASETS

    found = dict(sorted(DATASETS.items().items()))
    if as_json:
        rows = {
            name: {
                "summary": kind.summary(),
                "hub": kind.hub,
                "metrics": list(kind.metrics),
                "options": {key: about.description for key, about in kind.model_fields.items()},
            }
            for name, kind in found.items()
        }
        print(json.dumps(rows, indent=2))
        return
    table = Table("dataset", "what it is", "metrics", "options")
    for name, kind in found.items():
        table.add_row(name, kind.summary(), ", ".join(kind.metrics), ", ".join(kind.model_fields))
    stdout().print(table)


def _engine(engine: str, plan: Plan, dtype: str, device: str, workers: int, share_tower: bool) -> Engine:
    from spatiotoken.answer import resolve_device
    from spatiotoken.evaluation.asking import Asker
    from spatiotoken.evaluation.ray_engine import ray_engine
    from spatiotoken.evaluation.run import local_engine

    if engine == "ray":
        with bad_input(ValueError):
            on_gpu = resolve_device(device).type == "cuda"
            return ray_engine(workers=workers, gpus=float(on_gpu), share_tower=share_tower)
    loaded, processor = load(plan.model, dtype, device)
    asker = Asker(plan, loaded, processor, share_tower=share_tower)
    with bad_input(ValueError):
        asker.check()
    return local_engine(asker)


def _names(flag: str, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise USAGE_ERROR(f"{flag} {text!r} must name one or more, each once")
    return names


def _options(
    name: str, names: Sequence[str], annotations: _PerDataset, video_dir: _PerDataset, option: _PerDataset
) -> dict[str, Any]:
    """What the command line says of one dataset."""
    found: dict[str, Any] = {}
    for flag, key, values in (("--annotations", "annotations", annotations), ("--video-dir", "video_dir", video_dir)):
        for text in values or []:
            owner, equals, path = text.partition("=")
            if equals and owner in names:
                if owner == name:
                    found[key] = path
            elif len(names) > 1:
                raise USAGE_ERROR(f"{flag} {text!r} must say whose it is, as DATASET=PATH: {', '.join(names)}")
            else:
                found[key] = text
    for key, value in parse_settings(option, "--option", "[DATASET.]KEY=VALUE").items():
        owner, dot, own = key.partition(".")
        if not dot and len(names) > 1:
            raise USAGE_ERROR(f"--option {key!r} must say whose it is, as DATASET.{key}: {', '.join(names)}")
        if dot and owner not in names:
            raise USAGE_ERROR(f"--option {key!r}: {owner!r} is not among the datasets: {', '.join(names)}")
        if not dot or owner == name:
            found[own or owner] = value
    return found


def _shard(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise USAGE_ERROR(f"--shard {text!r} is not I/N with I below N, such as 0/4")
    return int(part), int(parts)


@contextlib.contextmanager
def _progress(shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Told how many answers there are, and how many there will be."""
    columns = (TextColumn("asking"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=not shown)
    tasks: list[TaskID] = []

    def tell(done: int, of: int) -> None:
        if not tasks:  # not before there is something to ask
            tasks.append(bar.add_task("asking", total=of))
            bar.start()
        bar.update(tasks[0], completed=done, total=of)

    try:
        yield tell
    finally:
        if tasks:
            bar.stop()
