"""What many methods do with tokens: compare them in pairs, take the best, average those that were merged."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def waits_are_free(device: torch.device) -> bool:
    """Whether what a tensor holds can be looked at without waiting, as on a CPU, where it is there already.

    Searches that look at what they found so far do less arithmetic, but make the host wait for a GPU each time.
    """
    return device.type == "cpu"


def mean_by_assignment(values: Tensor, assignment: Tensor, count: int) -> Tensor:
    """Mean of the rows of ``values [N, D]`` that go to each of ``count`` survivors; -1 goes nowhere.

    Sums in float32. A survivor with a single member gets exactly that row; one with none gets zeros.
    """
    bucket = torch.where(assignment < 0, count, assignment)
    grouped, order = bucket.sort(stable=True)
    first = torch.searchsorted(grouped, torch.arange(count + 1, device=order.device))
    if values.is_cuda:
        total = values.new_zeros(count + 1, values.shape[1], dtype=torch.float32)
        total = total.index_add_(0, bucket, values.float())[:count]
    else:
        # Survivor by survivor: on a CPU up to seven times as fast as adding row by row.
        members = order[: int(first[-1])]
        total = torch.nn.functional.embedding_bag(members, values.float(), first[:-1], mode="sum")
    return total.div_(first.diff().clamp(min=1)[:, None]).to(values.dtype)


def top_mask(scores: Tensor, count: int, *, largest: bool = True) -> Tensor:
    """``[...]`` bool, True at the ``count`` largest (or smallest) scores of the last dimension.

    Ties go to the lowest index, on every device; what is not a number comes last.
    """
    if count >= scores.shape[-1] or count == 0:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    worst = -torch.inf if largest else torch.inf
    scores = scores.nan_to_num(worst, torch.inf, -torch.inf)
    # Several times as fast as to sort all. Which of equal scores are among these depends on the device.
    top = scores.topk(count, dim=-1, largest=largest, sorted=False).values
    edge = top.amin(dim=-1, keepdim=True) if largest else top.amax(dim=-1, keepdim=True)
    better, level = scores > edge if largest else scores < edge, scores == edge
    return better | (level & (level.cumsum(dim=-1) <= count - better.sum(dim=-1, keepdim=True)))


def top_indices(scores: Tensor, count: int, *, largest: bool = True) -> Tensor:
    """``[..., count]`` indices of the largest (or smallest) scores of the last dimension, in order of place.

    Ties go to the lowest index, on every device.
    """
    return true_indices(top_mask(scores, count, largest=largest), min(count, scores.shape[-1]))


def true_indices(mask: Tensor, count: int) -> Tensor:
    """``[..., count]`` indices in the last dimension, rising, of the ``count`` places of each row that are True."""
    shape = (*mask.shape[:-1], count)
    if 0 in shape:
        return torch.empty(shape, dtype=torch.int64, device=mask.device)
    # The size is known, so the host need not wait.
    return torch.nonzero_static(mask, size=math.prod(shape))[:, -1].view(shape)


def nearest(queries: Tensor, anchors: Tensor, *, chunk: int = 2048) -> Tensor:
    """``[n]`` index of the row of ``anchors [m, D]`` with the highest cosine to each of ``queries [n, D]``.

    Ties go to the lowest index.

    Memory is ``O(chunk * m)``.
    """
    unit = torch.nn.functional.normalize(anchors.float(), dim=-1)
    rows = [(part.float() @ unit.T).argmax(dim=-1) for part in queries.split(chunk)]  # lengths of queries do not matter
    return torch.cat(rows)


def paired_dot(first: Tensor, second: Tensor) -> Tensor:
    """``[...]`` float32 inner product of each vector of ``first [..., D]`` with its partner."""
    first, second = first.float(), second.float()
    dense = first.is_contiguous() and second.is_contiguous()
    if first.is_cuda or first.shape != second.shape or not (dense or first.ndim == 3):
        return (first * second).sum(dim=-1)
    # On a CPU, writing all products to memory would be most of the time, and so would copying some of the frames.
    if not dense:
        return torch.stack([paired_dot(*frames) for frames in zip(first, second, strict=True)])
    rows, columns = (side.view(-1, 1, side.shape[-1]) for side in (first, second))
    return torch.bmm(rows, columns.mT).view(first.shape[:-1])


def paired_cosine(first: Tensor, second: Tensor) -> Tensor:
    """``[...]`` float32 cosine of each vector of ``first [..., D]`` with its partner; 0 where one of them is zero."""
    return cosine(paired_dot(first, second), paired_dot(first, first), paired_dot(second, second))


def previous_cosine(frames: Tensor) -> Tensor:
    """``[T - 1, N]`` float32 cosine of each token of ``frames [T, N, D]`` with its place one frame before."""
    frames = frames.float()
    squares = paired_dot(frames, frames)
    return cosine(paired_dot(frames[1:], frames[:-1]), squares[1:], squares[:-1])


def cosine(dots: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Float32 cosines from inner products of pairs, and of their ``first`` and ``second`` vectors with themselves.

    Exactly 1 where all three are the same, so that tokens that stand still tie; 0 where a vector is zero.
    """
    return (dots / (first.double() * second).sqrt().clamp(min=1e-16)).float()


def question_direction(question: Tensor) -> Tensor:
    """``[D]`` float32 unit vector along the mean of ``question [L, D]``; zero for an empty question."""
    return torch.nn.functional.normalize(question.float().sum(dim=0), dim=0)
