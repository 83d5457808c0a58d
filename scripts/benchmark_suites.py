"""The suites of whole requests (e2e, stages, memory) and of reading files: their options and what is written."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available, logging

from spatiotoken.answer import resolve_device, resolve_dtype
from spatiotoken.benchmark import machine
from spatiotoken.benchmark_chart import bar_chart
from spatiotoken.benchmark_models import FAMILIES, FRAMES, SIZES, Workload
from spatiotoken.frame_benchmark import write_long_video
from spatiotoken.memory_benchmark import compare_memory, memory_table
from spatiotoken.reader_benchmark import compare_readers, reader_table
from spatiotoken.request_benchmark import NEW_TOKENS, REPEATS, compare_requests, request_table
from spatiotoken.stage_benchmark import compare_stages, stage_table

Bars = Mapping[str, Mapping[str, float]]

SUITES = {
    "e2e": "Time to first token and to the last, dense beside patched, predicted beside realised, and beside the same "
    "model natively given as many tokens.",
    "stages": "Where the time of a request goes, from the file to the last token.",
    "memory": "Peak memory of a prefill above the weights, each config in a process of its own.",
    "reader": "Reading a video file with every backend that is installed, in every way.",
}


def run_suite(suite: str, arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog=f"benchmark.py --suite {suite}", description=SUITES[suite])
    add_arguments(parser, suite)
    args = parser.parse_args(arguments)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        if args.threads is not None:
            if args.threads < 1:
                raise ValueError(f"--threads must be at least 1, not {args.threads}")
            torch.set_num_threads(args.threads)
        write_results(suite, args, reader(args) if suite == "reader" else requests(suite, args))
    except ValueError as error:
        parser.error(str(error))


def add_arguments(parser: argparse.ArgumentParser, suite: str) -> None:
    parser.add_argument("--threads", type=int, help="torch's CPU threads")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of Markdown")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write JSON, Markdown and pictures of bars there too")
    if suite != "memory":
        parser.add_argument("--repeats", type=int, default=REPEATS, help="rounds; by default %(default)s")
    if suite == "reader":
        parser.add_argument("--video", type=Path, help="file to read; made for the while if not given")
        parser.add_argument("--minutes", type=float, default=1.0, help="length of a file that is made")
        return
    parser.add_argument("--size", choices=SIZES, default="cpu", help="7b: the released shapes, for a GPU")
    parser.add_argument("--models", nargs="+", default=tuple(FAMILIES), choices=tuple(FAMILIES))
    parser.add_argument(
        "--frames", type=int, nargs="+", help="of the video; by default 8 (tiny), 32, or 32 64 256 (7b)"
    )
    parser.add_argument("--configs", nargs="+", help="presets or .yaml files instead of the suite's own")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; by default float32, at size 7b bfloat16")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; by default cpu, at size 7b cuda")
    parser.add_argument(
        "--attention",
        nargs="+",
        help="the models' own; by default sdpa, at size 7b flash_attention_2 too where present",
    )
    if suite != "memory":
        parser.add_argument("--warmup", type=int, default=0, help="rounds before those; by default %(default)s")
        parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help="by default %(default)s")


def workloads(args: argparse.Namespace) -> list[Workload]:
    large = args.size == "7b"
    device = resolve_device(args.device or ("cuda" if large else "cpu"))
    dtype = resolve_dtype(args.dtype or ("bfloat16" if large else "float32"))
    if not isinstance(dtype, torch.dtype):
        raise ValueError("random models have no dtype of their own: --dtype auto is for checkpoints")
    frames = args.frames or FRAMES[args.size]
    if min(frames) < 4 or any(count % 4 for count in frames):
        raise ValueError(f"--frames must be multiples of 4, so that half of them can be taken, not {frames}")
    flash = ("flash_attention_2",) if large and is_flash_attn_2_available() else ()
    threads = torch.get_num_threads()
    return [
        Workload(model, args.size, count, dtype, str(device), attention, threads)
        for model in args.models
        for count in frames
        for attention in args.attention or ("sdpa", *flash)
    ]


Result = tuple[dict[str, Any], str, str, str, Bars]
"""Data, Markdown, and of the picture the name, the unit and the bars."""


def requests(suite: str, args: argparse.Namespace) -> Iterator[Result]:
    chosen = workloads(args)
    if suite == "memory":
        for peaks in compare_memory(chosen, args.configs):
            bars = {one.config: {"peak": one.peak_bytes / 2**20} for one in peaks.peaks}
            yield peaks.to_dict(), memory_table(peaks), _name(peaks.workload), "MiB", bars
        return
    rounds = {"repeats": args.repeats, "warmup": args.warmup, "new_tokens": args.new_tokens}
    if suite == "stages":
        for stages in compare_stages(chosen, args.configs, **rounds):
            parts = {one.config: one.stages for one in stages.timings}
            yield stages.to_dict(), stage_table(stages), _name(stages.workload), "ms", parts
        return
    for found in compare_requests(chosen, args.configs, **rounds):
        parts = {
            one.config: {"first token": one.first_token_ms, "further tokens": one.total_ms - one.first_token_ms}
            for one in found.timings
        }
        yield found.to_dict(), request_table(found), _name(found.workload), "ms", parts


def reader(args: argparse.Namespace) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as directory:
        path = args.video or Path(directory, "video.mp4")
        if args.video is None:
            write_long_video(path, args.minutes)
        found = compare_readers(path, repeats=args.repeats)
    bars = {f"{one.backend}, {one.way}": {"frames": one.frames_per_second} for one in found.timings}
    yield found.to_dict(), reader_table(found), "files", "frames/s", bars


def write_results(suite: str, args: argparse.Namespace, results: Iterator[Result]) -> None:
    """Prints and saves each result as soon as it is there."""
    command = f"python {shlex.join(sys.argv)}"
    stem = suite if suite == "reader" else f"{suite}-{args.size}"
    comparisons: list[dict[str, Any]] = []
    whole = {"suite": suite, "command": command, "machine": _machine(suite, args), "comparisons": comparisons}
    texts = [f"`{command}`\n\n" + ", ".join(f"{key}: {value}" for key, value in whole["machine"].items())]
    if args.save is not None:
        args.save.mkdir(parents=True, exist_ok=True)
    if not args.json:
        print(texts[0], end="\n\n", flush=True)
    for data, text, name, unit, bars in results:
        comparisons.append(data)
        texts.append(text)
        if not args.json:
            print(text, end="\n\n", flush=True)
        if args.save is not None:
            for file, content in (
                (f"{suite}-{name}.svg", bar_chart(f"{suite}: {name}", unit, bars)),
                (f"{stem}.json", json.dumps(whole, indent=2) + "\n"),
                (f"{stem}.md", "\n\n".join(texts) + "\n"),
            ):
                (args.save / file).write_text(content, encoding="utf-8")
    if args.json:
        print(json.dumps(whole, indent=2))


def _machine(suite: str, args: argparse.Namespace) -> dict[str, Any]:
    if suite == "reader":
        return machine(torch.device("cpu"), torch.float32)
    first = workloads(args)[0]
    return machine(torch.device(first.device), first.dtype)


def _name(workload: Mapping[str, Any]) -> str:
    kind = "" if workload["attention"] == "sdpa" else f"-{workload['attention']}"
    return f"{workload['model_type']}-{workload['size']}-{workload['frames']}{kind}"
