"""The Triton kernels: in triton's interpreter (a process of its own), compiled for GPUs that are not here, and on one.

Run as a module (`TRITON_INTERPRET=1 python -m tests.attention.test_triton FILE`), it writes what the cases come to.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spatiotoken.attention.kernels.pattern import SparsePattern, Valid, row_bounds, valid_queries, visible_pairs
from spatiotoken.attention.kernels.reference import reference_attention

pytest.importorskip("triton", reason="torch brings triton along on Linux only")
from spatiotoken.attention.kernels.triton import INTERPRETED, tiling, triton_attention  # noqa: E402

ROOT = Path(__file__).parents[2]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """Sizes of random inputs and of a random pattern.

    Args:
        share: part of the blocks that are chosen beside the diagonal ones.
        diagonal: whether these are; if not, every query sees the first key, as a column.
        columns: stripes of each row and group; every second row has some fewer.
        bounds: ``(start, stop)`` of each row; empty for no padding.
        sharpness: factor of the queries; large for weights that lie on few keys.
    """

    queries: int
    keys: int
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    groups: int = 1
    head_dim: int = 64
    block_q: int = 32
    block_k: int = 32
    share: float = 0.3
    diagonal: bool = True
    columns: int = 0
    bounds: tuple[tuple[int, int], ...] = ()
    dtype: torch.dtype = torch.float32
    sharpness: float = 1.0
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def valid(self) -> Valid | None:
        if not self.bounds:
            return None
        start, stop = torch.tensor(self.bounds).unbind(dim=1)
        return start, stop

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, laid out as a model's projections leave them, with padding that is not a number."""
        random = torch.Generator().manual_seed(self.seed)
        shapes = ((self.heads, self.queries), (self.kv_heads, self.keys), (self.kv_heads, self.keys))
        query, key, value = (
            torch.randn(self.batch, length, heads, self.head_dim, generator=random).transpose(1, 2)
            for heads, length in shapes
        )
        bounds = row_bounds(self.valid(), self.batch, self.keys, query.device)
        query = (query * self.sharpness).masked_fill(self.padding(self.queries, bounds), torch.nan)
        key, value = (x.masked_fill(self.padding(self.keys, bounds), torch.nan) for x in (key, value / 2))
        return query.to(self.dtype), key.to(self.dtype), value.to(self.dtype)

    def padding(self, length: int, bounds: Valid) -> Tensor:
        """``[B, 1, length, 1]``: which of the last ``length`` positions are padding."""
        return ~valid_queries(length, self.keys, bounds)[:, None, :, None]

    def pattern(self) -> SparsePattern:
        random = torch.Generator().manual_seed(self.seed + 1)
        shape = (self.batch, self.groups)
        rows, cols = -(-self.keys // self.block_q), -(-self.keys // self.block_k)
        blocks = torch.rand(*shape, rows, cols, generator=random) < self.share
        first_query = torch.arange(rows)[:, None] * self.block_q
        first_key = torch.arange(cols) * self.block_k
        if self.diagonal:
            blocks |= (first_key < first_query + self.block_q) & (first_key + self.block_k > first_query)
        if not self.columns:
            return SparsePattern(blocks, None, self.block_q, self.block_k)
        rank = torch.rand(*shape, self.keys, generator=random)
        if not self.diagonal:
            rank[..., 0] = -1.0
        columns = rank.argsort(dim=-1)[..., : self.columns].sort(dim=-1).values
        columns[::2, :, self.columns // 2 :] = -1
        return SparsePattern(blocks, columns, self.block_q, self.block_k)

    def expected(self) -> Tensor:
        # The reference multiplies what is masked by zero, so its padding has to be finite.
        query, key, value = (x.nan_to_num(0.0) for x in self.tensors())
        return reference_attention(query, key, value, self.pattern(), scale=self.scale, valid=self.valid(), check=True)

    def computed(self, device: str = "cpu") -> Tensor:
        pattern, valid = self.pattern(), self.valid()
        columns = None if pattern.columns is None else pattern.columns.to(device)
        pattern = replace(pattern, blocks=pattern.blocks.to(device), columns=columns)
        query, key, value = (x.to(device) for x in self.tensors())
        if valid is not None:
            valid = (valid[0].to(device), valid[1].to(device))
        return triton_attention(query, key, value, pattern, scale=self.scale, valid=valid).cpu()


PADDED = ((0, 150), (37, 150), (0, 88), (120, 140))
CASES = {
    "as models have it": Case(300, 300, heads=2, groups=2, block_q=128, block_k=64, columns=70),
    "wide key blocks": Case(290, 290, groups=2, block_q=64, block_k=128, columns=20, dtype=torch.float16),
    "no columns": Case(100, 100, kv_heads=2, groups=2),
    "no blocks but the diagonal": Case(200, 200, share=0.0, columns=90),
    "hardly a diagonal": Case(130, 130, batch=2, groups=2, diagonal=False, columns=50, block_k=16),
    "all blocks": Case(130, 130, share=1.0, columns=40, block_k=16),
    "one query": Case(1, 97, share=0.5, columns=9),
    "queries amid a block": Case(75, 201, batch=2, groups=2, columns=30),
    "padding": Case(150, 150, batch=4, heads=4, kv_heads=2, groups=2, columns=24, bounds=PADDED),
    "padding, one group": Case(150, 150, batch=4, block_k=64, columns=24, bounds=PADDED),
    "padding, late queries": Case(90, 150, batch=4, groups=2, columns=24, bounds=PADDED),
    "float16": Case(140, 140, heads=4, kv_heads=2, groups=4, head_dim=128, columns=70, dtype=torch.float16),
    "bfloat16": Case(140, 140, head_dim=96, block_q=64, columns=30, dtype=torch.bfloat16),
    "head size 128": Case(140, 140, head_dim=128, block_q=16, block_k=64, columns=30),
    "head size 96": Case(140, 140, head_dim=96, columns=30),
    "head size 32": Case(140, 140, head_dim=32, columns=30),
    "sharp": Case(140, 140, sharpness=10.0, columns=30),
    "sharp float16": Case(140, 140, sharpness=10.0, columns=30, dtype=torch.float16),
}
LARGE = {
    f"{dtype}, head size {head_dim}, {block_q}/{block_k}, {groups} groups": Case(
        1111,
        1500,
        batch=3,
        heads=4,
        kv_heads=2,
        groups=groups,
        head_dim=head_dim,
        block_q=block_q,
        block_k=block_k,
        columns=150,
        bounds=((0, 1500), (700, 1500), (0, 1203)),
        dtype=dtype,
    )
    for dtype in TOLERANCE
    for head_dim in (64, 96, 128)
    for block_q, block_k, groups in ((128, 64, 4), (64, 64, 2), (128, 128, 1), (64, 128, 4))
}


def unvisited_values() -> tuple[Case, SparsePattern, Tensor, Tensor, Tensor]:
    """Inputs whose values are not numbers in every key block that no query block in use has chosen, but for columns."""
    case = Case(64, 256, heads=2, groups=2, kv_heads=2, share=0.25, columns=12, seed=3)
    query, key, value = case.tensors()
    pattern = case.pattern()
    visited = pattern.blocks[:, :, -2:].any(dim=2).repeat_interleave(case.block_k, dim=-1)
    assert pattern.columns is not None
    for group, columns in enumerate(pattern.columns[0]):
        visited[0, group, columns[columns >= 0]] = True
    assert 0 < visited.sum() < visited.numel()
    return case, pattern, query, key, value.masked_fill(~visited[..., None], torch.nan)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What this file writes when run under triton's interpreter, which has to be on before triton is imported."""
    path = tmp_path_factory.mktemp("triton") / "outputs.pt"
    run_here("-m", "tests.attention.test_triton", str(path), TRITON_INTERPRET="1")
    outputs: dict[str, Tensor] = torch.load(path)
    return outputs


def run_here(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_as_expected(case: Case, output: Tensor) -> None:
    assert output.dtype == case.dtype
    expected = case.expected()
    torch.testing.assert_close(output.double(), expected, atol=TOLERANCE[case.dtype], rtol=0)
    bounds = row_bounds(case.valid(), case.batch, case.keys, output.device)
    padding = case.padding(case.queries, bounds).expand_as(output)
    assert (output[padding] == 0).all()


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, interpreted: dict[str, Tensor]) -> None:
    assert_as_expected(CASES[name], interpreted[name])


def test_cases_leave_something_out() -> None:
    for name, case in CASES.items():
        seen = visible_pairs(case.pattern(), case.queries, case.keys, case.valid())
        dense = visible_pairs(replace(case, share=1.0, columns=0).pattern(), case.queries, case.keys, case.valid())
        assert name == "all blocks" or seen.sum() < dense.sum(), name


def test_visits_only_what_is_chosen(interpreted: dict[str, Tensor]) -> None:
    case, pattern, query, key, value = unvisited_values()
    expected = reference_attention(query, key, value.nan_to_num(0.0), pattern, scale=case.scale)
    torch.testing.assert_close(interpreted["unvisited"].double(), expected, atol=1e-5, rtol=0)


def test_has_no_gradients(interpreted: dict[str, Tensor]) -> None:
    assert interpreted["backward refused"]


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="the kernels run here")
def test_needs_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="needs CUDA tensors, got cpu"):
        CASES["no columns"].computed()


