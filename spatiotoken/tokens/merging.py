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


def top_indices(scores: Tensor, count: int, *, largest: bool = True) -> Tensor:
    """``[..., count]`` indices of the largest (or smallest) scores of the last dimension, in order of place.

    Ties go to the lowest index, on every device.
    """
    return scores.argsort(dim=-1, descending=largest, stable=True)[..., :count].sort(dim=-1).values


def nearest(queries: Tensor, anchors: Tensor, *, chunk: int = 2048) -> Tensor:
    """``[n]`` index of the row of ``anchors [m, D]`` with the highest cosine to each of ``queries [n, D]``.

    Ties go to the lowest index.

    Memory is ``O(chunk * m)``.
    """
    unit = torch.nn.functional.normalize(anchors.float(), dim=-1)
    rows = [(part.float() @ unit.T).argmax(dim=-1) for part in queries.split(chunk)]  # lengths of queries do not matter
    return torch.cat(rows)


def paired_cosine(first: Tensor, second: Tensor) -> Tensor:
    """``[...]`` float32 cosine of each vector of ``first [..., D]`` with its partner; 0 where one of them is zero."""
    a, b = first.float(), second.float()
    lengths = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return (a * b).sum(dim=-1) / lengths.clamp(min=1e-16)


def question_direction(question: Tensor) -> Tensor:
    """``[D]`` float32 unit vector along the mean of ``question [L, D]``; zero for an empty question."""
    return torch.nn.functional.normalize(question.float().sum(dim=0), dim=0)
