"""Packed rows of a vision tower: which patches are left, who stands for the others, and attention among them.

Rows of all frames lie one behind the other, with no padding between frames of different lengths. They are always in the
tower's own order, in which a frame, and a window within it, is a run of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_STEP = 16
"""Chunks are padded to multiples of this length, so that those of about a length attend in one call."""


@dataclass(frozen=True)
class Chunks:
    """Chunks of about one length that each attend to themselves alone.

    Attributes:
        queries: ``[chunks, n]`` rows; what is beyond a chunk's end is the number of all rows.
        keys: ``[chunks, m]`` rows of keys and values; any row beyond a chunk's end.
        hidden: ``[chunks, 1, 1, m]`` True beyond the end; None where all chunks are as long.
    """

    queries: Tensor
    keys: Tensor
    hidden: Tensor | None


def cut(
    queries: Sequence[int], keys: Sequence[int] | None, key_rows: Tensor | None, device: torch.device
) -> list[Chunks]:
    """Chunks of ``queries`` rows each, one behind the other, grouped by length.

    Args:
        keys: how many keys each chunk has, where these are not its queries.
        key_rows: ``[sum(keys)]`` rows of all keys.
    """
    total = sum(queries)
    lengths = list(zip(queries, queries if keys is None else keys, strict=True))
    starts = list(zip(accumulate([0, *queries]), accumulate([0, *(n for _, n in lengths)]), strict=True))
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, own in enumerate(lengths):
        if own[0]:
            groups.setdefault(tuple(-(-length // _STEP) for length in own), []).append(index)
    chunks = []
    for members in groups.values():
        first, count = (
            torch.tensor([pairs[index] for index in members], device=device).T[..., None] for pairs in (starts, lengths)
        )
        steps = [torch.arange(max(lengths[index][side] for index in members), device=device) for side in (0, 1)]
        query_rows = torch.where(steps[0] < count[0], first[0] + steps[0], total)
        own_keys = first[1] + torch.minimum(steps[1], count[1] - 1)
        beyond = None
        if len({lengths[index][1] for index in members}) > 1:
            beyond = (steps[1] >= count[1])[:, None, None]
        chunks.append(Chunks(query_rows, own_keys if key_rows is None else key_rows[own_keys], beyond))
    return chunks


def attend(
    query: Tensor, key: Tensor, value: Tensor, chunks: Sequence[Chunks], scale: float, bias: Tensor | None
) -> Tensor:
    """``[R, heads, d]`` attention of ``[R, heads, d]`` within chunks.

    Args:
        bias: ``[R]`` added to the logits of each key.
    """
    # One row more, for what lies beyond the ends of chunks.
    output = query.new_empty(query.shape[0] + 1, *query.shape[1:])
    for chunk in chunks:
        own = query[chunk.queries.clamp(max=query.shape[0] - 1)]
        keys, values = (states[chunk.keys].transpose(1, 2) for states in (key, value))
        mask = None if bias is None else bias[chunk.keys][:, None, None].to(query.dtype)
        if chunk.hidden is not None:
            mask = torch.zeros_like(chunk.hidden, dtype=query.dtype) if mask is None else mask
            mask = mask.masked_fill(chunk.hidden, -torch.inf)
        mixed = scaled_dot_product_attention(own.transpose(1, 2), keys, values, attn_mask=mask, scale=scale)
        output[chunk.queries] = mixed.transpose(1, 2)
    return output[:-1]


@dataclass(frozen=True)
class Packing:
    """Which rows of a tower are left.

    Attributes:
        origin: ``[R]`` rising: the tower's own row that each packed row was.
        owner: ``[N]`` the packed row that stands for each of the tower's own rows.
        sizes: ``[R]`` float32: how many of these each stands for.
        counts: packed rows of each frame that is left.
        frames: rows of each frame in the tower.
        windows: rows of each window in the tower, where it has windows.
    """

    origin: Tensor
    owner: Tensor
    sizes: Tensor
    counts: tuple[int, ...]
    frames: tuple[int, ...]
    windows: tuple[int, ...] | None = None

    @classmethod
    def everything(cls, frames: Sequence[int], windows: Sequence[int] | None, device: torch.device) -> Packing:
        """All rows of frames, and windows, of these lengths."""
        rows = torch.arange(sum(frames), device=device)
        sizes = torch.ones(len(rows), device=device)
        return cls(rows, rows, sizes, tuple(frames), tuple(frames), None if windows is None else tuple(windows))

    def narrowed(self, kept: Tensor, assignment: Tensor, counts: tuple[int, ...]) -> Packing:
        """With only the packed rows ``kept`` (rising) left.

        Args:
            assignment: ``[R]`` which of ``kept`` stands for each packed row.
            counts: of each frame.
        """
        sizes = torch.zeros(len(kept), device=kept.device).index_add_(0, assignment, self.sizes)
        return Packing(self.origin[kept], assignment[self.owner], sizes, counts, self.frames, self.windows)

    def restored(self, rows: Tensor) -> Tensor:
        """``[N, ...]`` of packed ``rows [R, ...]``: those of whatever stands for each of the tower's own rows."""
        return rows.index_select(0, self.owner)

    @cached_property
    def log_sizes(self) -> Tensor:
        return self.sizes.log()

    def chunks(self, *, windows: bool, whole_context: bool) -> list[Chunks]:
        """Frames, or their windows.

        Args:
            whole_context: the keys are those of all of the tower's rows.
        """
        known = self._chunks.get((windows, whole_context))
        if known is None:
            device, whole = self.origin.device, self.frames
            if windows and self.windows is not None:
                whole = self.windows
            if whole_context:
                known = cut(self._left_of(whole), whole, self.owner, device)
            else:
                known = cut(self.counts if whole is self.frames else self._left_of(whole), None, None, device)
            self._chunks[windows, whole_context] = known
        return known

    def _left_of(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """How many packed rows there are of each run of the tower's own rows."""
        bounds = torch.tensor([0, *accumulate(lengths)], device=self.origin.device)
        return tuple(torch.searchsorted(self.origin, bounds).diff().tolist())

    @cached_property
    def _chunks(self) -> dict[tuple[bool, bool], list[Chunks]]:
        return {}


def weighted_mean(values: Tensor, weights: Tensor, assignment: Tensor, count: int) -> Tensor:
    """``[count, D]`` means of the rows of ``values [R, D]`` that go to each of ``count`` survivors.

    Sums in float32. A survivor with a single member gets exactly that row.

    Args:
        weights: ``[R]`` float32, with a positive sum for each survivor.
    """
    total = torch.zeros(count, device=values.device).index_add_(0, assignment, weights)
    shares = weights / total[assignment]
    if values.is_cuda:
        mean = torch.zeros(count, values.shape[1], device=values.device)
        return mean.index_add_(0, assignment, values.float() * shares[:, None]).to(values.dtype)
    # Survivor by survivor: on a CPU several times as fast as adding row by row.
    grouped, order = assignment.sort(stable=True)
    first = torch.searchsorted(grouped, torch.arange(count, device=values.device))
    bag = torch.nn.functional.embedding_bag
    return bag(order, values.float(), first, mode="sum", per_sample_weights=shares[order]).to(values.dtype)
