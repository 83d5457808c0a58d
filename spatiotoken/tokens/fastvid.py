"""FastVID: salient tokens of every frame, and density-peak anchors that absorb the rest of their segment."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import SaliencyReducer
from spatiotoken.tokens.density_peaks import density_peak_centres, density_peak_scores, scaled_distances
from spatiotoken.tokens.merging import mean_by_assignment, top_indices, true_indices
from spatiotoken.tokens.segments import frame_similarities, segment_bounds, segment_frames

_CHUNK = 8
"""Frames whose ``N x N`` distances are held at once."""


def fastvid_count(grid: tuple[int, int, int], retention: float) -> int:
    """How many tokens are kept: the truncated share of each frame, or of the clip where that is less than a token."""
    frames, places = grid[0], grid[1] * grid[2]
    return frames * int(places * retention) or max(1, int(frames * places * retention))


def fastvid_budget(places: int, retention: float, contextual: float) -> tuple[int, int]:
    """How many of a frame's tokens are salient, and how many anchors it gives its segment on average."""
    kept = int(places * retention)
    return kept - int(kept * contextual), int(kept * contextual)


def anchor_counts(segments: Tensor, budget: int, free: int, stride: int) -> Tensor:
    """``[T]`` anchors of each frame: ``budget`` per frame of a segment, all in every ``stride``-th of its frames.

    Counted from the segment's last frame. What does not divide evenly goes to the last of these frames, one each.
    The stride is shortened where frames with ``free >= budget`` tokens to choose from could not hold the anchors.
    """
    first, stop = segment_bounds(segments)
    length = stop - first
    to_end = stop - 1 - torch.arange(segments.shape[0], device=segments.device)
    strides = torch.arange(1, stride + 1, device=segments.device)
    room = -(-length[:, None] // strides) * free
    step = torch.where(room >= budget * length[:, None], strides, 0).amax(dim=1)
    holders = -(-length // step)
    count = budget * length // holders + (to_end // step < budget * length % holders)
    return torch.where(to_end % step == 0, count, 0)


def by_density(values: Tensor, rows: Tensor, neighbours: int) -> Tensor:
    """Each row of ``rows [A, n]``, indices of tokens ``values [N, D]``, by falling density-peak score."""
    members = [values.index_select(0, part.flatten()).unflatten(0, part.shape) for part in rows.split(_CHUNK)]
    scores = torch.cat([density_peak_scores(scaled_distances(part), neighbours) for part in members])
    return rows.gather(1, density_peak_centres(scores, rows.shape[1]))


def merge_into_anchors(
    members: Tensor, anchors: Tensor, weight: float, free: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Each of ``members [n, D]`` goes to the anchor ``[m, D]`` of the highest cosine, the anchors among them.

    Returns:
        ``[m, D]`` anchors, of which at least ``weight`` is left and the rest is the mean of their members, or of those
        that are ``free [n]``; ``[n]`` the anchor of each member; ``[n]`` the weight that it has there.
    """
    # The small matrix first: on a CPU almost twice as fast.
    goal = (torch.nn.functional.normalize(anchors, dim=-1) @ members.T).T.contiguous().argmax(dim=1)
    merged = goal if free is None else torch.where(free, goal, -1)
    mean = mean_by_assignment(members, merged, anchors.shape[0])
    count = (merged == torch.arange(anchors.shape[0], device=goal.device)[:, None]).sum(dim=1)
    own = (1 / (count + 1)).clamp(min=weight)  # 1 for an anchor with a twin before it, which gets no members
    return own[:, None] * anchors + (1 - own)[:, None] * mean, goal, ((1 - own) / count.clamp(min=1))[goal]


class FastVID(SaliencyReducer, method="fastvid", paper="2503.11187"):
    """Salient tokens of each frame, plus density-peak anchors that absorb their segment (arXiv 2503.11187).

    Keeps ``R = int(retention * N)`` of the ``N`` tokens per frame on average: the ``R - int(contextual * R)`` most
    salient of each frame, unchanged; the others as anchors, spread over the frames at the end of every ``stride`` of
    a segment. All tokens of a segment that are not salient are merged into each of its anchor frames; ``assignment``
    names the anchor in which a token weighs most (an anchor: itself). Positions are kept.

    Differs from the authors' code, which computes the same wherever both work: a clip of fewer than ``segments``
    frames gets one segment per frame (theirs crashes); anchors lost by their integer division are kept; where an
    anchor frame could not hold its anchors (retention above about 0.45), more frames hold some (theirs crashes); a
    segment all of whose frames hold anchors (``stride=1``) still shares its tokens among them (theirs only within the
    frame); with less than one token per frame, the most salient ``int(retention * T * N)`` of the clip are left
    (theirs: none). Their number of density neighbours, 4, is the field ``neighbours``.
    """

    kind: ClassVar[str] = "segmentation and merging"
    needs: ClassVar[frozenset[str]] = frozenset({"saliency", "frame_features"})
    merges: ClassVar[bool] = True
    complexity: ClassVar[str] = "O(TN²D/p + TLNKD) for K anchors per frame, in every p-th, and L frames per segment"
    fidelity: ClassVar[str] = "authors' vectors"

    retention: Retention = 0.1
    segments: int = Field(8, ge=1, description="segments that a clip is cut into at least")
    segment_threshold: float = Field(0.9, ge=-1, le=1, description="similarity of frames below which a segment ends")
    contextual: float = Field(0.4, ge=0, le=1, description="share of the kept tokens that are anchors")
    stride: int = Field(4, ge=1, description="one in so many frames of a segment holds its anchors")
    anchor_weight: float = Field(0.6, ge=0, le=1, description="share of an anchor that is itself, at least")
    neighbours: int = Field(4, ge=1, description="tokens that a density is taken from, the token itself included")

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        frames, places = video.grid[0], video.tokens_per_frame
        saliency = video.needed("saliency")[0].view(frames, places)
        salient, budget = fastvid_budget(places, self.retention, self.contextual)
        if salient + budget == places:
            return ReducedTokens.everything(video)
        if salient + budget == 0:
            count = fastvid_count(video.grid, self.retention)
            return ReducedTokens.pruned(video, top_indices(saliency.flatten(), count))
        chosen = top_indices(saliency, salient)
        token = torch.arange(video.num_tokens, device=saliency.device).view(frames, places)
        kept = token.gather(1, chosen).flatten()
        if budget == 0:
            return ReducedTokens.pruned(video, kept)
        free = torch.ones_like(token, dtype=torch.bool).scatter_(1, chosen, False)
        rest = token.gather(1, true_indices(free, places - salient))
        likeness = frame_similarities(video.needed("frame_features"))
        segments = segment_frames(likeness, self.segments, self.segment_threshold)
        counts = anchor_counts(segments, budget, places - salient, self.stride)
        plan = torch.stack([counts, *segment_bounds(segments)], dim=1).tolist()
        holders = [frame for frame in range(frames) if plan[frame][0]]
        values, free = video.embeddings.float(), free.flatten()
        ranked = by_density(values, rest[holders], self.neighbours)

        anchors, merged = [], []
        owner, best = torch.full_like(token.flatten(), -1), torch.zeros_like(free, dtype=torch.float32)
        for frame, order in zip(holders, ranked, strict=True):
            count, first, stop = plan[frame]
            part, anchor = slice(first * places, stop * places), order[:count].sort().values
            value, goal, share = merge_into_anchors(values[part], values[anchor], self.anchor_weight, free[part])
            owner[part] = torch.where(share > best[part], anchor[goal], owner[part])
            best[part] = torch.maximum(share, best[part])
            anchors.append(anchor)
            merged.append(value)

        source = torch.cat([kept, *anchors]).sort().values
        index = token.flatten()[: source.shape[0]]
        survivor = source.new_full((video.num_tokens + 1,), -1)  # the last is what owner -1 finds
        survivor[source] = index
        embeddings = video.embeddings.index_select(0, source)
        embeddings[survivor[torch.cat(anchors)]] = torch.cat(merged).to(embeddings.dtype)
        return ReducedTokens(embeddings, source, survivor[owner].index_copy(0, source, index))
