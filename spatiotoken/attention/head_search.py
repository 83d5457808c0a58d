"""The offline search of ``minference``: which pattern suits each head, at equal arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spatiotoken.attention.base import PrefillInputs
from spatiotoken.attention.blocks import num_blocks
from spatiotoken.attention.head_patterns import Head, parse_head, seen_by
from spatiotoken.attention.minference import MInference
from spatiotoken.attention.weights import row_weights, spread_rows

ROWS = 128
"""Query rows that stand for all of them."""
COLUMN_SHARES = (0.125, 0.5, 0.875)
"""Parts of a vertical-slash head's arithmetic that go into columns."""
SINK = 128
"""Most keys of the sink of an A-shape head."""
AUTHORS = MInference.model_validate({})
"""Their block, rows and forced lines."""


def output_error(inputs: PrefillInputs, seen: Tensor, rows: Tensor) -> Tensor:
    """``[heads]`` float32 squared error of the output at ``rows [R]`` if only ``seen [heads, R, L]`` is computed."""
    causal = torch.arange(inputs.length, device=rows.device) <= rows[:, None]
    errors = []
    for kv in range(inputs.key.shape[0]):
        heads = slice(kv * inputs.groups, (kv + 1) * inputs.groups)
        query, key = inputs.query[heads, None, rows], inputs.key[kv].expand(inputs.groups, 1, -1, -1)
        sparse, dense = (
            row_weights(query, key, visible, inputs.scale)[:, 0] @ inputs.value[kv].float()
            for visible in (seen[heads], causal.expand(inputs.groups, -1, -1))
        )
        errors.append((sparse - dense).square().sum(dim=(1, 2)))
    return torch.cat(errors)


def computed_share(seen: Tensor, rows: Tensor) -> Tensor:
    """``[heads]`` computed pairs by causal ones over ``rows``."""
    return seen.sum(dim=(1, 2)) / (rows + 1).sum()


def best_heads(
    inputs: PrefillInputs, candidates: Sequence[Sequence[str]], *, method: MInference = AUTHORS, rows: int = ROWS
) -> tuple[str, ...]:
    """For each query head the candidate whose output is nearest to dense attention's; ties to the first.

    Args:
        candidates: each one pattern per query head.
        method: with the sizes that are the same for all heads, such as the block.
        rows: evenly spread queries that are compared.
    """
    places = spread_rows(min(rows, inputs.length), inputs.length, inputs.query.device)
    errors = []
    for one in candidates:
        pattern = method.pattern_of(inputs, [parse_head(text) for text in one])
        errors.append(output_error(inputs, seen_by(pattern, places, inputs.length), places))
    best = torch.stack(errors).argsort(dim=0, stable=True)[0].tolist()
    return tuple(candidates[number][head] for head, number in enumerate(best))


def rounded(text: str) -> str:
    """A pattern's sizes at the nearest of 1, 1.5, 2, 3, 4, 6, 8, 12 ..., so that prompts can agree on them."""
    kind, sizes = parse_head(text)
    steps = [max(1, 2 ** (size.bit_length() - 2)) if size > 1 else 1 for size in sizes]
    near = (round(size / step) * step for size, step in zip(sizes, steps, strict=True))
    return ":".join((kind, *map(str, near)))


def equal_cost(
    inputs: PrefillInputs, density: float, *, method: MInference = AUTHORS, rows: int = ROWS
) -> list[tuple[str, ...]]:
    """Candidates for `best_heads`, each of which computes about ``density`` of the causal pairs in every head.

    Counted is what the kernel really computes, whole blocks and all (at ``rows`` queries); sizes are the largest within
    the density, or 1 if none is.
    """
    length, heads = inputs.length, inputs.query.shape[0]
    places = spread_rows(min(rows, length), length, inputs.query.device)

    def fitted(most: int, head: Callable[[int], Head]) -> tuple[str, ...]:
        low, high = [1] * heads, [most] * heads
        for _ in range(most.bit_length()):
            middle = [(a + b + 1) // 2 for a, b in zip(low, high, strict=True)]
            pattern = method.pattern_of(inputs, [head(size) for size in middle])
            fits = (computed_share(seen_by(pattern, places, length), places) <= density).tolist()
            low = [m if fit else a for a, m, fit in zip(low, middle, fits, strict=True)]
            high = [b if fit else max(a, m - 1) for a, b, m, fit in zip(low, high, middle, fits, strict=True)]
        return tuple(":".join(map(str, (kind, *sizes))) for kind, sizes in map(head, low))

    sink = max(1, min(SINK, int(density * length / 4)))
    return [
        *(
            fitted(length, lambda size, columns=columns: ("vertical_slash", (columns, size)))  # type: ignore[misc]
            for columns in (max(1, int(share * density * length / 2)) for share in COLUMN_SHARES)
        ),
        fitted(length, lambda size: ("a_shape", (sink, size))),
        fitted(num_blocks(length, method.block), lambda size: ("block_sparse", (size,))),
    ]


def search_heads(
    inputs: PrefillInputs, density: float, *, method: MInference = AUTHORS, rows: int = ROWS
) -> tuple[str, ...]:
    """What ``MInference.heads`` takes for this layer: per query head the best pattern of about ``density``.

    Heads are compared at equal arithmetic (`equal_cost`); the sizes are then `rounded`. Waits for the device, and holds
    ``[heads, rows, L]`` at most.
    """
    candidates = equal_cost(inputs, density, method=method, rows=rows)
    return tuple(rounded(text) for text in best_heads(inputs, candidates, method=method, rows=rows))


def agreed(per_prompt: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Per head the pattern that most prompts chose; ties go to the one that came first.

    Raises:
        ValueError: no prompts, or of different numbers of heads.
    """
    if not per_prompt:
        raise ValueError("there must be at least one prompt")
    return tuple(Counter(choices).most_common(1)[0][0] for choices in zip(*per_prompt, strict=True))
