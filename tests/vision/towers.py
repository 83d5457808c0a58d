"""Tokens of a tower, made up."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from spatiotoken.tokens.merging import mean_by_assignment
from spatiotoken.vision.base import TowerAttention, TowerMerge, TowerReducer, TowerShape, TowerTokens


def shape(depth: int) -> TowerShape:
    return TowerShape(depth, tuple(range(depth)), has_cls=False)


def tokens_of(values: Tensor, grid: tuple[int, int, int], depth: int = 4, layer: int = 0) -> TowerTokens:
    """All patches, of which ``values [T * H * W, heads, d]`` are hidden states (flattened) and attention's states."""
    rows = values.shape[0]
    time, height, width = grid
    return TowerTokens(
        hidden=values.flatten(1),
        sizes=torch.ones(rows),
        places=torch.arange(rows),
        counts=(height * width,) * time,
        grid=grid,
        layer=layer,
        tower=shape(depth),
        attention=TowerAttention(values, values, values, None, values.shape[2] ** -0.5),
    )


def drawn(grid: tuple[int, int, int], seed: int, dtype: torch.dtype = torch.float32, depth: int = 4) -> TowerTokens:
    """Random tokens of two heads."""
    generator = torch.Generator().manual_seed(seed)
    return tokens_of(torch.randn(grid[0] * grid[1] * grid[2], 2, 6, generator=generator).to(dtype), grid, depth)


def applied(tokens: TowerTokens, merge: TowerMerge) -> TowerTokens:
    """What is left after a merge, whose form is checked."""
    count = merge.survivors.shape[0]
    assert merge.survivors.dtype == merge.assignment.dtype == torch.int64
    assert (merge.survivors.diff() > 0).all() and merge.assignment.shape == tokens.sizes.shape
    assert merge.assignment.min() >= 0 and merge.assignment.max() < count
    assert torch.equal(merge.assignment[merge.survivors], torch.arange(count))
    assert merge.weights is not None and merge.weights.dtype == torch.float32
    weights = merge.weights[:, None]
    total = torch.zeros(count, 1).index_add_(0, merge.assignment, weights)
    hidden = torch.zeros(count, tokens.hidden.shape[1]).index_add_(0, merge.assignment, weights * tokens.hidden.float())
    places = tokens.places[merge.survivors]
    frames = places // (tokens.grid[1] * tokens.grid[2])
    assert merge.counts == tuple(frames.unique(return_counts=True)[1].tolist())
    attention = tokens.attention
    assert attention is not None
    states = mean_by_assignment(attention.key.flatten(1), merge.assignment, count).unflatten(1, (2, -1))
    return replace(
        tokens,
        hidden=(hidden / total).to(tokens.hidden.dtype),
        sizes=torch.zeros(count).index_add_(0, merge.assignment, tokens.sizes),
        places=places,
        counts=merge.counts,
        attention=TowerAttention(states, states, states, None, attention.scale),
    )


def through(method: TowerReducer, tokens: TowerTokens) -> tuple[TowerTokens, Tensor]:
    """What is left behind the last layer, and ``[patches]`` which of these stands for each patch."""
    owner = torch.arange(tokens.num_tokens)
    for layer in method.layers(tokens.tower):
        tokens = replace(tokens, layer=layer)
        merge = method.reduce(tokens)
        if merge is not None:
            assert merge.survivors.shape[0] < tokens.num_tokens
            tokens, owner = applied(tokens, merge), merge.assignment[owner]
    assert torch.equal(tokens.sizes, torch.bincount(owner, minlength=tokens.num_tokens).float())
    return tokens, owner
