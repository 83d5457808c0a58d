"""How much of the true attention mass a method sees, and prompts and yardsticks to measure it with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spatiotoken.attention.base import Part, PrefillInputs, SparsePrefill
from spatiotoken.attention.blocks import num_blocks
from spatiotoken.attention.kernels.engine import best_backend
from spatiotoken.attention.kernels.pattern import visible_pairs
from spatiotoken.attention.weights import row_weights

MAX_LENGTH = 4096
"""Longest prompt that is measured: what a query sees is written out, key by key."""
_SIDE = 64  # blocks along a side of a map
_ROWS = 128  # query rows whose weights are held at once


class PromptTooLongError(ValueError):
    """A prompt of which not every pair can be written out."""


@dataclass(frozen=True, eq=False)
class HeadRecall:
    """What a method sees of one layer of one prompt; on the CPU.

    Attributes:
        layer: index of the decoder layer.
        length: tokens of the prompt in this layer.
        recall: ``[heads]`` share of the causal attention mass that is on seen pairs, mean over queries.
        density: ``[heads]`` computed pairs by causal ones.
        shares: ``[heads, n, n]`` seen pairs by causal ones, in at most 64 by 64 blocks; 0 above the diagonal.
    """

    layer: int
    length: int
    recall: Tensor
    density: Tensor
    shares: Tensor


def measure(method: SparsePrefill, inputs: PrefillInputs) -> HeadRecall:
    """How much of one layer's attention a method sees and computes, by head.

    Raises:
        PromptTooLongError: the prompt is longer than ``MAX_LENGTH``.
    """
    length = inputs.length
    if length > MAX_LENGTH:
        raise PromptTooLongError(
            f"the prompt has {length} tokens, and at most {MAX_LENGTH} can be measured: use fewer frames"
        )
    seen, computed = _read(method, inputs)
    density = computed / (length * (length + 1) // 2)
    shares = block_shares(seen, num_blocks(length, _SIDE))
    return HeadRecall(inputs.layer, length, mass_recall(inputs, seen).cpu(), density.cpu(), shares.cpu())


def seen_pairs(method: SparsePrefill, inputs: PrefillInputs) -> Tensor:
    """``[heads, L, L]`` bool: the pairs of query and key that a method really uses, whatever its ``backend``.

    A key that was pooled with others is seen where their pool is. The auto rule's detour to dense attention for speed
    does not count. Where keys are moved or pooled, which tokens are in them is read off unit vectors for values; so
    no method may choose by the values.
    """
    return _read(method, inputs)[0]


def mass_recall(inputs: PrefillInputs, seen: Tensor) -> Tensor:
    """``[heads]`` float32: share of the causal attention mass on ``seen [heads, L, L]``, mean over queries."""
    total = torch.zeros(inputs.query.shape[0], device=inputs.query.device)
    for rows, weights in _weights(inputs):
        total += weights.masked_fill_(~seen[:, rows, : rows.stop], 0.0).sum(dim=(1, 2))
    return total / inputs.length


def oracle_pairs(inputs: PrefillInputs, density: float) -> Tensor:
    """``[heads, L, L]`` bool: for each query the keys of most weight, which no method can better at that density.

    Each query gets the share ``density`` of its causal keys, at least one; fractions carry over to the next query, so
    that ``density`` is met in all. Ties go to the first.
    """
    heads, length = inputs.query.shape[:2]
    device = inputs.query.device
    causal = torch.arange(length + 1, dtype=torch.float64, device=device)
    counts = (causal * (causal + 1) / 2 * density).round().diff().clamp(min=1)
    pairs = torch.zeros(heads, length, length, dtype=torch.bool, device=device)
    for rows, weights in _weights(inputs):
        order = weights.argsort(dim=-1, descending=True, stable=True)
        # Keys after the query have no weight, but so may others, by underflow.
        picked = torch.arange(rows.stop, device=device) < counts[rows].minimum(causal[1:][rows])[:, None]
        pairs[:, rows, : rows.stop] = torch.zeros_like(order, dtype=torch.bool).scatter_(
            -1, order, picked.expand(heads, -1, -1)
        )
    return pairs.tril_()


def block_shares(seen: Tensor, block: int) -> Tensor:
    """``[heads, n, n]`` float32: share of the causal pairs of each pair of blocks that is ``seen [heads, L, L]``."""
    return torch.stack([_block_sums(own, block) for own in seen]) / _block_sums(
        torch.ones_like(seen[0]).tril_(), block
    ).clamp(min=1)


def structured_inputs(
    grid: tuple[int, int, int], text: int, *, heads: int, kv_heads: int, dim: int, seed: int = 0
) -> PrefillInputs:
    """Random attention with the structure of real heads, without a model: a video between two halves of the text.

    Logits are a sum, and each has channels of its own behind a random rotation:
        sink: the first token, for all queries.
        local: falls off with the distance in the prompt, as rotary embeddings let it.
        column: one visual token in 50, for all queries.
        place: tokens at the same row and column of other frames (diagonals ``H * W`` apart), among visual tokens.
        noise: standard normal.
    Head ``h`` is ruled by kind ``h % 4`` of the first four; how much of the others it has is random.

    Args:
        grid: ``(T, H, W)`` of the video.
        text: tokens of text, at least 2.
        dim: head size, at least 16.
    """
    if text < 2 or dim < 16 or heads % kv_heads:
        raise ValueError(
            f"needs text >= 2, dim >= 16 and heads a multiple of kv_heads: {text}, {dim}, {heads}/{kv_heads}"
        )
    random = torch.Generator().manual_seed(seed)
    frames, height, width = grid
    size, before = frames * height * width, text // 2
    length = text + size
    coordinates = torch.full((length, 4), -1)
    axes = torch.cartesian_prod(*(torch.arange(side) for side in grid))
    coordinates[before : before + size] = torch.nn.functional.pad(axes, (1, 0))
    visual = coordinates[:, :1] >= 0
    index = torch.arange(length)

    waves = dim // 16
    near = _waves(index, length ** -torch.linspace(0, 1, 2 * waves))
    sides = [_waves(coordinates[:, axis], _harmonics(grid[axis - 1], waves)) for axis in (2, 3)]
    place = torch.cat(sides, dim=1) * visual * 0.5**0.5
    heavy = ((torch.rand(length, generator=random) < 0.02) & visual[:, 0]).float()
    heavy[before + int(torch.randint(size, (1,), generator=random))] = 1.0  # at least one
    ones = torch.ones(length, 1)
    features = [  # of the query, of the key
        (ones, (index == 0).float()[:, None]),
        (near, near),
        (ones, heavy[:, None]),
        (place, place),
    ]
    noise = dim - sum(key.shape[1] for _, key in features)
    ruled = torch.arange(heads)[:, None] % len(features) == torch.arange(len(features))
    most = torch.tensor([8.0, 12.0, 10.0, 12.0])  # so that each takes most of the mass of a prompt of some hundred
    strength = torch.where(ruled, most, 3.0 * torch.rand(heads, len(features), generator=random))
    query = torch.cat(
        [
            *(strength[:, kind, None, None] * own for kind, (own, _) in enumerate(features)),
            torch.randn(heads, length, noise, generator=random) * noise**-0.5,
        ],
        dim=-1,
    )
    key = torch.cat(
        [
            torch.cat([of_key for _, of_key in features], dim=1).expand(kv_heads, -1, -1),
            torch.randn(kv_heads, length, noise, generator=random),
        ],
        dim=-1,
    )
    turn = torch.linalg.qr(torch.randn(kv_heads, dim, dim, generator=random)).Q
    query = query @ turn.repeat_interleave(heads // kv_heads, dim=0)
    value = torch.randn(kv_heads, length, dim, generator=random)
    return PrefillInputs(query * dim**0.5, key @ turn, value, dim**-0.5, coordinates=coordinates)


def _read(method: SparsePrefill, inputs: PrefillInputs) -> tuple[Tensor, Tensor]:
    """What ``seen_pairs`` gives, and ``[heads]`` how many pairs were computed (a pool is one)."""
    heads, length = inputs.query.shape[:2]
    device = inputs.query.device
    by_force = method.model_copy(update={"backend": best_backend(inputs.query)})
    if by_force.attend(inputs).output is None:
        seen = torch.ones(length, length, dtype=torch.bool, device=device).tril_().expand(heads, -1, -1)
        return seen, torch.full((heads,), length * (length + 1) // 2, device=device)
    seen = torch.zeros(heads, length, length, dtype=torch.bool, device=device)
    parts = method.parts(inputs)
    visible = [_visible(part) for part in parts]
    computed = torch.stack([pairs.sum(dim=(1, 2)).repeat_interleave(heads // len(pairs)) for pairs in visible]).sum(0)
    in_place = all(_keeps_keys(part, inputs) for part in parts)
    members = [None] * len(parts) if in_place else _members(method, inputs)
    for part, pairs, tokens in zip(parts, visible, members, strict=True):
        for head in range(heads):
            own = pairs[head * len(pairs) // heads]
            if tokens is not None:
                own = own.float() @ tokens[head * len(tokens) // heads].float() > 0
            seen[head, _rows(part, head), : own.shape[1]] |= own
    return seen, computed


def _members(method: SparsePrefill, inputs: PrefillInputs) -> list[Tensor]:
    """``[kv_heads, k, L]`` bool for each part: the tokens whose values are in each of its keys' values."""
    length, dim = inputs.value.shape[1:]
    found: list[list[Tensor]] = []
    for first in range(0, length, dim):
        units = torch.eye(length, dtype=inputs.value.dtype, device=inputs.value.device)[:, first : first + dim]
        width = units.shape[1]
        units = torch.nn.functional.pad(units, (0, dim - width)).expand_as(inputs.value)
        found.append([part.value[..., :width] != 0 for part in method.parts(replace(inputs, value=units))])
    return [torch.cat(chunks, dim=-1) for chunks in zip(*found, strict=True)]


