"""Evaluations by the command line, and in processes of their own: killed ones, and several at once.

What takes long is run by `make test-evaluation`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from spatiotoken.probe import build_tiny
from tests.conftest import DATA
from tests.test_cli import assert_refused, invoke

REPOSITORY = Path(__file__).parents[2]
CLIPS = ("flipping_a_pancake.mkv", "nasa_13013_rotated.mp4", "test_non_zero_start.mp4")
CONFIGS = "dense,random,evs"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("qwen2_5_vl", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def nextqa(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """NExT-QA's real questions about clips that are here, one of them damaged and one missing."""
    directory = tmp_path_factory.mktemp("nextqa")
    lines = (DATA / "nextqa_val.csv").read_text().splitlines()
    names = dict.fromkeys(line.split(",")[0] for line in lines[1:])
    for at, name in enumerate(names):
        if at == 0:
            shutil.copy(DATA / "corrupted.mp4", directory / f"{name}.mp4")
        elif at > 1:
            shutil.copy(DATA / CLIPS[at % len(CLIPS)], directory / f"{name}.mp4")
    return ["--dataset", "nextqa", "--annotations", str(DATA / "nextqa_val.csv"), "--video-dir", str(directory)]


def arguments(model: Path, nextqa: list[str], output: Path, *more: str) -> list[str]:
    asked = ["--model", str(model), "--config", CONFIGS, "--num-frames", "4", "--device", "cpu", "--dtype", "float32"]
    return ["eval", *nextqa, *asked, "--output", str(output), *more]


