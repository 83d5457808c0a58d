"""Patterns that one head of attention may have, named by short strings, and the lines that they are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from spatiotoken.attention.base import PrefillInputs
from spatiotoken.attention.blocks import as_columns, causal_blocks, largest, num_blocks, per_head, pooled, window_blocks
from spatiotoken.attention.kernels import SparsePattern
from spatiotoken.attention.kernels.pattern import seen_keys
from spatiotoken.attention.weights import last_rows_weights

Head = tuple[str, tuple[int, ...]]
"""Kind of a head's pattern and its sizes."""
KINDS: dict[str, tuple[str, ...]] = {
    "vertical_slash": ("columns", "diagonals"),
    "a_shape": ("sink", "window"),
    "block_sparse": ("blocks",),
}


def parse_head(text: str, kinds: Mapping[str, tuple[str, ...]] = KINDS) -> Head:
    """``"a_shape:128:1024"`` as ``("a_shape", (128, 1024))``; raises ``ValueError`` naming what is supported."""
    kind, *sizes = text.split(":")
    whole = all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes)
    if kind not in kinds or len(sizes) != len(kinds[kind]) or not whole:
        known = ", ".join(":".join((name, *(f"<{size}>" for size in sizes))) for name, sizes in kinds.items())
        raise ValueError(f"head pattern {text!r} is not supported; supported, with sizes of at least 1: {known}")
    return kind, tuple(int(size) for size in sizes)


def head_weights(inputs: PrefillInputs, last_queries: int, head: int) -> Tensor:
    """``[min(last_queries, L), L]`` of one head, see `last_rows_weights`; of all at once they would be large."""
    kv = slice(head // inputs.groups, head // inputs.groups + 1)
    one = replace(inputs, query=inputs.query[head : head + 1], key=inputs.key[kv], value=inputs.value[kv])
    return last_rows_weights(one, last_queries)[0]


def line_masses(inputs: PrefillInputs, last_queries: int, heads: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Softmax mass of the last queries, ``[len(heads), L]`` float32 each: by key, and by distance of query and key."""
    vertical, slash = [], []
    for head in heads:
        weights = head_weights(inputs, last_queries, head)
        rows, length = weights.shape
        # With the keys turned round, row i has distance o at o + rows - 1 - i; rows one shorter bring these in line.
        sheared = torch.nn.functional.pad(weights.flip(1), (0, rows)).flatten()[: rows * (length + rows - 1)]
        vertical.append(weights.sum(dim=0))
        slash.append(sheared.view(rows, -1).sum(dim=0)[rows - 1 :])
    return torch.stack(vertical), torch.stack(slash)


def line_ranks(mass: Tensor, forced: int) -> Tensor:
    """Rank of each of ``mass [..., L]``, the ``forced`` first before all others; ties to the first."""
    score = mass.clone()
    score[..., :forced] = torch.inf
    return score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def crossing_ranks(ranks: Tensor, block: int) -> Tensor:
    """``[heads, n]`` lowest rank of the slashes that cross the blocks at each distance, of ``ranks [heads, L]``."""
    length, count = ranks.shape[-1], num_blocks(ranks.shape[-1], block)
    cut = torch.nn.functional.pad(ranks, (0, count * block - length), value=length).view(-1, count, block)
    # A slash at no multiple of the block also crosses the next earlier one.
    beside = cut.clone()
    beside[..., 0] = length
    crossed = cut.amin(dim=-1)
    crossed[:, 1:] = crossed[:, 1:].minimum(beside.amin(dim=-1)[:, :-1])
    return crossed


def along_diagonals(crossed: Tensor) -> Tensor:
    """``[heads, n, n]`` blocks of the distances ``crossed [heads, n]``."""
    number = torch.arange(crossed.shape[-1], device=crossed.device)
    distance = number[:, None] - number
    return crossed[:, distance.clamp(min=0)] & (distance >= 0)


def a_shape_blocks(count: int, sink: int, window: int, block: int, device: torch.device) -> Tensor:
    """``[count, count]`` blocks of the first ``sink`` keys and each query's ``window`` latest."""
    blocks = window_blocks(count, window, block, device)
    blocks[:, : num_blocks(sink, block)] = True
    return blocks


def head_pattern(
    inputs: PrefillInputs, heads: Sequence[Head], *, sink: int, local: int, last_queries: int, block: int
) -> SparsePattern:
    """Each query head's own pattern, in ``heads`` groups; the arguments are the fields of ``MInference``."""
    device, count = inputs.query.device, num_blocks(inputs.length, block)
    blocks = torch.zeros(len(heads), count, count, dtype=torch.bool, device=device)
    columns = None
    if lines := [number for number, (kind, _) in enumerate(heads) if kind == "vertical_slash"]:
        vertical, slash = line_masses(inputs, last_queries, lines)
        sizes = torch.tensor([heads[number][1] for number in lines], device=device)
        # All that is forced is taken, whatever the sizes.
        ranked, far = line_ranks(vertical, sink), line_ranks(slash, local)
        taken = ranked < sizes[:, :1].clamp(min=sink)
        stripes = as_columns(taken, max(sink, *(heads[number][1][0] for number in lines)))
        columns = stripes.new_full((len(heads), stripes.shape[1]), -1)
        columns[lines] = stripes
        blocks[lines] = along_diagonals(crossing_ranks(far, block) < sizes[:, 1:].clamp(min=local))
    if any(kind == "block_sparse" for kind, _ in heads):
        score = pooled(inputs.query, block) @ per_head(pooled(inputs.key, block), inputs.groups).transpose(1, 2)
        score = score.masked_fill(~causal_blocks(inputs.length, block, block, device), -torch.inf)
        score.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    for number, (kind, size) in enumerate(heads):
        if kind == "a_shape":
            blocks[number] = a_shape_blocks(count, size[0], size[1], block, device)
        elif kind == "block_sparse":
            blocks[number] = largest(score[number], size[0])
    return SparsePattern(blocks[None], None if columns is None else columns[None], block, block)


def seen_by(pattern: SparsePattern, rows: Tensor, length: int) -> Tensor:
    """``[G, R, L]`` bool: the keys that queries at ``rows [R]`` see."""
    columns = None if pattern.columns is None else pattern.columns[0]
    seen = seen_keys(pattern.blocks[0][:, rows // pattern.block_q], columns, pattern.block_k, length)
    return seen & (torch.arange(length, device=rows.device) <= rows[:, None])