def _visible(part: Part) -> Tensor:
    return visible_pairs(part.pattern, part.query.shape[1], part.key.shape[1])[0]


def _rows(part: Part, head: int) -> Tensor | slice:
    if part.rows is None:
        return slice(None)
    return part.rows if part.rows.ndim == 1 else part.rows[head]


def _keeps_keys(part: Part, inputs: PrefillInputs) -> bool:
    """Whether a part's keys are the prompt's first ones, in their places."""
    value = inputs.value
    return part.value.data_ptr() == value.data_ptr() and part.value.stride() == value.stride()


def _weights(inputs: PrefillInputs) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, and their true weights ``[heads, rows, stop]`` float32 over the keys before ``stop``."""
    position = torch.arange(inputs.length, device=inputs.query.device)
    for first in range(0, inputs.length, _ROWS):
        rows = slice(first, min(first + _ROWS, inputs.length))
        key, causal = inputs.key[None, :, : rows.stop], position[: rows.stop] <= position[rows, None]
        yield rows, row_weights(inputs.query[None, :, rows], key, causal[None], inputs.scale)[0]


def _block_sums(pairs: Tensor, block: int) -> Tensor:
    """``[n, n]`` float32: how many of ``pairs [L, L]`` each pair of blocks holds."""
    count = num_blocks(len(pairs), block)
    missing = count * block - len(pairs)
    padded = torch.nn.functional.pad(pairs, (0, missing, 0, missing)).float()
    return padded.unflatten(0, (count, block)).unflatten(2, (count, block)).sum(dim=(1, 3))


def _harmonics(side: int, count: int) -> Tensor:
    return torch.arange(1, count + 1) * torch.pi / max(2, side)


def _waves(position: Tensor, frequencies: Tensor) -> Tensor:
    """``[n, 2 * frequencies]`` of unit length, whose products depend on the distance alone."""
    angle = position[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=1) * len(frequencies) ** -0.5


__all__ = [
    "MAX_LENGTH",
    "HeadRecall",
    "PromptTooLongError",
    "block_shares",
    "mass_recall",
    "measure",
    "oracle_pairs",
    "seen_pairs",
    "structured_inputs",
]
