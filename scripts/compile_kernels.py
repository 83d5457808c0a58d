#!/usr/bin/env python3
"""Compile the Triton kernels of block-sparse attention without a GPU, and show what each takes.

Registers and spilled bytes are per thread, as ptxas says; shared memory is per program. Exits with 1 where a kernel
does not compile, spills more than --max-spill, or takes more shared memory than the architecture has. With --time the
kernels are timed instead, on the GPU of this machine and beside torch's dense attention.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spatiotoken.attention.kernels.pattern import SparsePattern, density
from spatiotoken.attention.kernels.triton import (
    INTERPRETED,
    attend,
    attend_constants,
    list_constants,
    list_keys,
    tiling,
    triton_attention,
)

DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory that one program can have."""
SPARSITIES = ((1.0, 0), (0.1, 0), (0.1, 1024), (0.02, 1024))
"""Shares of the blocks that are chosen at random, and numbers of columns, that are timed."""
PRODUCTS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


@dataclass(frozen=True)
class Variant:
    """One kernel, ready to be compiled."""

    kernel: Any
    name: str
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes."""

    registers: int
    spilled: int
    shared: int
    products: str


def variants(dtypes: list[str], head_dims: list[int], blocks: list[tuple[int, int]]) -> Iterator[Variant]:
    """All with stripes, since those take the most."""
    lists = dict.fromkeys(("block_list", "block_counts", "column_list", "column_counts"), "*i32")
    bounds = {"start": "*i64", "stop": "*i64"}
    for block_q, block_k in blocks:
        types = {"blocks": "*u8", "columns": "*i64"} | bounds | lists
        yield Variant(list_keys, f"list_keys {block_q}/{block_k}", types, list_constants(block_q, block_k, True), {})
    for dtype in dtypes:
        for head_dim in head_dims:
            for block_q, block_k in blocks:
                tiles = tiling(getattr(torch, dtype), block_q, block_k)
                yield Variant(
                    attend,
                    f"attend {dtype} d={head_dim} {block_q}/{block_k}",
                    dict.fromkeys(("query", "key", "value", "output"), f"*{DTYPES[dtype]}")
                    | {"scale": "fp32"}
                    | bounds
                    | lists,
                    attend_constants(tiles, head_dim, block_q, block_k, True),
                    {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages},
                )


def compile_variant(variant: Variant, arch: int) -> Usage:
    """Compile for ``sm_{arch}``, as a launch on ordinary contiguous tensors would."""
    signature: dict[str, str] = {}
    attributes = {}
    for index, name in enumerate(variant.kernel.arg_names):
        if name in variant.constants:
            signature[name] = "constexpr"
            continue
        signature[name] = variant.types.get(name, "i32")
        if signature[name].startswith("*") or name.endswith(("_row", "_head", "_token")):
            attributes[(index,)] = [["tt.divisibility", 16]]
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            ASTSource(variant.kernel, signature, variant.constants, attributes),
            target=GPUTarget("cuda", arch, 32),
            options=variant.options,
        )
    return Usage(
        registers=_number(r"Used (\d+) registers", log.getvalue()),
        spilled=_number(r"(\d+) bytes spill stores", log.getvalue()),
        shared=compiled.metadata.shared,
        products=next((name for name in PRODUCTS if name in compiled.asm["ptx"]), "-"),
    )


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    if found is None:
        raise SystemExit(f"ptxas did not say {pattern!r}:\n{log}")
    return int(found[1])


def objection(usage: Usage, arch: int, max_spill: int) -> str | None:
    """Why a kernel that compiled will not do."""
    if usage.spilled > max_spill:
        return f"spills {usage.spilled} bytes, more than {max_spill}"
    if usage.shared > SHARED[arch]:
        return f"takes {usage.shared} bytes of shared memory, sm_{arch} has {SHARED[arch]}"
    return None


def compile_all(args: argparse.Namespace, console: Console) -> int:
    table = Table("kernel", "arch", "registers", "spilled", "shared", "products", "")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        # From a cache there would be no word of ptxas.
        triton.knobs.cache.dir = folder
        triton.knobs.nvidia.dump_ptxas_log = True
        for variant in variants(args.dtype, args.head_dim, args.blocks):
            for arch in args.arch:
                try:
                    usage = compile_variant(variant, arch)
                except (triton.CompilationError, triton.runtime.errors.PTXASError, RuntimeError) as error:
                    table.add_row(variant.name, f"sm_{arch}", "", "", "", "", f"does not compile: {error}")
                    failed += 1
                    continue
                wrong = objection(usage, arch, args.max_spill)
                failed += wrong is not None
                numbers = map(str, (usage.registers, usage.spilled, usage.shared, usage.products))
                table.add_row(variant.name, f"sm_{arch}", *numbers, wrong or "")
    console.print(table)
    return 1 if failed else 0


def striped_pattern(keys: int, heads: int, share: float, columns: int, block_q: int, block_k: int) -> SparsePattern:
    """Random blocks, the first ones and the diagonal, and random columns, for each head; on the GPU."""
    rows, cols = -(-keys // block_q), -(-keys // block_k)
    blocks = torch.rand(1, heads, rows, cols, device="cuda") < share
    first = torch.arange(rows, device="cuda")[:, None] * block_q
    number = torch.arange(cols, device="cuda") * block_k
    blocks |= (number < first + block_q) & (number + block_k > first)
    blocks[..., 0] = True
    chosen = torch.rand(1, heads, keys, device="cuda").argsort(dim=-1)[..., :columns].sort(dim=-1).values
    return SparsePattern(blocks, chosen if columns else None, block_q, block_k)


def time_all(args: argparse.Namespace, console: Console) -> int:
    """One row each: dense attention, the kernels (lists included), and what the density would allow."""
    table = Table("input", "keys", "blocks", "columns", "density", "dense ms", "sparse ms", "faster", "at best")
    heads, kv_heads = 28, 4
    for dtype, head_dim, keys in itertools.product(args.dtype, args.head_dim, args.keys):
        query, key, value = (
            torch.randn(1, count, keys, head_dim, device="cuda", dtype=getattr(torch, dtype))
            for count in (heads, kv_heads, kv_heads)
        )
        # Repeated beforehand: where torch has no grouped heads in a fast kernel it makes a matrix of keys x keys.
        wide = [x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value)]
        dense = _milliseconds(scaled_dot_product_attention, query, *wide, is_causal=True)
        for (block_q, block_k), (share, columns) in itertools.product(args.blocks, SPARSITIES):
            pattern = striped_pattern(keys, heads, share, columns, block_q, block_k)
            part = density(pattern, keys, keys)
            sparse = _milliseconds(triton_attention, query, key, value, pattern, scale=head_dim**-0.5)
            table.add_row(
                f"{dtype} d={head_dim}",
                str(keys),
                f"{block_q}/{block_k}",
                str(columns),
                f"{part:.3f}",
                f"{dense:.2f}",
                f"{sparse:.2f}",
                f"{dense / sparse:.2f}",
                f"{1 / part:.2f}",
            )
    console.print(torch.cuda.get_device_name())
    console.print(table)
    return 0


def _milliseconds(function: Callable[..., Tensor], *tensors: Any, **options: Any) -> float:
    return float(triton.testing.do_bench(lambda: function(*tensors, **options), return_mode="median"))


def _blocks(text: str) -> tuple[int, int]:
    query, _, key = text.partition("/")
    return int(query), int(key)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED), default=[80, 90, 100])
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=sorted(DTYPES))
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 96, 128])
    parser.add_argument(
        "--blocks", type=_blocks, nargs="+", default=[(128, 64), (128, 128), (64, 64), (64, 128)], metavar="Q/K"
    )
    parser.add_argument("--max-spill", type=int, default=64, metavar="BYTES", help="per thread")
    parser.add_argument("--time", action="store_true", help="time on this machine's GPU instead")
    parser.add_argument("--keys", type=int, nargs="+", default=[32768, 131072], help="sequence lengths to time")
    args = parser.parse_args()
    if INTERPRETED:
        parser.error("under TRITON_INTERPRET=1 nothing is compiled")
    if args.time and not torch.cuda.is_available():
        parser.error("--time needs a GPU")
    console = Console(width=140)
    return time_all(args, console) if args.time else compile_all(args, console)


if __name__ == "__main__":
    raise SystemExit(main())
