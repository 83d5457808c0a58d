#!/usr/bin/env python3
"""Time the prefill with and without patches, or the methods alone, side by side.

overhead:  what being patched costs when nothing is reduced.
reduction: time to first token of presets, what they compute themselves included.
tokens:    every method that merges or drops tokens by their features, at its preset, on made-up features and without a
           model; with --authors beside the authors' own code.
frames:    choosing frames while a long file is decoded, beside decoding the candidates alone.
attention: sparse prefill without a model: the kernels beside dense attention, what the methods' estimates cost, and how
           much of the attention mass they see. On a GPU, with nothing to download: --suite attention --device cuda
layers:    prefill of the language model alone, with every method that drops or merges tokens between its layers, beside
           what the number of tokens in all layers predicts. As in the docs: --suite layers --memory
tower:     vision tower and projector alone, in the shapes of released ones, unpatched, patched, and patched with
           fast_tower. On a GPU, all layers and nothing to download: --suite tower --size 7b --device cuda --memory

Whole requests to models in the released shapes (--size 7b, nothing to download) or in proportion, and reading files;
each has options of its own, which --suite NAME --help tells:

e2e:       time to first token and to the last, predicted and realised, beside natively fewer tokens.
stages:    where that time goes, from the file on.
memory:    peak memory above the weights.
reader:    every backend, in every way of reading.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from benchmark_suites import SUITES, run_suite  # beside this file
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from spatiotoken.answer import resolve_device, resolve_dtype
from spatiotoken.attention_benchmark import (
    Layout,
    Rounds,
    engine_tables,
    estimate_table,
    preset_methods,
    recall_table,
    recall_tables,
    time_engine,
    time_estimates,
    video_prompt,
)
from spatiotoken.benchmark import PRESETS, Comparison, compare, machine
from spatiotoken.frame_benchmark import FRAME_CONFIGS, compare_selectors, write_long_video
from spatiotoken.layer_benchmark import compare_layers, layer_configs, layer_table
from spatiotoken.token_benchmark import (
    TokenComparison,
    TokenTiming,
    compare_subjects,
    layer_subjects,
    preset_reducers,
    reducer_subject,
    synthetic_video,
)
from spatiotoken.tower_benchmark import TOWERS, compare_towers, tower_table


def main() -> None:
    which = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    which.add_argument("--suite")
    chosen, rest = which.parse_known_args()
    if chosen.suite in SUITES:
        run_suite(chosen.suite, rest)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = ("overhead", "reduction", "tokens", "frames", "attention", "layers", "tower", *SUITES)
    parser.add_argument("--suite", choices=suites, required=True)
    parser.add_argument(
        "--configs", nargs="+", help="presets or .yaml files of the reduction and frames suites, instead of their own"
    )
    parser.add_argument("--repeats", type=int, help="rounds; by default 21, frames 3, attention 9, layers and tower 5")
    parser.add_argument("--warmup", type=int, help="rounds before those; by default 3, attention 1, layers and tower 0")
    parser.add_argument("--visual-tokens", type=int, help="by default 2000, layers 4000")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--num-layers", type=int, help="by default 4, layers 12, tower its own")
    parser.add_argument(
        "--dtype",
        help="float32, bfloat16 or float16; by default float32, in the attention suite on a GPU and "
        "in the tower suite at size 7b bfloat16",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        help="torch's CPU threads; 1 is steady on a machine that others use too. The attention suite takes several",
    )
    parser.add_argument("--methods", nargs="+", help="methods instead of all (tokens, attention and layers suites)")
    parser.add_argument(
        "--seconds",
        type=float,
        help="after which no further round of a method (or of a table's length) begins; by default 20, attention 30",
    )
    tokens = parser.add_argument_group("tokens suite (of the others only repeats, warmup, dtype, device and threads)")
    tokens.add_argument("--grid", nargs=3, type=int, default=(32, 14, 14), metavar=("T", "H", "W"))
    tokens.add_argument("--channels", type=int, default=896)
    tokens.add_argument("--authors", type=Path, metavar="DIR", help="checkouts of the authors' repositories")
    frames = parser.add_argument_group("frames suite (of the others only configs, repeats and threads)")
    frames.add_argument(
        "--video", type=Path, help="file to load; made if it is not there, and for the while if not given"
    )
    frames.add_argument("--minutes", type=float, default=30.0, help="length of a file that is made")
    attention = parser.add_argument_group(
        "attention suite (of the others repeats, warmup, dtype, device, threads, methods and seconds)"
    )
    attention.add_argument(
        "--tables",
        nargs="+",
        choices=("engine", "estimates", "recall"),
        help="by default all, on a GPU the first two: recall does not depend on the device",
    )
    attention.add_argument("--lengths", nargs="+", type=int, help="tokens; by default 4096 8192, on a GPU 16k to 64k")
    attention.add_argument("--densities", nargs="+", type=float, default=(0.1, 0.25, 0.5))
    attention.add_argument(
        "--layout", nargs=3, type=int, default=Layout(), metavar=("HEADS", "KV", "DIM"), help="of the kernels' table"
    )
    attention.add_argument("--block", nargs=2, type=int, default=(128, 64), metavar=("Q", "K"), help="of the patterns")
    attention.add_argument("--estimate-length", type=int, help="by default 8192, on a GPU 32768")
    attention.add_argument(
        "--estimate-layout",
        nargs=3,
        type=int,
        metavar=("HEADS", "KV", "DIM"),
        help="by default 7 1 128, on a GPU 28 4 128",
    )
    attention.add_argument("--probe", action="store_true", help="recall on the probe models too")
    layers = parser.add_argument_group("layers suite (of the others those down to threads, and methods)")
    layers.add_argument(
        "--memory", action="store_true", help="measure peak memory, in a process for each config (tower suite too)"
    )
    tower = parser.add_argument_group(
        "tower suite (of the others memory, repeats, warmup, num-layers, dtype, device and threads)"
    )
    tower.add_argument("--size", choices=("cpu", "7b"), default="cpu", help="cpu: few layers; 7b: all, for a GPU")
    tower.add_argument("--models", nargs="+", default=tuple(TOWERS), help="model types instead of all")
    tower.add_argument("--frames", type=int, help="by default 8, at size 7b 32")
    tower.add_argument("--side", type=int, default=20, help="rows and columns of a frame's tokens (Qwen-VL)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument(
        "--markdown",
        action="store_true",
        help="print a table in Markdown (tokens suite; the attention, layers and tower suites always do)",
    )
    args = parser.parse_args()
    logging.disable_progress_bar()
    if args.threads is None and args.suite in ("tokens", "attention", "layers", "tower"):
        args.threads = [1, 2] if args.suite == "attention" else [1]
    if args.threads is not None:
        if min(args.threads) < 1:
            parser.error(f"--threads must be at least 1, not {min(args.threads)}")
        if len(args.threads) > 1 and args.suite != "attention":
            parser.error("--threads takes several numbers in the attention suite only")
        torch.set_num_threads(args.threads[0])
    if args.suite == "attention":
        time_attention(parser, args)
        return
    if args.suite == "tower":
        time_towers(parser, args)
        return
    args.dtype = args.dtype or "float32"
    if args.suite == "layers":
        time_layers(parser, args)
        return
    args.warmup = 3 if args.warmup is None else args.warmup
    args.seconds = 20.0 if args.seconds is None else args.seconds
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
            visual_tokens=2000 if args.visual_tokens is None else args.visual_tokens,
            hidden_size=args.hidden_size,
            num_layers=4 if args.num_layers is None else args.num_layers,
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
                threads=torch.get_num_threads(),
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


def time_attention(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Prints each table as soon as it is there."""
    try:
        device = resolve_device(args.device)
        gpu = device.type == "cuda"
        dtype = resolve_dtype(args.dtype or ("bfloat16" if gpu else "float32"))
        if not isinstance(dtype, torch.dtype):
            raise ValueError("made-up inputs have no dtype of their own: --dtype auto is for checkpoints")
        rounds = Rounds(
            9 if args.repeats is None else args.repeats,
            1 if args.warmup is None else args.warmup,
            30.0 if args.seconds is None else args.seconds,
        )
        methods = preset_methods()
        if unknown := set(args.methods or ()) - set(methods):
            raise ValueError(f"unknown methods {', '.join(sorted(unknown))}; there are {', '.join(methods)}")
        methods = {name: method for name, method in methods.items() if name in (args.methods or methods)}
        data: dict[str, Any] = {"suite": "attention", "machine": machine(device, dtype)}

        def show(text: str) -> None:
            if not args.json:
                print(text, end="\n\n", flush=True)

        show(", ".join(f"{key}: {value}" for key, value in data["machine"].items()))
        tables = args.tables or (("engine", "estimates") if gpu else ("engine", "estimates", "recall"))
        if "engine" in tables:
            layout, blocks = Layout(*args.layout), (args.block[0], args.block[1])
            timings = time_engine(
                args.threads[:1] if gpu else args.threads,
                args.lengths or ((16384, 32768, 65536) if gpu else (4096, 8192)),
                args.densities,
                layout=layout,
                blocks=blocks,
                dtype=dtype,
                device=device,
                rounds=rounds,
            )
            data["engine"] = list(timings)
            show(engine_tables(data["engine"], layout, blocks))
        if "estimates" in tables:
            layout = Layout(*(args.estimate_layout or ((28, 4, 128) if gpu else (7, 1, 128))))
            inputs = video_prompt(args.estimate_length or (32768 if gpu else 8192), layout, dtype=dtype, device=device)
            data["estimates"] = time_estimates(methods, inputs, threads=args.threads[0], rounds=rounds)
            show(estimate_table(data["estimates"], layout, inputs.length))
        if "recall" in tables:
            data["recall"] = {}
            for source, rows in recall_tables(methods, probe=args.probe):
                data["recall"][source] = rows
                show(recall_table(rows, source))
    except ValueError as error:
        parser.error(str(error))
    if args.json:
        print(json.dumps(data, indent=2, default=asdict))


