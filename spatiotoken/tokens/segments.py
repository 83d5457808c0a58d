"""Segments of similar frames, which several methods merge within, and trees of similar tokens through a segment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spatiotoken.tokens.density_peaks import (
    assign_to_centres,
    density_peak_centres,
    density_peak_scores,
    scaled_distances,
)

_BLOCK = 2**23
"""Similarities of tokens that are held at once, unless those of two frames are more."""


def frame_similarities(features: Tensor) -> Tensor:
    """``[T - 1]`` float32 cosines of each frame of ``features [T, D]`` and the next; 0 beside a zero vector."""
    values = features.float()
    return torch.nn.functional.cosine_similarity(values[:-1], values[1:], dim=-1)


def segment_frames(similarities: Tensor, minimum: int, threshold: float) -> Tensor:
    """``[T]`` number of the segment that each frame lies in, 0 first, from ``similarities [T - 1]``.

    A segment ends where the next frame is less similar than ``threshold``; where that gives fewer than ``minimum``
    segments, also at the least similar of the other places, of equals the first. A video of fewer frames than
    ``minimum`` gets one segment per frame.
    """
    rank = similarities.argsort(stable=True).argsort()
    cut = (similarities < threshold) | (rank < minimum - 1)
    return torch.nn.functional.pad(cut.cumsum(0), (1, 0))


def segment_bounds(segments: Tensor) -> tuple[Tensor, Tensor]:
    """``[T]`` each: the first frame of the segment that a frame lies in, and the one after its last."""
    return torch.searchsorted(segments, segments), torch.searchsorted(segments, segments, right=True)


def tree_links(unit: Tensor, segments: Tensor, threshold: float, least: int) -> Tensor:
    """``[T, F]`` place of the most similar token in the previous frame of the segment, -1 for the root of a tree.

    A link needs a cosine above ``threshold``. Where that would leave fewer than ``least`` roots per frame of a
    segment, the threshold rises there until it leaves more.

    Args:
        unit: ``[T, F, D]`` tokens of unit length.
        least: less than ``F``.
    """
    frames, places = unit.shape[:2]
    size = max(1, _BLOCK // places**2)
    pairs = zip(unit[1:].split(size), unit[:-1].split(size), strict=True)
    found = [(part @ before.mT).max(dim=2) for part, before in pairs] if frames > 1 else []
    similarity = torch.cat([unit.new_full((1, places), -torch.inf), *(best.values for best in found)])
    place = torch.cat([segments.new_zeros(1, places), *(best.indices for best in found)])
    first, stop = segment_bounds(segments)
    starts = first == torch.arange(frames, device=first.device)
    similarity = similarity.masked_fill(starts[:, None], -torch.inf)

    # The similarity that one link too many has, per segment: sort all by it, then, stably, by segment.
    most = (stop - first) * (places - least)
    order = similarity.flatten().argsort(descending=True, stable=True)
    order = order[segments[order // places].argsort(stable=True)]
    raised = similarity.flatten()[order[first * places + most - 1]]
    links = torch.zeros_like(first).index_add_(0, segments, (similarity > threshold).sum(dim=1))[segments]
    limit = torch.where(links > most, raised, threshold)
    return torch.where(similarity > limit[:, None], place, -1)


def tree_roots(links: Tensor) -> Tensor:
    """``[T * F]`` root of the tree that each token belongs to (itself, for a root), from ``links [T, F]``."""
    frames, places = links.shape
    own = torch.arange(frames * places, device=links.device).view(frames, places)
    root = torch.where(links < 0, own, own[:, :1] - places + links).flatten()
    for _ in range((frames - 1).bit_length()):  # each round doubles the number of links that are followed
        root = root[root]
    return root


def cluster_trees(trees: Tensor, sizes: Sequence[int], counts: Sequence[int], neighbours: int) -> tuple[Tensor, Tensor]:
    """Density-peak clusters of the ``trees [R, D]`` that are rooted in the same frame.

    Args:
        sizes: trees of each frame, which come one frame after the other.
        counts: clusters of each frame, at most as many.

    Returns:
        ``[R]`` cluster of each tree; ``[sum(counts)]`` the tree at each cluster's centre (the first of a lone cluster).
    """
    clusters, centres, begun, done = [], [], 0, 0
    for values, count in zip(trees.split(list(sizes)), counts, strict=True):
        if count == values.shape[0]:
            centre = cluster = torch.arange(count, device=trees.device)
        else:
            distances = scaled_distances(values)
            centre = density_peak_centres(density_peak_scores(distances, min(count, neighbours)), count)
            cluster = assign_to_centres(distances, centre)
        clusters.append(cluster + done)
        centres.append(centre + begun)
        begun, done = begun + values.shape[0], done + count
    return torch.cat(clusters), torch.cat(centres)
