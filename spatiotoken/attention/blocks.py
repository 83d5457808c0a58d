"""What patterns are made of: blocks that are always seen, pooled queries and keys, and sets by their share of the mass.

Block maps are bool ``[G, nq, nk]``, query blocks by key blocks; the last block of a prompt may be short.
"""

from __future__ import annotations

import torch
from torch import Tensor


def num_blocks(length: int, block: int) -> int:
    """Blocks that ``length`` tokens fill, the last perhaps in part."""
    return -(-length // block)


def causal_blocks(length: int, block_q: int, block_k: int, device: torch.device) -> Tensor:
    """``[nq, nk]`` True where some query of the one block sees some key of the other."""
    last = (torch.arange(num_blocks(length, block_q), device=device) + 1) * block_q - 1
    first = torch.arange(num_blocks(length, block_k), device=device) * block_k
    return first <= last[:, None]


def diagonal_blocks(length: int, block_q: int, block_k: int, device: torch.device) -> Tensor:
    """``[nq, nk]`` True where the blocks have a token in common."""
    first = torch.arange(num_blocks(length, block_q), device=device)[:, None] * block_q
    start = torch.arange(num_blocks(length, block_k), device=device) * block_k
    return (start < first + block_q) & (start + block_k > first)


def window_blocks(count: int, window: int, block: int, device: torch.device) -> Tensor:
    """``[count, count]`` True at the blocks that hold the ``window`` latest keys of any query, itself included."""
    number = torch.arange(count, device=device)
    return (number <= number[:, None]) & (number * block + block > number[:, None] * block - window + 1)


def pooled(states: Tensor, block: int) -> Tensor:
    """``[heads, n, d]`` float32 mean of each block of ``states [heads, L, d]``; the last over what there is."""
    heads, length, dim = states.shape
    count = num_blocks(length, block)
    padded = torch.nn.functional.pad(states.float(), (0, 0, 0, count * block - length))
    sizes = torch.full((count, 1), block, device=states.device)
    sizes[-1] = length - (count - 1) * block
    return padded.view(heads, count, block, dim).sum(dim=2) / sizes


def per_head(states: Tensor, groups: int) -> Tensor:
    """``states [kv_heads, ...]`` once for each of the ``groups`` query heads on a key head, ``[heads, ...]``."""
    return states.repeat_interleave(groups, dim=0)


def by_mass(mass: Tensor, share: float | Tensor) -> Tensor:
    """Bool like ``mass [..., n]``: the fewest largest that together reach ``share`` of the whole, with the one that
    crosses it; ties go to the first.

    Args:
        mass: float32, nothing below 0. Rows of zeros give nothing.
    """
    order = mass.argsort(dim=-1, descending=True, stable=True)
    ranked = mass.gather(-1, order)
    before = ranked.cumsum(dim=-1) - ranked
    taken = (before < share * mass.sum(dim=-1, keepdim=True)) & (ranked > 0)
    return torch.zeros_like(taken).scatter_(-1, order, taken)


def largest(score: Tensor, count: int) -> Tensor:
    """Bool like ``score [..., n]``: the ``count`` largest, all if there are no more; ties go to the first."""
    order = score.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, True)


def as_columns(selected: Tensor, width: int) -> Tensor:
    """``[G, width]`` int64 rising places where ``selected [G, L]`` holds, -1 after the last; ``width`` is the largest
    number of them in a row."""
    order = (~selected).to(torch.uint8).argsort(dim=-1, stable=True)[:, :width]
    return order.where(selected.gather(-1, order), -1)