def time_layers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    configs = layer_configs()
    if unknown := set(args.methods or ()) - set(configs):
        parser.error(f"unknown methods {', '.join(sorted(unknown))}; there are {', '.join(map(repr, configs))}")
    try:
        comparison = compare_layers(
            {name: config for name, config in configs.items() if name in (args.methods or configs)},
            repeats=5 if args.repeats is None else args.repeats,
            warmup=args.warmup or 0,
            visual_tokens=4000 if args.visual_tokens is None else args.visual_tokens,
            hidden_size=args.hidden_size,
            num_layers=12 if args.num_layers is None else args.num_layers,
            dtype=resolve_dtype(args.dtype),
            device=resolve_device(args.device),
            memory=args.memory,
        )
    except ValueError as error:
        parser.error(str(error))
    if args.json:
        print(json.dumps({"suite": "layers"} | comparison.to_dict(), indent=2))
        return
    print(", ".join(f"{key}: {value}" for key, value in comparison.machine.items()), end="\n\n")
    print(layer_table(comparison))


def time_towers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Prints each tower's table as soon as it is there."""
    try:
        device = resolve_device(args.device)
        dtype = resolve_dtype(args.dtype or ("bfloat16" if args.size == "7b" else "float32"))
        if not isinstance(dtype, torch.dtype):
            raise ValueError("random models have no dtype of their own: --dtype auto is for checkpoints")
        data: dict[str, Any] = {"suite": "tower", "size": args.size, "machine": machine(device, dtype), "towers": []}
        if not args.json:
            print(", ".join(f"{key}: {value}" for key, value in data["machine"].items()))
        for comparison in compare_towers(
            args.models,
            size=args.size,
            frames=args.frames,
            side=args.side,
            num_layers=args.num_layers,
            repeats=5 if args.repeats is None else args.repeats,
            warmup=args.warmup or 0,
            dtype=dtype,
            device=device,
            memory=args.memory,
        ):
            data["towers"].append(comparison.to_dict())
            if not args.json:
                print(f"\n{tower_table([comparison])}", flush=True)
    except ValueError as error:
        parser.error(str(error))
    if args.json:
        print(json.dumps(data, indent=2))


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
