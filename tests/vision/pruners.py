"""What is left of a tower's tokens where nothing is merged, and the rule of stand-ins, one patch at a time."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from spatiotoken.vision.base import TowerAttention, TowerMerge, TowerReducer, TowerShape, TowerTokens


def attended(tokens: TowerTokens) -> TowerAttention:
    assert tokens.attention is not None
    return tokens.attention


def frames_of(tokens: TowerTokens) -> list[list[int]]:
    """Rows of each frame."""
    ends = torch.tensor(tokens.counts).cumsum(0).tolist()
    return [list(range(end - count, end)) for end, count in zip(ends, tokens.counts, strict=True)]


def plain_owners(tokens: TowerTokens, survivors: list[int]) -> list[int]:
    """For each row the survivor of its frame with the most similar mean key, in double precision."""
    keys = attended(tokens).key.double().mean(dim=1)
    unit = keys / keys.norm(dim=1, keepdim=True)
    owners = []
    for rows in frames_of(tokens):
        stay = [row for row in rows if row in survivors]
        for row in rows:
            best = max(stay, key=lambda other: (float(unit[row] @ unit[other]), -other))
            owners.append(row if row in stay else best)
    return owners


def left(tokens: TowerTokens, merge: TowerMerge) -> TowerTokens:
    """What is left, as it was. The form of the merge is checked, and that frames keep to themselves."""
    count = len(merge.survivors)
    assert merge.survivors.dtype == merge.assignment.dtype == torch.int64
    assert (merge.survivors.diff() > 0).all() and merge.assignment.shape == tokens.sizes.shape
    assert torch.equal(merge.assignment[merge.survivors], torch.arange(count))
    assert merge.weights is None and merge.counts is not None and min(merge.counts) > 0
    frame = torch.arange(len(tokens.counts)).repeat_interleave(torch.tensor(tokens.counts))
    assert torch.equal(frame[merge.survivors].bincount(), torch.tensor(merge.counts))
    assert torch.equal(frame[merge.survivors][merge.assignment], frame)
    states = attended(tokens)
    return replace(
        tokens,
        hidden=tokens.hidden[merge.survivors],
        sizes=torch.zeros(count).index_add_(0, merge.assignment, tokens.sizes),
        places=tokens.places[merge.survivors],
        counts=merge.counts,
        attention=replace(
            states,
            query=states.query[merge.survivors],
            key=states.key[merge.survivors],
            value=states.value[merge.survivors],
        ),
    )


def through(method: TowerReducer, tokens: TowerTokens) -> tuple[list[tuple[int, ...]], TowerTokens, Tensor]:
    """Counts behind each of the method's layers, what is left in the end, and what stands for each patch."""
    owner, counts = torch.arange(tokens.num_tokens), []
    for layer in method.layers(tokens.tower):
        tokens = replace(tokens, layer=layer)
        merge = method.reduce(tokens)
        if merge is not None:
            assert len(merge.survivors) < tokens.num_tokens
            tokens, owner = left(tokens, merge), merge.assignment[owner]
        counts.append(tokens.counts)
    assert torch.equal(tokens.sizes, torch.bincount(owner, minlength=tokens.num_tokens).float())
    return counts, tokens, owner


def patches(
    grid: tuple[int, int, int],
    seed: int,
    *,
    tower: TowerShape | None = None,
    heads: int = 2,
    cls: bool = False,
    sharp: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> TowerTokens:
    """All patches, with random hidden states, queries, keys and values.

    Args:
        cls: with queries of CLS tokens.
        sharp: scale of the queries.
    """
    generator = torch.Generator().manual_seed(seed)
    time, height, width = grid
    count = time * height * width

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    query, key, value = (drawn(count, heads, 6) for _ in range(3))
    cls_query = drawn(time, heads, 6) * sharp if cls else None
    return TowerTokens(
        hidden=drawn(count, 12),
        sizes=torch.ones(count),
        places=torch.arange(count),
        counts=(height * width,) * time,
        grid=grid,
        layer=0,
        tower=tower or TowerShape(6, tuple(range(6)), has_cls=cls),
        attention=TowerAttention(query * sharp, key, value, cls_query, 6**-0.5),
    )


def without_values(tokens: TowerTokens) -> TowerTokens:
    """The same shapes with nothing in them: whatever looks at a value fails."""
    states = attended(tokens)
    cls = None if states.cls_query is None else states.cls_query.to("meta")
    query, key, value = (values.to("meta") for values in (states.query, states.key, states.value))
    return replace(
        tokens,
        hidden=tokens.hidden.to("meta"),
        sizes=tokens.sizes.to("meta"),
        places=tokens.places.to("meta"),
        attention=TowerAttention(query, key, value, cls, states.scale),
    )
