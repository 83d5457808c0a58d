"""Bipartite soft matching of ToMe (arXiv 2210.09461), by which tokens of a frame merge in pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def bipartite_matching(metric: Tensor, reduction: int, *, class_token: bool = False) -> tuple[Tensor, Tensor]:
    """Match even tokens with their most similar odd ones, by cosine, and merge the best matched.

    Of equal similarities the lowest index goes first. Zero vectors are similar to nothing.

    Args:
        metric: ``[B, n, D]`` what similarity is taken from.
        reduction: how many tokens to merge away; never more than half of them.
        class_token: the first token never merges.

    Returns:
        ``[B, m]`` the tokens that are left, and ``[B, n]`` the place in these of the one that each token goes to. They
        are in ToMe's order, which decides what is even and odd if matching goes on: unmerged even tokens by falling
        similarity (with a class token: in place), then the odd ones.
    """
    batch, count, _ = metric.shape
    reduction = min(reduction, (count - class_token) // 2)
    index = torch.arange(count, device=metric.device).expand(batch, -1)
    if reduction <= 0:
        return index, index
    values = metric.float()
    length = torch.linalg.vector_norm(values, dim=-1).clamp(min=1e-12)
    cosines = values[:, ::2] @ values[:, 1::2].mT
    best, partner = cosines.div_(length[:, None, 1::2]).max(dim=-1)
    best = best / length[:, ::2]
    if class_token:
        best[:, 0] = -torch.inf
    ranked = best.argsort(dim=-1, descending=True, stable=True)
    merged, unmerged = ranked[:, :reduction], ranked[:, reduction:]
    if class_token:
        unmerged = unmerged.sort(dim=-1).values
    left = torch.cat([2 * unmerged, index[:, 1::2]], dim=1)
    places = torch.zeros_like(index).scatter_(1, left, index[:, : left.shape[1]])
    return left, places.scatter_(1, 2 * merged, unmerged.shape[1] + partner.gather(1, merged))


def merge_matched(values: Tensor, sizes: Tensor | None, places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean of the tokens that go to the same place, weighted by size.

    Args:
        values: ``[B, n, D]`` float32.
        sizes: ``[B, n]`` float32, how many tokens each is made of already; None for a plain mean.
        places: ``[B, n]`` as ``bipartite_matching`` returns them.
        count: ``m``, how many places there are.

    Returns:
        ``[B, m, D]`` means and ``[B, m]`` summed sizes. What is alone in its place and of size 1 stays as it is.
    """
    batch = values.shape[0]
    rows = (places + count * torch.arange(batch, device=places.device)[:, None]).flatten()
    weight = torch.ones_like(values[..., 0]) if sizes is None else sizes
    total = values.new_zeros(batch * count).index_add_(0, rows, weight.flatten())
    # Each place's tokens one after the other: several times faster than adding them up in the order of tokens.
    order = rows.argsort(stable=True)
    first = torch.searchsorted(rows[order], torch.arange(batch * count, device=rows.device))
    weights = None if sizes is None else sizes.flatten()[order]
    sums = torch.nn.functional.embedding_bag(order, values.flatten(0, 1), first, mode="sum", per_sample_weights=weights)
    return sums.div_(total[:, None]).unflatten(0, (batch, count)), total.view(batch, count)
