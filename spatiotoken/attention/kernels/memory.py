"""Room for large outputs."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

# glibc hands out fresh pages above this, and below mostly some that the process has written before.
LEAST_BYTES = 32 << 20


def unwritten(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Contiguous, with no values yet.

    A large tensor on a CPU gets huge pages where the system has them. Otherwise each page of 4 KiB is handed out by
    itself and writing takes five times as long when it is the first: at 4,096 tokens and 28 heads of 128 in float32, a
    tenth of what sparse attention takes.
    """
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LEAST_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)
