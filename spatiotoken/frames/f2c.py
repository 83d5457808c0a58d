"""F2C: short clips around the frames most like the question, seen smaller the more frames they have."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from spatiotoken.frames.base import ScoredSelector
from spatiotoken.frames.scorer import Scorer
from spatiotoken.structures import FrameChoice, Frames


def peaks(relevance: Tensor) -> list[int]:
    """The best frame between each two valleys of a relevance curve, rising; the ends count as valleys.

    Args:
        relevance: ``[T]`` on the CPU.
    """
    inner = relevance[1:-1]
    low = ((inner <= relevance[:-2]) & (inner <= relevance[2:])).nonzero()[:, 0] + 1
    valleys = [0, *low.tolist(), relevance.shape[0] - 1]
    curve = relevance.tolist()
    return sorted({max(range(a, b + 1), key=curve.__getitem__) for a, b in zip(valleys, valleys[1:], strict=False)})


def anchor_frames(relevance: Tensor, count: int) -> list[int]:
    """At most ``count`` peaks, rising: if there are more, the best of each of ``count`` clusters in time.

    The clusters are those of k-means over frame numbers, started from peaks at equal ranks; nothing in it is random.

    Args:
        relevance: ``[T]`` on the CPU.
    """
    found = peaks(relevance)
    if len(found) <= count:
        return found
    places = torch.tensor(found, dtype=torch.float64)
    centres = places[(2 * torch.arange(count) + 1) * len(found) // (2 * count)]
    cluster = torch.empty(0)
    for _ in range(100):
        nearest = torch.bucketize(places, (centres[1:] + centres[:-1]) / 2)
        if torch.equal(nearest, cluster):
            break
        cluster, members = nearest, nearest.bincount(minlength=count)
        total = torch.zeros_like(centres).index_add_(0, cluster, places)
        centres = torch.where(members > 0, total / members.clamp(min=1), centres)
    curve = relevance.tolist()
    best: dict[int, int] = {}
    for group, index in zip(cluster.tolist(), found, strict=True):
        if group not in best or curve[index] > curve[best[group]]:
            best[group] = index
    return sorted(best.values())


def growing_clips(anchors: list[int], num_frames: int, longest: int) -> Tensor:
    """``[A, longest]`` frames in the order in which a clip about each anchor takes them in.

    By turns the next frame after the clip and the one before it; at an end of the video, those of the other side.
    """
    length = torch.arange(1, longest + 1)
    start = torch.tensor(anchors)[:, None] - (length - 1) // 2
    start = torch.minimum(start.clamp(min=0), num_frames - length)
    back = F.pad(start[:, 1:] < start[:, :-1], (1, 0))
    return torch.where(back, start, start + length - 1)


def clip_lengths(features: Tensor, relevance: Tensor, order: Tensor, redundancy: float, reward: float) -> Tensor:
    """``[A]`` best length of each clip: mean relevance, less mean cosine among its frames, plus a bonus for length.

    Args:
        features: ``[T, F]``.
        relevance: ``[T]``.
        order: ``[A, longest]`` from ``growing_clips``.
        redundancy: weight of the mean cosine over all pairs of the clip's frames, each with itself among them.
        reward: bonus of the longest clip; shorter ones get a part in proportion.
    """
    length = torch.arange(1, order.shape[1] + 1, device=order.device)
    total = F.normalize(features[order].float(), dim=2).cumsum(dim=1)
    cosine = total.square().sum(dim=2) / length.square()
    value = relevance[order].float().cumsum(dim=1) / length - redundancy * cosine + reward * length / length[-1]
    return value.argmax(dim=1) + 1


def common_scale(kept: int, full_frames: int) -> float:
    """By what the sides of ``kept`` frames shrink so that all cost no more tokens than ``full_frames`` full ones."""
    # A hair less than the root, so that the sum of many rounded squares stays within the budget too.
    return 1.0 if kept <= full_frames else math.sqrt(full_frames / kept) * (1 - 1e-9)


class F2C(ScoredSelector, method="f2c", paper="2510.02262"):
    """Frames to clips: key clips about relevant frames, at the size their tokens are paid for (arXiv 2510.02262).

    Anchors are the peaks of the relevance curve between its valleys, at most ``full_frames`` of them, thinned by
    k-means over time. Each becomes the middle of a clip of 1 to ``num_frames / anchors`` frames, of the length that is
    best by relevance, redundancy and length; clips that overlap merge. All kept frames are scaled by the same
    ``sqrt(full_frames / kept)``, never above 1, so their tokens are those of ``full_frames`` full ones at most.

    Paper only: no code could be had, and of the paper's text only parts, through others' accounts of it. From those:
    peaks, k-means over time, as many anchors as full frames, clips up to 4 times that in all (sides shrink to half at
    most), the three terms of a clip's length and their weights, merging. Ours: a clip's redundancy counts each frame
    with itself too, for without that one frame has none and a clip could hardly be longer; the longest clip depends on
    how many anchors were found; one scale for all frames (the paper's may differ from clip to clip), since a video
    tensor has one size. The method may keep fewer frames than it is allowed. A preprocessor that rounds sizes up to
    its patches spends more than the scale says.
    """

    kind: ClassVar[str] = "question-aware"
    needs: ClassVar[frozenset[str]] = frozenset({"relevance", "features"})
    complexity: ClassVar[str] = "O(T log T + K F)"
    fidelity: ClassVar[str] = "paper only"

    num_frames: int = Field(128, ge=1, description="how many frames are kept at most")
    scorer: Scorer = Field(Scorer(kind="clip"), description="by what frames are compared with the question")
    full_frames: int = Field(32, ge=1, description="how many frames of full size all kept frames may cost")
    redundancy: float = Field(0.5, ge=0, le=10, description="weight of the likeness among the frames of a clip")
    reward: float = Field(0.05, ge=0, le=10, description="weight of the length of a clip")

    def select(self, frames: Frames) -> FrameChoice:
        total = frames.num_frames
        chosen, scores = list(range(total)), None
        if total > self.num_frames:
            relevance, features = frames.needed("relevance"), frames.needed("features")
            scores = relevance.cpu()
            anchors = anchor_frames(scores, min(self.full_frames, self.num_frames))
            order = growing_clips(anchors, total, self.num_frames // len(anchors))
            device = features.device
            lengths = clip_lengths(features, relevance.to(device), order.to(device), self.redundancy, self.reward)
            inside = torch.arange(order.shape[1]) < lengths.cpu()[:, None]
            chosen = order[inside].unique().tolist()
        scale = common_scale(len(chosen), self.full_frames)
        return FrameChoice(tuple(chosen), None if scale == 1 else (scale,) * len(chosen), scores=scores)