@pytest.fixture(scope="module")
def whole(model: Path, nextqa: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run."""
    output = tmp_path_factory.mktemp("whole")
    result = invoke(*arguments(model, nextqa, output, "--batch-size", "2"))
    assert result.exit_code == 3, (result.stderr, result.exception)
    assert "could not be read" in result.stderr
    return output


def finished(process: subprocess.Popen[str], seconds: float = 300) -> tuple[str, str]:
    """What a process has printed; it does not outlive the test."""
    try:
        return process.communicate(timeout=seconds)
    finally:
        process.kill()


def python(*args: str, **settings: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)} | settings
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *args], text=True, env=environment, cwd=REPOSITORY, **pipes)


def test_command_line(model: Path, nextqa: list[str], whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    figures = results["datasets"]["nextqa"]
    assert set(figures["configs"]) == {"dense", "random", "evs"} and figures["configs"]["dense"]["failed"] > 0
    answered = figures["configs"]["dense"]["answered"]
    assert answered + figures["configs"]["dense"]["failed"] == figures["questions"] and answered > 4
    again = invoke(*arguments(model, nextqa, whole, "--batch-size", "2", "--json"))
    assert again.exit_code == 3 and json.loads(again.stdout) == results, "all answers are there already"
    page = invoke(*arguments(model, nextqa, whole, "--batch-size", "2")).stdout
    assert page.strip() == (whole / "results.md").read_text().strip() and "| random |" in page


def test_datasets_are_listed() -> None:
    listed = json.loads(invoke("datasets", "--json").stdout)
    assert listed["nextqa"]["metrics"] == ["accuracy"] and "video_dir" in listed["nextqa"]["options"]
    text = invoke("datasets").stdout
    assert "nextqa" in text and "videomme" in text


@pytest.mark.parametrize(
    ("more", "culprits"),
    [
        (("--dataset", "nextq"), ("'nextq'", "did you mean 'nextqa'")),
        (("--dataset", "nextqa,nextqa"), ("--dataset",)),
        (("--config", "dense,nothing"), ("nothing",)),
        (("--shard", "2/2"), ("--shard", "2/2")),
        (("--engine", "slurm"), ("slurm", "local, ray")),
        (("--option", "colour=red"), ("nextqa", "colour", "video_dir")),
        (("--option", "mvbench.x=1"), ("mvbench", "nextqa")),
        (("--annotations", "/no/such.csv"), ("/no/such.csv",)),
        (("--annotations", str(DATA / "README.md")), ("README.md", ".csv")),
        (("--dataset", "nextqa,videomme"), ("--annotations", "DATASET=PATH")),
        (("--set", "layers.layer=2"), ("layers.layer",)),
    ],
)
def test_refusals(model: Path, nextqa: list[str], tmp_path: Path, more: tuple[str, ...], culprits: Any) -> None:
    assert_refused(invoke(*arguments(model, nextqa, tmp_path, *more)), *culprits)
    assert not any(tmp_path.iterdir())


def test_another_run_is_not_mixed_in(model: Path, nextqa: list[str], whole: Path) -> None:
    assert_refused(invoke(*arguments(model, nextqa, whole, "--batch-size", "3")), "batch_size = 2, not 3", "--output")


@pytest.mark.slow
def test_killed_runs_go_on(model: Path, nextqa: list[str], whole: Path, tmp_path: Path) -> None:
    """`kill -9` at three moments, with the first answers there; then the results are those of an unbroken run."""
    script = str(REPOSITORY / "scripts" / "evaluate.py")
    args = arguments(model, nextqa, tmp_path, "--batch-size", "2")[1:]
    draw = random.Random(0)
    written = 0
    for _ in range(3):
        process = python(script, *args)
        deadline = time.monotonic() + 120
        # Dead at a random moment within its work, not while it is still importing.
        while size(tmp_path) <= written and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(draw.random() / 10)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was done before it could be killed"
        written = size(tmp_path)
    assert written and not (tmp_path / "results.json").exists()
    process = python(script, *args)
    out, err = finished(process)
    assert process.returncode == 3, err
    assert (tmp_path / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def size(output: Path) -> int:
    return sum(path.stat().st_size for path in output.rglob("*.jsonl"))


@pytest.mark.slow
def test_two_processes(model: Path, nextqa: list[str], whole: Path, tmp_path: Path) -> None:
    """`accelerate launch` shards by questions; the first process writes the same results as one alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    # So named, it starts processes without GPUs too, and `--device cpu` has them do without.
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    script = str(REPOSITORY / "scripts" / "evaluate.py")
    process = python(*launch, script, *arguments(model, nextqa, tmp_path, "--batch-size", "2")[1:])
    out, err = finished(process)
    assert (tmp_path / "results.json").read_bytes() == (whole / "results.json").read_bytes(), err
    writers = {path.name for path in tmp_path.rglob("*.jsonl")}
    assert writers == {"0-of-2.jsonl", "1-of-2.jsonl"}
    assert out.count("10 questions, of which 2 could not be asked") == 1, "only one of them tells"


# A cluster of two workers, one of which is killed as soon as there is an answer.
RAY = """
import os, signal, sys, threading, time
from pathlib import Path
import psutil, ray
from spatiotoken.cli import main

ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
output = Path(sys.argv[sys.argv.index("--output") + 1])

def kill_one():
    while not any(output.rglob("*.jsonl")):
        time.sleep(0.01)
    found = [child for child in psutil.Process().children(recursive=True) if "MapWorker" in " ".join(child.cmdline())]
    os.kill(found[0].pid, signal.SIGKILL)
    print("killed one of", len(found), file=sys.stderr, flush=True)

threading.Thread(target=kill_one, daemon=True).start()
main()
"""


@pytest.mark.slow
def test_ray(model: Path, nextqa: list[str], whole: Path, tmp_path: Path) -> None:
    """On two workers the answers are those of one process, and a lost worker's tasks are asked again."""
    code = tmp_path / "on_ray.py"
    code.write_text(RAY)
    args = arguments(model, nextqa, tmp_path / "out", "--batch-size", "2", "--engine", "ray", "--workers", "2")
    process = python(str(code), *args, RAY_ENABLE_UV_RUN_RUNTIME_ENV="0")
    out, err = finished(process)
    assert process.returncode == 3, err
    assert "killed one of 2" in err
    assert (tmp_path / "out" / "results.json").read_bytes() == (whole / "results.json").read_bytes()


@pytest.mark.slow
def test_ray_without_a_cluster(model: Path, nextqa: list[str], tmp_path: Path) -> None:
    process = python("-m", "spatiotoken", *arguments(model, nextqa, tmp_path, "--engine", "ray"))
    out, err = finished(process)
    assert process.returncode == 2 and "no Ray cluster at address 'auto'" in err and "ray start --head" in err
