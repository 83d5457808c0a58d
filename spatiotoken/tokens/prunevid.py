"""PruneVid: static places merged over scenes, then similar tokens of each scene and frame clustered."""

from __future__ import annotations

from itertools import groupby
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import TokenReducer
from spatiotoken.tokens.density_peaks import (
    assign_to_centres,
    density_peak_centres,
    density_peak_scores,
    scaled_distances,
)
from spatiotoken.tokens.merging import mean_by_assignment

_CHUNK = 8
"""Frames whose ``N x N`` distances are held at once."""


def scene_labels(frames: Tensor, segment_ratio: float, neighbours: int) -> Tensor:
    """``[T]`` density-peak cluster of each of ``frames [T, N, D]``, by its mean token; ``int(T * ratio)`` clusters."""
    distances = scaled_distances(frames.mean(dim=1, dtype=torch.float32))
    count = max(1, int(frames.shape[0] * segment_ratio))  # the authors ask for no cluster where T is small, and fail
    return assign_to_centres(distances, density_peak_centres(density_peak_scores(distances, neighbours), count))


def scene_lengths(labels: list[int]) -> list[int]:
    """Lengths of the scenes that frames with these ``labels`` fall into.

    Of each label only the longest runs hold, if longer than one frame. What lies between goes, from the left, to the
    longer of the runs beside it (of equals the left). Neighbours of one label are one scene.
    """
    runs = [(label, len(list(group))) for label, group in groupby(labels)]
    longest = {label: max(length for other, length in runs if other == label) for label, _ in runs}
    held = [label if 1 < length == longest[label] else None for label, length in runs for _ in range(length)]
    stretches = [(label, len(list(group))) for label, group in groupby(held)]
    scenes: list[tuple[int | None, int]] = []
    for place, (label, length) in enumerate(stretches):
        if label is None:
            before = scenes[-1] if scenes else (None, 0)
            after = stretches[place + 1] if place + 1 < len(stretches) else (None, 0)
            label = before[0] if before[1] >= after[1] else after[0]
        if scenes and scenes[-1][0] == label:
            length += scenes.pop()[1]
        scenes.append((label, length))
    return [length for _, length in scenes]


def static_places(scene: Tensor, similarity: float) -> Tensor:
    """``[N]`` bool: places of ``scene [W, N, D]`` whose tokens' mean pairwise cosine is above ``similarity``."""
    count = scene.shape[0]
    length = torch.linalg.vector_norm(scene, dim=-1, dtype=torch.float32).clamp(min=1e-12)
    direction = scene.new_zeros(scene.shape[1:], dtype=torch.float32)
    for frame, inverse in zip(scene, 1 / length, strict=True):  # no copy of the scene
        direction.addcmul_(frame, inverse[:, None])
    total = direction.square().sum(dim=-1)
    # Rounding may not push a cosine above 1, and in a scene of one frame nothing is static.
    return ((total - count) / max(1, count * (count - 1))).clamp(max=1) > similarity


def cluster_tokens(tokens: Tensor, count: int, neighbours: int) -> Tensor:
    """``[B, n]``: index of the centre that each of ``tokens [B, n, D]`` goes to, of ``count`` density peaks per row."""
    owners = []
    for part in tokens.split(_CHUNK):
        distances = scaled_distances(part)
        centres = density_peak_centres(density_peak_scores(distances, neighbours), count)
        nearest = distances.gather(2, centres[:, None].expand(-1, part.shape[1], -1)).argmin(dim=2)
        owners.append(centres.gather(1, nearest).scatter(1, centres, centres))
    return torch.cat(owners)


class PruneVid(TokenReducer, method="prunevid", paper="2412.16117"):
    """Scenes merge what is static, then similar tokens of a scene or a frame are averaged (arXiv 2412.16117).

    Frames are clustered by their mean tokens into scenes without gaps (``scene_lengths``). In a scene of ``W`` frames
    a place whose tokens have a mean pairwise cosine above ``similarity`` is static, its ``W`` tokens ``[D]`` one. The
    static tokens of a scene, and the dynamic ones of each frame, are then clustered around ``int(n * cluster_ratio)``
    density peaks if they are more than ``unclustered``. A survivor is the plain mean of all its members, none is
    dropped; it stands at its cluster's centre, if static in the scene's first frame. How many there are depends on
    the clip. With ``cluster_ratio`` 1 and ``similarity`` 1 nothing is merged.

    Only the authors' first stage, whose vectors are reproduced: their pruning inside the language model is another
    stage's. Their 14 is the field ``unclustered``. Tokens stay in place, where theirs come static ones first and
    clusters in order of score. Clips of fewer than ``neighbours`` or ``1 / segment_ratio`` frames, on which they
    fail, have as many neighbours as frames and at least one cluster.
    """

    kind: ClassVar[str] = "segmentation and merging"
    merges: ClassVar[bool] = True
    complexity: ClassVar[str] = "O(TN^2 D + T^2 D)"
    fidelity: ClassVar[str] = "authors' vectors, in part"

    similarity: float = Field(0.8, ge=-1, le=1, description="mean cosine in a scene above which a place is static")
    segment_ratio: float = Field(0.25, gt=0, le=1, description="clusters of frames, as a share of the frames")
    cluster_ratio: float = Field(0.5, gt=0, le=1, description="clusters of tokens, as a share of the tokens")
    neighbours: int = Field(7, ge=1, description="neighbours that a density is taken from")
    unclustered: int = Field(14, ge=1, description="most tokens of a scene or frame that are left unclustered")

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        if self.cluster_ratio == 1 and self.similarity == 1:
            return ReducedTokens.everything(video)
        labels = scene_labels(video.frames, self.segment_ratio, self.neighbours)
        scenes = video.frames.split(scene_lengths(labels.tolist()))
        static = torch.stack([static_places(scene, self.similarity) for scene in scenes])
        order = static.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        index = torch.arange(video.num_tokens, device=labels.device).view(video.grid[0], -1)
        owner = torch.empty_like(index)  # the token that each goes to
        start = 0
        for scene, places, still in zip(scenes, order, static.sum(dim=1).tolist(), strict=True):
            span = slice(start, start + scene.shape[0])
            start += scene.shape[0]
            if still:
                peaks = self._peaks(scene.index_select(1, places[:still]).float().mean(dim=0, keepdim=True))
                owner[span, places[:still]] = index[span.start, places[peaks]]
            if still < places.shape[0]:
                peaks = self._peaks(scene.index_select(1, places[still:]))
                owner[span, places[still:]] = index[span].gather(1, places[still:][peaks])
        kept = owner == index
        source = index[kept]
        rank = (kept.flatten().cumsum(0) - 1)[owner.flatten()]
        return ReducedTokens(mean_by_assignment(video.embeddings, rank, source.shape[0]), source, rank)

    def _peaks(self, tokens: Tensor) -> Tensor:
        """``[B, n]``: where each of ``tokens [B, n, D]`` goes: to itself, where they are few."""
        size = tokens.shape[1]
        if size <= self.unclustered or self.cluster_ratio == 1:
            return torch.arange(size, device=tokens.device).expand(tokens.shape[0], -1)
        return cluster_tokens(tokens, max(1, int(size * self.cluster_ratio)), self.neighbours)
