"""Entropic optimal transport by Sinkhorn's iteration, and the merging of tokens along it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from spatiotoken.tokens.merging import top_indices


def sinkhorn(
    cost: Tensor, *, entropy: float = 0.1, iterations: int = 100, tolerance: float = 1e-2, joint: bool = False
) -> Tensor:
    """``[B, m, n]`` how much of each of ``m`` goes to each of ``n``, at a float32 ``cost`` of the same shape.

    Columns sum to ``1 / n``, rows to ``1 / m`` as nearly as the iteration comes. A problem is settled, and stays as it
    is, once the scaling of its rows moves by less than ``tolerance`` on average; with ``joint``, all are at once, by
    the average over all.
    """
    kernel = (-cost / entropy).exp()
    batch, rows, columns = cost.shape
    row, column = kernel.new_ones(batch, rows, 1), kernel.new_ones(batch, columns, 1)
    settled = torch.zeros(batch, 1, 1, dtype=torch.bool, device=cost.device)
    for _ in range(iterations):
        new_row = 1 / rows / (kernel @ column)
        new_column = 1 / columns / (kernel.mT @ new_row)
        moved = (new_row - row).abs().mean(dim=(0, 1, 2) if joint else (1, 2), keepdim=True)
        row, column = torch.where(settled, row, new_row), torch.where(settled, column, new_column)
        settled = settled | (moved < tolerance)
        # Looking is free on a CPU; on a GPU it would cost more than the iterations that it might save.
        if settled.device.type == "cpu" and bool(settled.all()):
            break
    return row * column.mT * kernel


def merge_into_anchors(frames: Tensor, anchors: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Transport the other tokens of each frame to its anchors, at a cost of cosine distance plus half the way.

    Args:
        frames: ``[T, N, D]`` float32.
        anchors: ``[T, k]`` indices, rising.

    Returns:
        ``[T, k, D]`` anchors, a tenth of which is the mean with the tokens that they are the nearest anchor of, and
        ``[T, N]`` the anchor that each token contributes most to.
    """
    num_frames, places, _ = frames.shape
    count = anchors.shape[1]
    is_other = torch.ones(num_frames, places, device=frames.device).scatter_(1, anchors, 0)
    others = top_indices(is_other, places - count)
    base = places * torch.arange(num_frames, device=frames.device)[:, None]
    target = frames.flatten(0, 1)[anchors + base]
    owner = torch.arange(count, device=frames.device).expand(num_frames, -1)
    owner = torch.zeros_like(is_other, dtype=torch.long).scatter_(1, anchors, owner)
    if not others.shape[1]:
        return target, owner
    y, x = torch.linspace(0, 1, height, device=frames.device), torch.linspace(0, 1, width, device=frames.device)
    position = torch.cartesian_prod(y, x)
    similarity = frames @ normalize(target, dim=-1).mT / frames.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    similarity = similarity.flatten(0, 1)[others + base]
    plan = sinkhorn(1 - similarity + 0.5 * torch.cdist(position[others], position[anchors]), joint=True)
    hard = one_hot(similarity.argmax(dim=-1), count).float()
    soft, own = plan / (1 + plan.sum(dim=1, keepdim=True)), 1 / (1 + plan.sum(dim=1))
    share = 0.9 * soft + 0.1 * hard / (1 + hard.sum(dim=1, keepdim=True))
    own = 0.9 * own + 0.1 / (1 + hard.sum(dim=1))
    weights = frames.new_zeros(num_frames * places, count)
    weights[anchors + base] = own.diag_embed()
    weights[others + base] = share
    merged = weights.view(num_frames, places, count).mT @ frames
    return merged, owner.scatter_(1, others, share.argmax(dim=-1))


def merge_clips(values: Tensor, length: int, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Transport the anchors of later frames of a clip to those of its first, frame after frame.

    The ``kept`` anchors of a later frame that go nowhere in particular (lowest largest share; of equals, the lowest
    index) stay for themselves.

    Args:
        values: ``[T, k, D]`` anchors of each frame.
        length: frames per clip.

    Returns:
        ``[clips, k, D]`` merged first frames, ``[T, k]`` bool, True where an anchor stays, and ``[T, k]`` the first
        frame's anchor that each other one contributes most to.
    """
    merged = values[::length].clone()
    stays = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
    owner = torch.zeros_like(stays, dtype=torch.long)
    shares = []
    for step in range(1, length):
        moving = values[step::length]
        clips = moving.shape[0]  # the last clip may be shorter
        similarity = (normalize(moving, dim=-1) @ normalize(merged[:clips], dim=-1).mT).clamp(-1 + 1e-6, 1 - 1e-6)
        distance = 1 - similarity
        distance = distance - distance.amin(dim=(1, 2), keepdim=True)
        plan = sinkhorn(distance * (1 - math.exp(-(step**2) / (2 * 1.5**2 + 1e-9))))
        plan = plan / plan.sum(dim=2, keepdim=True).clamp(min=1e-9)
        alone = plan.amax(dim=2).argsort(dim=1, stable=True)[:, :kept]
        staying = torch.zeros_like(stays[step::length]).scatter_(1, alone, True)
        stays[step::length] = staying
        plan = plan * ~staying.unsqueeze(-1)
        load = 1 + plan.sum(dim=1)
        merged[:clips] = (merged[:clips] + plan.mT @ moving) / load.unsqueeze(-1)
        shares.append((plan, load))
    weight = torch.ones_like(merged[..., 0])  # what later merging leaves of a share
    for step in range(length - 1, 0, -1):
        plan, load = shares[step - 1]
        weight[: load.shape[0]] /= load
        owner[step::length] = (plan * weight[: load.shape[0]].unsqueeze(1)).argmax(dim=2)
    return merged, stays, owner
