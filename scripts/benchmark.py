#!/usr/bin/env python3
"""Time the prefill with and without patches, side by side.

overhead:  what being patched costs when nothing is reduced.
reduction: time to first token of presets, what they compute themselves included.
"""

from __future__ import annotations

import argparse
import json

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from spatiotoken.answer import resolve_device, resolve_dtype
from spatiotoken.benchmark import PRESETS, Comparison, compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("overhead", "reduction"), required=True)
    parser.add_argument("--configs", nargs="+", default=PRESETS, help="presets or .yaml files of the reduction suite")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--visual-tokens", type=int, default=2000)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="torch's CPU threads; 1 is steady on a machine that others use too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    logging.disable_progress_bar()
    if args.threads is not None:
        if args.threads < 1:
            parser.error(f"--threads must be at least 1, not {args.threads}")
        torch.set_num_threads(args.threads)
    try:
        comparison = compare(
            ["dense"] if args.suite == "overhead" else args.configs,
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


if __name__ == "__main__":
    main()