@pytest.mark.parametrize(
    ("case", "scale", "message"),
    [
        (Case(40, 40, dtype=torch.float64), 1.0, "float32, float16 or bfloat16, got torch.float64"),
        (Case(40, 40, head_dim=160), 1.0, "up to 128, got 160"),
        (Case(40, 40, block_q=48), 1.0, "as block_q, got 48"),
        (Case(40, 40, block_k=8), 1.0, "as block_k, got 8"),
        (Case(40, 40), 0.0, "positive scales, got 0.0"),
        (Case(40, 40), float("nan"), "positive scales, got nan"),
    ],
)
def test_says_what_it_does_not_do(case: Case, scale: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        triton_attention(*case.tensors(), case.pattern(), scale=scale)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
def test_tiles_divide_blocks(dtype: torch.dtype, block: int) -> None:
    tiles = tiling(dtype, block, block)
    assert block % tiles.queries == 0 and block % tiles.keys == 0


def test_compiles_without_a_gpu() -> None:
    shown = run_here(
        "scripts/compile_kernels.py",
        *("--arch", "90", "--dtype", "bfloat16", "--head-dim", "128", "--blocks", "128/64"),
    )
    assert "list_keys 128/64" in shown and "attend bfloat16 d=128 128/64" in shown
    assert "wgmma" in shown  # the tensor cores are used


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_compiles_for_every_architecture(arch: str) -> None:
    run_here("scripts/compile_kernels.py", "--arch", arch, "--blocks", "128/64", "64/128")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_equals_the_reference_on_a_gpu(name: str) -> None:
    case = (CASES | LARGE)[name]
    assert_as_expected(case, case.computed("cuda"))


def backward_refused() -> bool:
    case = CASES["no columns"]
    query, key, value = (x.requires_grad_() for x in case.tensors())
    output = triton_attention(query, key, value, case.pattern(), scale=case.scale)
    try:
        output.sum().backward()
    except RuntimeError as error:
        return "no backward pass" in str(error)
    return False


def write_outputs(path: Path) -> None:
    outputs = {name: case.computed() for name, case in CASES.items()}
    case, pattern, query, key, value = unvisited_values()
    outputs["unvisited"] = triton_attention(query, key, value, pattern, scale=case.scale)
    outputs["backward refused"] = torch.tensor(backward_refused())
    torch.save(outputs, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_outputs(Path(sys.argv[1]))
