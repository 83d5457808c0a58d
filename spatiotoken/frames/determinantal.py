"""Greedy choice by a determinantal point process (DPP): the set whose kernel has a large determinant."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FLOOR = 1e-10
"""What is left of a kernel's diagonal below this is rounding: all such items are as good as copies of chosen ones."""


def greedy_determinant(
    column: Callable[[Tensor], Tensor],
    diagonal: Tensor,
    count: int,
    quality: Tensor | None = None,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Of each of ``B`` kernels ``count`` items, one by one that which raises log det of the chosen part most.

    A Cholesky factor grows by a row with each item, so no determinant is computed and no more of a kernel than the
    columns of chosen items: ``O(n count^2)`` each, and the columns. Ties go to the first item.

    Args:
        column: makes the kernels' columns ``[B, n]`` at the indices ``[B]``.
        diagonal: ``[B, n]`` float64, of the kernels.
        count: at most ``n``.
        quality: ``[B, n]`` or ``[n]``, added to the gain of each item.
        given: ``[B, g, n]`` rows of the Cholesky factor that stand for what was chosen before: its determinants are
            those of the kernel given these.

    Returns:
        ``[B, count]`` items in the order in which they were chosen, and the gain of each: the logarithm of what is
        left of its diagonal (at least ``FLOOR``) and its quality.
    """
    batch, items = diagonal.shape
    before = 0 if given is None else given.shape[1]
    rows = diagonal.new_zeros(batch, before + count, items)
    left = diagonal.clone()
    if given is not None:
        rows[:, :before] = given
        left -= given.square().sum(dim=1)
    # What is added to a gain, and what bars a chosen item from being chosen again.
    extra = torch.zeros_like(diagonal) if quality is None else quality.expand_as(diagonal).clone()
    order, gains = [], []
    # Indices stay tensors: a number would make the host wait for the device each time.
    for row in range(before, before + count):
        gain, item = (left.clamp(min=FLOOR).log() + extra).max(dim=1, keepdim=True)
        order.append(item)
        gains.append(gain)
        extra.scatter_(1, item, -torch.inf)
        known = rows[:, :row].gather(2, item[:, None].expand(-1, row, -1))
        rest = column(item[:, 0]) - (known.transpose(1, 2) @ rows[:, :row])[:, 0]
        rows[:, row] = rest / left.gather(1, item).clamp(min=FLOOR).sqrt()
        left -= rows[:, row].square()
    return torch.cat(order, dim=1), torch.cat(gains, dim=1)
