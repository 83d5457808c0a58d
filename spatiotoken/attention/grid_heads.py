"""Where pictures and text are in a prompt, and the patterns of ``mminference`` over the tokens of one video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from spatiotoken.attention.base import PrefillInputs
from spatiotoken.attention.blocks import as_columns, largest, num_blocks
from spatiotoken.attention.head_patterns import (
    a_shape_blocks,
    along_diagonals,
    crossing_ranks,
    head_weights,
    line_masses,
    line_ranks,
)
from spatiotoken.attention.kernels import SparsePattern


class Span(NamedTuple):
    """Tokens ``start <= i < stop`` of one modality; ``frames`` of a video or 1 of a picture, 0 of text."""

    start: int
    stop: int
    frames: int


def modality_spans(places: Tensor) -> list[Span]:
    """The prompt cut at its modality borders; what stands between two tokens of one grid belongs to it.

    Args:
        places: ``coordinates [L, 4]``, on the host.
    """
    visual = (places[:, 0] >= 0).nonzero()[:, 0]
    cuts = (places[visual, 0].diff() != 0).nonzero()[:, 0] + 1
    found, done = [], 0
    for run in visual.tensor_split(cuts) if len(visual) else ():
        start, stop = int(run[0]), int(run[-1]) + 1
        frame = places[run, 1]
        if start > done:
            found.append(Span(done, start, 0))
        found.append(Span(start, stop, int(frame.max() - frame.min()) + 1))
        done = stop
    return found + [Span(done, len(places), 0)] if done < len(places) else found


def grid_segments(places: Tensor, offset: int, size: int) -> Tensor:
    """``[n]`` int64 the segment of each token of one grid, in their order, ``places [n, 4]``.

    The tokens are sorted by place, so that those of one place in all frames stand together, and cut into segments of
    ``size``, the first ``offset`` shorter. Text among them goes with the visual token before it.
    """
    number = torch.arange(len(places), device=places.device)
    own = places[number.where(places[:, 0] >= 0, 0).cummax(dim=0).values]
    place = own[:, 2] * (own[:, 3].max() + 1) + own[:, 3]
    return (offset + place.argsort(stable=True).argsort()) // size


def grid_pattern(span: Span, size: int, block: int, device: torch.device) -> SparsePattern:
    """Of one group, over all up to the end of a video whose tokens are in segments of ``size``, in multiples of blocks.

    The first segment begins at the block that holds the video's first token; what precedes the video is seen by all.
    """
    whole = span.start // block
    number = torch.arange(num_blocks(span.stop, block), device=device)
    segment = (number - whole).div(size // block, rounding_mode="floor")
    # Of the block that the video begins in, only what precedes the video is for all: columns.
    blocks = (segment[:, None] == segment) | (number < whole)
    columns = torch.arange(whole * block, span.start, device=device)
    return SparsePattern(blocks[None, None], columns[None, None], block, block)


def text_key_blocks(places: Tensor, length: int, block: int) -> Tensor:
    """``[ceil(length / block)]`` the blocks with any text among the first tokens, ``places [n, 4]``."""
    text = pad(places[:, 0] < 0, (0, num_blocks(length, block) * block - len(places)))
    return text.view(-1, block).any(dim=-1)


def either(first: Tensor, one: SparsePattern, other: SparsePattern) -> SparsePattern:
    """``one`` for the heads that are ``first [heads]``, ``other`` for the rest; of one group or one per head each."""
    striped = [x.blocks.new_zeros(1, 1, 0, dtype=torch.int64) if x.columns is None else x.columns for x in (one, other)]
    most = max(x.shape[-1] for x in striped)
    mine, theirs = (pad(x, (0, most - x.shape[-1]), value=-1) for x in striped)
    return SparsePattern(
        torch.where(first[:, None, None], one.blocks, other.blocks),
        torch.where(first[:, None], mine, theirs) if most else None,
        one.block_q,
        one.block_k,
    )


def equal_candidates(
    inputs: PrefillInputs, density: float, *, sink: int, local: int, last_queries: int, block: int
) -> tuple[SparsePattern, SparsePattern]:
    """A-shape and vertical-slash patterns that see about ``density`` of the keys of the last queries.

    Half of the lines are columns; of the slashes there are as many as cross the other half's blocks in each head.
    """
    device, length, heads = inputs.query.device, inputs.length, inputs.query.shape[0]
    count, budget = num_blocks(length, block), math.ceil(density * length)
    near = a_shape_blocks(count, sink, budget, block, device)
    vertical, slash = line_masses(inputs, last_queries, range(heads))
    most = max(sink, budget // 2)
    stripes = as_columns(line_ranks(vertical, sink) < most, most)
    crossing = crossing_ranks(line_ranks(slash, local), block).neg()
    # At least what the forced distances cross, which come first.
    diagonals = max(num_blocks(local - 1, block) + 1, num_blocks(budget // 2, block))
    far = along_diagonals(largest(crossing, diagonals))
    return (
        SparsePattern(near.expand(1, heads, -1, -1), None, block, block),
        SparsePattern(far[None], stripes[None], block, block),
    )


def recovered(inputs: PrefillInputs, rows: int, candidates: Sequence[Tensor]) -> Tensor:
    """``[len(candidates), heads]`` mass of the last ``rows`` queries on what each candidate ``[G, rows, L]`` sees."""
    heads = inputs.query.shape[0]
    found = []
    for head in range(heads):
        weights = head_weights(inputs, rows, head)
        found.append(torch.stack([(weights * seen[head * len(seen) // heads]).sum() for seen in candidates]))
    return torch.stack(found, dim=1)
