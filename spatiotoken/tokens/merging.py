"""Averaging tokens that were merged."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_by_assignment(values: Tensor, assignment: Tensor, count: int) -> Tensor:
    """Mean of the rows of ``values [N, D]`` that go to each of ``count`` survivors; -1 goes nowhere.

    Sums in float32. A survivor with a single member gets exactly that row; one with none gets zeros.
    """
    bucket = torch.where(assignment < 0, count, assignment)
    total = values.new_zeros(count + 1, values.shape[1], dtype=torch.float32)
    total.index_add_(0, bucket, values.float())
    members = total.new_zeros(count + 1).index_add_(0, bucket, total.new_ones(bucket.shape[0]))
    return (total / members.clamp(min=1)[:, None])[:count].to(values.dtype)
