"""Random inputs and patterns for the kernels of block-sparse attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from spatiotoken.attention import PrefillInputs, SparsePrefill
from spatiotoken.attention.kernels import SparsePattern, Valid

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    pattern: SparsePattern
    valid: Valid | None
    scale: float

    def to(self, device: torch.device) -> Inputs:
        pattern, valid = self.pattern, self.valid
        columns = None if pattern.columns is None else pattern.columns.to(device)
        return Inputs(
            self.query.to(device),
            self.key.to(device),
            self.value.to(device),
            replace(pattern, blocks=pattern.blocks.to(device), columns=columns),
            None if valid is None else (valid[0].to(device), valid[1].to(device)),
            self.scale,
        )

    def row(self, row: int) -> Inputs:
        """One row by itself, without its padding."""
        assert self.valid is not None
        first, last = (int(bound[row]) for bound in self.valid)
        offset, length = self.key.shape[2] - self.query.shape[2], last - first
        pattern = self.pattern
        rows, cols = -(-length // pattern.block_q), -(-length // pattern.block_k)
        return Inputs(
            self.query[row : row + 1, :, max(0, first - offset) : max(0, last - offset)],
            self.key[row : row + 1, :, first:last],
            self.value[row : row + 1, :, first:last],
            SparsePattern(
                pattern.blocks[row : row + 1, :, :rows, :cols],
                None if pattern.columns is None else pattern.columns[row : row + 1],
                pattern.block_q,
                pattern.block_k,
            ),
            None,
            self.scale,
        )


def make_inputs(
    keys: int,
    queries: int | None = None,
    *,
    batch: int = 1,
    kv_heads: int = 2,
    sharing: int = 2,
    groups: str = "kv",
    dim: int = 32,
    block_q: int = 16,
    block_k: int = 16,
    share: float = 0.3,
    columns: int = 0,
    bounds: list[tuple[int, int]] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """Random tensors laid out as a model's projections leave them, with NaN at padding, and a random pattern.

    Args:
        sharing: heads per key head.
        groups: ``one``, ``kv`` or ``heads``.
        share: part of the blocks that are chosen beside the diagonal ones.
        columns: stripes of each row and group; the second half of every first group's are missing.
        bounds: start and stop of each row; None for no padding.
    """
    random = torch.Generator().manual_seed(seed)
    queries, heads = queries or keys, kv_heads * sharing
    count = {"one": 1, "kv": kv_heads, "heads": heads}[groups]
    query, key, value = (
        torch.randn(batch, length, num_heads, dim, generator=random).to(dtype).transpose(1, 2)
        for num_heads, length in ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    )
    rows, cols = -(-keys // block_q), -(-keys // block_k)
    low, begin = torch.arange(rows)[:, None] * block_q, torch.arange(cols) * block_k
    blocks = torch.rand(batch, count, rows, cols, generator=random) < share
    blocks |= (begin < low + block_q) & (begin + block_k > low)
    stripes = None
    if columns:
        stripes = torch.rand(batch, count, keys, generator=random).argsort(dim=-1)[..., :columns].sort(dim=-1).values
        stripes[:, 0, (columns + 1) // 2 :] = -1
    valid = None
    if bounds is not None:
        start, stop = torch.tensor(bounds).unbind(dim=1)
        valid = (start, stop)
        position = torch.arange(keys)
        padding = ~((position >= start[:, None]) & (position < stop[:, None]))[:, None, :, None]
        query = query.masked_fill(padding[:, :, keys - queries :], torch.nan)
        key, value = key.masked_fill(padding, torch.nan), value.masked_fill(padding, torch.nan)
    return Inputs(query, key, value, SparsePattern(blocks, stripes, block_q, block_k), valid, dim**-0.5)


@st.composite
def inputs(draw: st.DrawFn, dtype: torch.dtype = torch.float32, dim: int = 32) -> Inputs:
    """Small inputs of all kinds."""
    batch, keys = draw(st.integers(1, 3)), draw(st.integers(1, 70))
    bounds = None
    if draw(st.booleans()):
        starts = [draw(st.integers(0, keys - 1)) for _ in range(batch)]
        bounds = [(start, draw(st.integers(start + 1, keys))) for start in starts]
    return make_inputs(
        keys,
        draw(st.integers(1, keys)),
        batch=batch,
        kv_heads=draw(st.sampled_from([1, 2])),
        sharing=draw(st.sampled_from([1, 3])),
        groups=draw(st.sampled_from(["one", "kv", "heads"])),
        dim=dim,
        block_q=draw(st.integers(1, 20)),
        block_k=draw(st.integers(1, 20)),
        share=draw(st.sampled_from([0.0, 0.3, 1.0])),
        columns=draw(st.integers(0, min(keys, 6))),
        bounds=bounds,
        dtype=dtype,
        seed=draw(st.integers(0, 1000)),
    )


def prefill_inputs(
    length: int, *, heads: int = 4, kv_heads: int = 2, dim: int = 16, seed: int = 0, layer: int = 0, depth: int = 1
) -> PrefillInputs:
    """Random queries, keys and values of one prompt, without pictures."""
    random = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(count, length, dim, generator=random) for count in (heads, kv_heads, kv_heads))
    places = torch.full((length, 4), -1)
    return PrefillInputs(query, key, value, dim**-0.5, layer, depth, places)


def video_inputs(
    grid: tuple[int, int, int] = (6, 4, 4), *, before: int = 5, after: int = 7, heads: int = 4, dim: int = 16
) -> PrefillInputs:
    """As `prefill_inputs`, of a prompt with ``before`` tokens of text, a video and ``after`` tokens of text."""
    frames, height, width = grid
    size = frames * height * width
    inputs = prefill_inputs(before + size + after, heads=heads, kv_heads=heads // 2, dim=dim)
    axes = [torch.arange(side) for side in grid]
    places = torch.full((inputs.length, 4), -1)
    places[before : before + size] = torch.nn.functional.pad(torch.cartesian_prod(*axes), (1, 0), value=0)
    return replace(inputs, coordinates=places)


def attention_map(method: SparsePrefill, inputs: PrefillInputs) -> Tensor:
    """``[heads, L, L]`` the weights that a method really gives, read off by unit vectors for values.

    Raises:
        AssertionError: the method would leave it to dense attention.
    """
    heads, length, dim = inputs.query.shape
    count = -(-length // dim)
    unit = torch.eye(length, count * dim).split(dim, dim=1)
    found = []
    for values in unit:
        attended = method.attend(replace(inputs, value=values.expand(inputs.key.shape[0], -1, -1).to(inputs.key)))
        assert attended.output is not None
        found.append(attended.output)
    return torch.cat(found, dim=-1)[..., :length]
