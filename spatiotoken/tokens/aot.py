"""AOT: local and global anchors that gather the other tokens by optimal transport."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import Attention, SaliencyReducer
from spatiotoken.tokens.merging import top_indices
from spatiotoken.tokens.transport import merge_clips, merge_into_anchors


def aot_counts(grid: tuple[int, int, int], retention: float, keep: float, clips: int) -> tuple[int, int, int]:
    """Frames per clip, anchors per frame, and how many of these each later frame of a clip keeps for itself.

    As many anchors as the budget allows; if it allows all tokens to be anchors, later frames keep more than ``keep``.
    """
    frames, places = grid[0], grid[1] * grid[2]
    budget = max(1, int(frames * places * retention + 1e-9))
    length = math.ceil(frames / min(clips, frames, budget))
    first = math.ceil(frames / length)
    later = frames - first
    fits = (k for k in range(places, 0, -1) if first * k + later * math.ceil(keep * (k - 1)) <= budget)
    anchors = next(fits)
    kept = math.ceil(keep * (anchors - 1))
    if anchors == places and later:
        kept = max(kept, (budget - first * places) // later)
    return length, anchors, kept


def aot_count(grid: tuple[int, int, int], retention: float, keep: float, clips: int) -> int:
    """How many tokens are kept of a ``(T, H, W)`` grid."""
    length, anchors, kept = aot_counts(grid, retention, keep, clips)
    first = math.ceil(grid[0] / length)
    return first * anchors + (grid[0] - first) * kept


def local_anchors(saliency: Tensor, grid: tuple[int, int], windows: int, count: int) -> Tensor:
    """``[T, N]`` bool, True at the ``count`` most salient tokens of each of ``windows x windows`` parts of a frame."""
    (height, width), device = grid, saliency.device
    down, across = min(windows, height), min(windows, width)
    row, column = torch.arange(height, device=device), torch.arange(width, device=device)
    window = ((row * down // height)[:, None] * across + column * across // width).flatten()
    order = saliency.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, window[order].argsort(dim=1, stable=True))  # by window, then by saliency
    window = window.sort().values
    rank = torch.arange(window.shape[0], device=device) - torch.searchsorted(window, window)
    return torch.zeros_like(saliency, dtype=torch.bool).scatter_(1, order, (rank < count).expand_as(order))


def aot_anchors(early: Tensor, late: Tensor, grid: tuple[int, int], count: int, local: float, windows: int) -> Tensor:
    """``[T, count]`` anchors of each frame, rising: local ones, as many in each window, then the globally most salient.

    A share of local ones that does not go evenly into the windows is rounded down. Ties go to the lowest index.

    Args:
        early: ``[T, N]`` saliency that chooses the local ones; ``late`` likewise the others.
    """
    each = int(count * local) // (min(windows, grid[0]) * min(windows, grid[1]))
    return top_indices(late.masked_fill(local_anchors(early, grid, windows, each), torch.inf), count)


class AOT(SaliencyReducer, method="aot", paper="2603.01400"):
    """Local and global anchors that gather the other tokens by optimal transport (arXiv 2603.01400).

    In each frame the ``local`` share of the anchors are the tokens with the most attention in an early tower layer in
    each of ``windows x windows`` parts of the picture, as many in each part; the others are those with the most
    attention in the layer that the projector reads. The frame's other tokens ``[D]`` are merged into the anchors by
    entropic optimal transport. Then the anchors of later frames of a clip are merged into those of its first frame
    likewise, but for the ``keep`` share of them that fits none in particular. What is left are the first frames'
    anchors, once, and what later frames keep, in place; all are convex combinations of tokens. ``assignment`` follows
    the anchor that a token contributes most to, then the one that this anchor contributes most to.

    ``retention`` sets the number of anchors. The authors take 126 of 729 anchors (0.1 of the tokens after pooling, with
    ``keep`` 0.3), 9 x 9 windows of a 27 x 27 grid (a third each way) and clips of 4 of 32 or 8 of 64 frames: here any
    number is cut into at most ``clips``. They merge within frames before 2 x 2 pooling, and so pool the choice of
    anchors too; here both see the pooled tokens. They take the late attention from one layer before, emit first frames'
    anchors twice (unmerged and merged) and renumber positions, kept here; and of later anchors with equal shares, they
    keep fewer. A share of local anchors too small for the windows is given to the others. The choice in windows and
    both mergings reproduce the authors' results, each by itself.
    """

    kind: ClassVar[str] = "segmentation and merging"
    merges: ClassVar[bool] = True
    complexity: ClassVar[str] = "O(T N K D) for K anchors per frame"
    fidelity: ClassVar[str] = "authors' vectors, in part"

    attention: Attention = Field("received", description="whose attention in the vision tower makes a token salient")
    retention: Retention = 0.1
    keep: float = Field(0.3, ge=0, le=1, description="share of a later frame's anchors that stay for themselves")
    local: float = Field(0.5, ge=0, le=1, description="share of the anchors that are chosen window by window")
    windows: int = Field(3, ge=1, description="windows each way")
    clips: int = Field(8, ge=1, description="most clips that a video is cut into")

    def saliency_layers(self, depth: int) -> tuple[int, ...]:
        return (min(round(0.2 * depth), depth - 1), depth - 1)

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        if self.retention == 1:
            return ReducedTokens.everything(video)
        (frames, height, width), places = video.grid, video.tokens_per_frame
        length, count, kept = aot_counts(video.grid, self.retention, self.keep, self.clips)
        saliency = video.needed("saliency").view(-1, frames, places)
        anchors = aot_anchors(saliency[0], saliency[-1], (height, width), count, self.local, self.windows)
        values, owner = merge_into_anchors(video.frames.float(), anchors, height, width)
        merged, stays, heir = merge_clips(values, length, kept)
        values[::length] = merged
        time = torch.arange(frames, device=anchors.device)[:, None]
        place = torch.arange(count, device=anchors.device)
        # Of each anchor, in the order of all: itself where it stays, else its heir in the clip's first frame.
        heir = torch.where(stays, time * count + place, time // length * length * count + heir)
        survivor = (stays.flatten().cumsum(0) - 1)[heir]
        total = aot_count(video.grid, self.retention, self.keep, self.clips)
        left = stays.flatten().to(torch.uint8).argsort(descending=True, stable=True)[:total]
        source = (anchors + time * places).flatten()[left]
        return ReducedTokens(
            values.flatten(0, 1)[left].to(video.embeddings.dtype), source, survivor.gather(1, owner).flatten()
        )
