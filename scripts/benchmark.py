#!/usr/bin/env python3
"""Time the prefill with and without patches, or the methods alone, side by side.

overhead:  what being patched costs when nothing is reduced.
reduction: time to first token of presets, what they compute themselves included.
tokens:    every method that merges or drops tokens by their features, at its preset, on made-up features and without a
           model; with --authors beside the authors' own code.
frames:    choosing frames while a long file is decoded, beside decoding the candidates alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from spatiotoken.answer import resolve_device, resolve_dtype
from spatiotoken.benchmark import PRESETS, Comparison, compare
from spatiotoken.frame_benchmark import FRAME_CONFIGS, compare_selectors, write_long_video
from spatiotoken.token_benchmark import (
    TokenComparison,
    TokenTiming,
    compare_subjects,
    layer_subjects,
    preset_reducers,
    reducer_subject,
    synthetic_video,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("overhead", "reduction", "tokens", "frames"), required=True)
    parser.add_argument(
        "--configs", nargs="+", help="presets or .yaml files of the reduction and frames suites, instead of their own"
    )
    parser.add_argument("--repeats", type=int, help="rounds; by default 21, in the frames suite 3")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--visual-tokens", type=int, default=2000)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="torch's CPU threads; 1 is steady on a machine that others use too")
    tokens = parser.add_argument_group("tokens suite (of the others only repeats, warmup, dtype, device and threads)")
    tokens.add_argument("--methods", nargs="+", help="methods to time instead of all")
    tokens.add_argument("--grid", nargs=3, type=int, default=(32, 14, 14), metavar=("T", "H", "W"))
    tokens.add_argument("--channels", type=int, default=896)
    tokens.add_argument("--seconds", type=float, default=20.0, help="after which no further round of a method begins")
    tokens.add_argument("--authors", type=Path, metavar="DIR", help="checkouts of the authors' repositories")
    frames = parser.add_argument_group("frames suite (of the others only configs, repeats and threads)")
    frames.add_argument(
        "--video", type=Path, help="file to load; made if it is not there, and for the while if not given"
    )
    frames.add_argument("--minutes", type=float, default=30.0, help="length of a file that is made")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--markdown", action="store_true", help="print a table in Markdown (tokens suite)")
    args = parser.parse_args()
    logging.disable_progress_bar()
    if args.threads is None and args.suite == "tokens":
        args.threads = 1
    if args.threads is not None:
        if args.threads < 1:
            parser.error(f"--threads must be at least 1, not {args.threads}")
        torch.set_num_threads(args.threads)
    if args.suite == "frames":
        time_frames(parser, args)
        return
    if args.repeats is None:
        args.repeats = 21
    if args.suite == "tokens":
        time_tokens(parser, args)
        return
    try:
        comparison = compare(
            ["dense"] if args.suite == "overhead" else args.configs or PRESETS,
            repeats=args.repeats,
            warmup=args.warmup,
            visual_tokens=args.visual_tokens,
            hidden_size=args.hidden_size,
            num_layers=args.num_layers,
            dtype=resolve_dtype(args.dtype),
            device=resolve_device(args.device),
        )
    except ValueError as error:
        parser.error(str(error))
    if args.json:
        print(json.dumps({"suite": args.suite} | comparison.to_dict(), indent=2))
    else:
        print_table(args.suite, comparison)


def time_tokens(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    reducers = preset_reducers()
    subjects = {name: reducer_subject(reducer) for name, reducer in reducers.items()} | layer_subjects()
    if unknown := set(args.methods or ()) - set(subjects):
        parser.error(f"unknown methods {', '.join(sorted(unknown))}; there are {', '.join(subjects)}")
    if args.methods:
        subjects = {name: subjects[name] for name in args.methods}
    authors, notes = {}, {}
    if args.authors is not None:
        if not args.authors.is_dir():
            parser.error(f"--authors must be a folder, not {str(args.authors)!r}")
        from authors import load_originals  # beside this file

        warnings.simplefilter("ignore")  # those of their code are not ours to heed
        authors, notes = load_originals(args.authors, {name: reducers.get(name) for name in subjects})
    try:
        dtype = resolve_dtype(args.dtype)
        if not isinstance(dtype, torch.dtype):
            raise ValueError("made-up features have no dtype of their own: --dtype auto is for checkpoints")
        video = synthetic_video(tuple(args.grid), args.channels, dtype=dtype, device=resolve_device(args.device))
        comparison = compare_subjects(
            subjects,
            authors,
            video,
            repeats=args.repeats,
            warmup=args.warmup,
            seconds=args.seconds,
            notes=notes,
        )
    except ValueError as error:
        parser.error(str(error))
    if args.json:
        print(json.dumps({"suite": "tokens"} | comparison.to_dict(), indent=2))
    elif args.markdown:
        print_markdown(comparison)
    else:
        print_token_table(comparison)


def time_frames(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = args.video or Path(directory, "long.mp4")
        if not path.exists():
            write_long_video(path, args.minutes)
        try:
            comparison = compare_selectors(
                args.configs or FRAME_CONFIGS,
                path,
                repeats=args.repeats or 3,
                threads=args.threads or torch.get_num_threads(),
            )
        except ValueError as error:
            parser.error(str(error))
    if args.json:
        print(json.dumps({"suite": "frames"} | comparison.to_dict(), indent=2))
        return
    console = Console(markup=False, highlight=False)
    console.print(", ".join(f"{key}: {value}" for key, value in (comparison.machine | comparison.video).items()))
    title = f"frames: {comparison.candidates} candidates alone take {comparison.candidates_seconds:.1f} s"
    table = Table("config", "frames", "s", "ratio to candidates alone", "peak memory, MiB", title=title)
    for timing in comparison.timings:
        memory = f"{timing.peak_memory_bytes / 2**20:.0f}"
        table.add_row(timing.config, str(timing.frames), f"{timing.seconds:.1f}", f"{timing.ratio:.3f}", memory)
    console.print(table)


def print_table(suite: str, comparison: Comparison) -> None:
    console = Console(markup=False, highlight=False)
    console.print(", ".join(f"{key}: {value}" for key, value in (comparison.machine | comparison.model).items()))
    title = f"{suite}: {comparison.prompt_tokens} prompt tokens, {comparison.visual_tokens} visual"
    table = Table("config", "visual kept", "tokens after each stage", "median ms", "ratio", "95 %", title=title)
    for timing in comparison.timings:
        low, high = timing.ratio_interval
        stages = ", ".join(f"{stage} {tokens}" for stage, tokens in timing.stages.items())
        median, ratio = f"{timing.median_ms:.1f}", f"{timing.ratio:.3f}"
        table.add_row(timing.config, str(timing.visual_kept), stages, median, ratio, f"{low:.3f} to {high:.3f}")
    console.print(table)


_COLUMNS = ("method", "tokens", "ms", "authors' tokens", "authors' ms", "ours / authors'", "95 %", "note")


def token_row(timing: TokenTiming) -> tuple[str, ...]:
    ours = (timing.method, str(timing.kept), f"{timing.median_ms:.1f}")
    if timing.ratio is None or timing.ratio_interval is None:
        return *ours, "", "", "", "", timing.note
    low, high = timing.ratio_interval
    theirs = (str(timing.authors_kept), f"{timing.authors_median_ms:.1f}")
    return *ours, *theirs, f"{timing.ratio:.3f}", f"{low:.3f} to {high:.3f}", timing.note


def print_token_table(comparison: TokenComparison) -> None:
    console = Console(markup=False, highlight=False)
    console.print(", ".join(f"{key}: {value}" for key, value in comparison.machine.items()))
    shape = " x ".join(map(str, (*comparison.grid, comparison.channels)))
    table = Table(*_COLUMNS, title=f"tokens: {shape}")
    for timing in comparison.timings:
        table.add_row(*token_row(timing))
    console.print(table)


def print_markdown(comparison: TokenComparison) -> None:
    for row in (_COLUMNS, ["---"] * len(_COLUMNS), *map(token_row, comparison.timings)):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
