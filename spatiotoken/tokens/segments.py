"""Segments of similar frames, which several methods merge within, and trees of similar tokens through a segment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spatiotoken.tokens.density_peaks import density_peak_scores, scaled_distances

_BLOCK = 2**23
"""Similarities of tokens that are held at once, unless those of two frames are more."""
_FRAMES = 8
"""Frames whose trees are clustered together."""
_FAR = 1e18
"""Distance of what is not there; its density is 0."""


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


def tree_links(tokens: Tensor, segments: Tensor, threshold: float, least: int, chosen: Tensor | None = None) -> Tensor:
    """``[T, F]`` place of the most similar token in the previous frame of the segment, -1 for the root of a tree.

    A link needs a cosine above ``threshold``. Where that would leave fewer than ``least`` roots per frame of a
    segment, the threshold rises there until it leaves more.

    Args:
        tokens: ``[T, N, D]`` float32; their lengths do not matter.
        least: less than ``F``.
        chosen: ``[T, F]`` the tokens of each frame that take part, by which links count places; None for all.
    """
    frames, places = tokens.shape[:2] if chosen is None else chosen.shape
    similarity = tokens.new_full((frames, places), -torch.inf)
    place = torch.zeros_like(similarity, dtype=torch.int64)
    step, start = max(1, _BLOCK // places**2), 0
    for length in segments.unique_consecutive(return_counts=True)[1].tolist():
        for begin in range(start, start + length - 1, step):
            end = min(begin + step, start + length - 1)
            part = tokens[begin : end + 1]
            if chosen is not None:
                offset = tokens.shape[1] * torch.arange(end + 1 - begin, device=tokens.device)[:, None]
                rows = (chosen[begin : end + 1] + offset).flatten()
                part = part.flatten(0, 1).index_select(0, rows).unflatten(0, (-1, places))
            inverse = torch.linalg.vector_norm(part, dim=2).clamp(min=1e-12).reciprocal()
            best = (part[1:] @ part[:-1].mT).mul_(inverse[:-1, None]).max(dim=2)
            similarity[begin + 1 : end + 1], place[begin + 1 : end + 1] = best.values * inverse[1:], best.indices
        start += length
    first, stop = segment_bounds(segments)

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
    size, count = torch.tensor([sizes, counts], device=trees.device)
    begun, done = size.cumsum(0) - size, count.cumsum(0) - count
    # The last of each takes what is written of places that are not there.
    clusters, centres = size.new_empty(trees.shape[0] + 1), size.new_empty(sum(counts) + 1)
    order = sorted((frame for frame, trees_of in enumerate(sizes) if trees_of), key=sizes.__getitem__)
    for start in range(0, len(order), _FRAMES):
        frames = order[start : start + _FRAMES]
        place = torch.arange(sizes[frames[-1]], device=trees.device)
        real = place < size[frames, None]
        index = torch.where(real, begun[frames, None] + place, trees.shape[0])
        values = trees.index_select(0, index.clamp(max=trees.shape[0] - 1).flatten()).unflatten(0, index.shape)
        distances = scaled_distances(values).masked_fill_(~(real[:, None] & real[:, :, None]), _FAR)
        ranked = density_peak_scores(distances, neighbours, count[frames]).argsort(descending=True, stable=True)
        # Centres first, then the nearest of them.
        distances = distances.gather(2, ranked[:, None].expand_as(distances))
        centre = place < count[frames, None]
        cluster = distances.masked_fill_(~centre[:, None], torch.inf).argmin(dim=2)
        cluster.scatter_(1, ranked, torch.where(centre, place, cluster.gather(1, ranked)))
        clusters[index] = done[frames, None] + cluster
        centres[torch.where(centre, done[frames, None] + place, -1)] = begun[frames, None] + ranked
    return clusters[:-1], centres[:-1]
