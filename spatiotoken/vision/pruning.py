"""What methods share that leave out patches: where they act, votes in the graph of attention, and who stands in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.tokens.merging import true_indices
from spatiotoken.vision.base import TowerMerge, TowerTokens

PAIRS = 1 << 25
"""Pairs of patches of which a weight or cosine is held at a time."""

DepthShare = Annotated[float, Field(ge=0, lt=1)]
"""A layer of the tower: the share of the layers that come before it."""


def nearest_layers(shares: Sequence[float], layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Of ``layers``, those nearest to these shares of the depth, each once, rising. The earlier of two as near.

    Raises:
        ValueError: there are no such layers.
    """
    if not layers:
        raise ValueError("no layer of this vision tower attends to whole frames; supported are towers that have some")
    return tuple(sorted({min(layers, key=lambda layer: (abs(layer - share * depth), layer)) for share in shares}))


def graphs(states: Tensor) -> Tensor:
    """``[frames * heads, n, d]`` of ``[frames, n, heads, d]``: the patches of a frame as one head sees them."""
    return states.transpose(1, 2).flatten(0, 1)


def vote(
    query: Tensor,
    key: Tensor,
    scale: float,
    signal: Tensor,
    rounds: int = 1,
    *,
    first: Tensor | None = None,
    real: Tensor | None = None,
) -> Tensor:
    """``[G, n]`` float32 votes that patches have after ``rounds`` in which each gives away all that it has.

    It gives them to the patches that it attends to, in proportion to the softmax weights: ``A^T s`` again and again.
    Weights of some graphs are held at a time, or of some rows of one graph, which then are computed in every round.

    Args:
        query: ``[G, m, d]`` of the voters, the patches themselves if there is more than one round.
        key: ``[G, n, d]`` of the patches.
        signal: ``[G, m]`` float32 votes at the start.
        first: ``[G, n]`` votes that come on top in the first round.
        real: ``[G, n]`` False at patches that nobody attends to.
    """
    (count, voters, _), places, found = query.shape, key.shape[1], []
    rows, step = max(1, PAIRS // places), max(1, PAIRS // (voters * places))
    for start in range(0, count, step):
        some = slice(start, start + step)
        keys, votes = key[some].float().mT, signal[some]
        hidden = None if real is None else ~real[some, None]
        queries = (query[some].float() * scale).split(rows, dim=1)
        held = [_weights(queries[0], keys, hidden)] if len(queries) == 1 else None
        for number in range(rounds):
            given, votes = votes.split(rows, dim=1), keys.new_zeros(len(votes), places)
            for index, part in enumerate(given):
                weights = _weights(queries[index], keys, hidden) if held is None else held[index]
                votes += (part[:, None] @ weights)[:, 0]
            if number == 0 and first is not None:
                votes += first[some]
        found.append(votes)
    return torch.cat(found)


def _weights(query: Tensor, key: Tensor, hidden: Tensor | None) -> Tensor:
    logits = query @ key
    return (logits if hidden is None else logits.masked_fill_(hidden, -torch.inf)).softmax(dim=-1)


def stand_ins(features: Tensor, kept: Tensor) -> Tensor:
    """``[frames, n]`` for each patch the one of its frame, of those that are ``kept``, that is most similar by cosine.

    Those that are kept stand for themselves. Ties go to the lowest index.

    Args:
        features: ``[frames, n, d]``.
        kept: ``[frames, n]`` bool, True somewhere in each frame.
    """
    unit, places = torch.nn.functional.normalize(features.float(), dim=-1), kept.shape[1]
    rows, best = max(1, PAIRS // places), []
    step = max(1, PAIRS // places**2)
    for some, stays in zip(unit.split(step), kept.split(step), strict=True):
        # Masked behind the product, so that what is not a number cannot stand in unless it is kept.
        parts = [(part @ some.mT).masked_fill_(~stays[:, None], -torch.inf) for part in some.split(rows, dim=1)]
        best.append(torch.cat([part.argmax(dim=-1) for part in parts], dim=1))
    return torch.where(kept, torch.arange(places, device=kept.device), torch.cat(best))


def pruned(
    tokens: TowerTokens, features: Tensor, kept: Tensor, counts: tuple[int, ...], real: Tensor | None = None
) -> TowerMerge:
    """Only what is ``kept`` stays, as it is; its most similar patch of the frame stands for whatever goes.

    Args:
        features: ``[frames, n, d]`` that similarity is taken from.
        kept: ``[frames, n]`` bool, True somewhere in each frame.
        counts: how many are kept of each frame.
        real: ``[frames, n]`` as ``TowerTokens.rows_by_frame`` gives it; None where all frames have ``n`` rows.
    """
    frames, places = kept.shape
    owner = stand_ins(features, kept) + places * torch.arange(frames, device=kept.device)[:, None]
    owner, mask = owner.flatten(), kept.flatten()
    if real is not None:
        row = real.flatten().cumsum(0) - 1
        cells = true_indices(real.flatten(), tokens.num_tokens)
        owner, mask = row[owner[cells]], mask[cells]
    return TowerMerge(true_indices(mask, sum(counts)), (mask.cumsum(0) - 1)[owner], counts=counts)
