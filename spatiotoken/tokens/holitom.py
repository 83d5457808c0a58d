"""HoliTom: windows found over the whole clip, whose static tokens are merged before the frames are pruned."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens import density_peaks
from spatiotoken.tokens.base import Attention, SaliencyReducer
from spatiotoken.tokens.merging import mean_by_assignment, paired_cosine, top_indices


class Window(NamedTuple):
    """Frames ``start`` to ``stop - 1``, in which ``static`` places stay the same (0 in a window of one frame)."""

    start: int
    stop: int
    static: int


def static_since(frames: Tensor, similarity: float) -> Tensor:
    """``[T, N]`` int64: since which frame a place has been static, each step's cosine being above ``similarity``."""
    moved = paired_cosine(frames[1:], frames[:-1]) <= similarity
    since = torch.arange(1, frames.shape[0], device=frames.device)[:, None] * moved
    return torch.cat([since.new_zeros(1, frames.shape[1]), since]).cummax(dim=0).values


def static_counts(since: Tensor) -> Tensor:
    """``[T, T]``: at ``[e, s]``, how many places are static in frames ``s`` to ``e`` (for ``s <= e``)."""
    counts = since.new_zeros(since.shape[0], since.shape[0])
    return counts.scatter_add_(1, since, torch.ones_like(since)).cumsum(dim=1)


def static_windows(counts: list[list[int]], max_window: int) -> list[Window]:
    """Windows over all frames that save the most if each keeps its static places once; of equals the last is short."""
    best, first = [0], []  # best[e]: tokens saved in the e first frames; first[e]: where the window of frame e starts
    for end, row in enumerate(counts):
        saved, start = best[end], end
        for candidate in range(end - 1, max(end - max_window, -1), -1):
            value = best[candidate] + row[candidate] * (end - candidate)
            if value > saved:
                saved, start = value, candidate
        best.append(saved)
        first.append(start)
    windows, stop = [], len(counts)
    while stop > 0:
        start = first[stop - 1]
        windows.append(Window(start, stop, counts[stop - 1][start] if stop - start > 1 else 0))
        stop = start
    return windows[::-1]


def holitom_budget(windows: list[Window], places: int, retention: float) -> list[tuple[int, int]]:
    """Per window, how many of its static tokens are kept, and how many dynamic ones in each of its frames.

    The ratio grows by what the static places save: ``static * share`` is rounded, ``dynamic * share`` rounded up.
    """
    total = places * windows[-1].stop
    saved = sum(window.static * (window.stop - window.start - 1) for window in windows)
    share = min(retention / ((total - saved) / total), 1)
    budget = [(round(window.static * share), math.ceil((places - window.static) * share)) for window in windows]
    # Where all is static and rounds to nothing the authors are left with no token.
    return budget if any(map(any, budget)) else [(1, 0), *budget[1:]]


def holitom_count(windows: list[Window], places: int, retention: float) -> int:
    """How many tokens are kept; see ``HoliTom`` for by how much this may exceed the share."""
    budget = holitom_budget(windows, places, retention)
    return sum(static + dynamic * (w.stop - w.start) for w, (static, dynamic) in zip(windows, budget, strict=True))


def merge_static(tokens: Tensor, count: int, neighbours: int, beta: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Density-peak clusters of ``tokens [M, D]``: ``[count, D]`` merged, ``[count]`` rising centres, ``[M]`` labels."""
    distances = density_peaks.scaled_distances(tokens)
    scores = density_peaks.density_peak_scores(distances, min(neighbours, count))
    centres = density_peaks.density_peak_centres(scores, count).sort().values
    cluster = density_peaks.assign_to_centres(distances, centres)
    if beta is None:
        return mean_by_assignment(tokens, cluster, count), centres, cluster
    kept = tokens[centres]
    mean = mean_by_assignment(tokens, cluster.index_fill(0, centres, -1), count)
    sizes = (cluster[:, None] == torch.arange(count, device=cluster.device)).sum(dim=0)[:, None]
    return torch.where(sizes > 1, beta * kept + (1 - beta) * mean, kept), centres, cluster


class HoliTom(SaliencyReducer, method="holitom", paper="2505.21334"):
    """Global windows merge what is static, then frames keep their salient tokens (arXiv 2505.21334).

    A step of a place is static if its cosine exceeds ``similarity``. Dynamic programming over the ``T`` frames finds
    the windows that save most if each of the ``N`` places that are static all through a window is kept once. Static
    tokens are averaged over their window and clustered around density peaks; a survivor stands at its centre, in the
    window's first frame, and is a convex combination of its members. Dynamic tokens ``[D]`` are kept unchanged where
    they are the most salient of their frame, else dropped. Ties go to the lowest index.

    Counts are the authors' (``holitom_count``): rounded up per frame, rounded per window, so that ``W`` windows keep
    less than ``T + W / 2`` tokens more than ``retention * T * N`` (at least one a frame that has dynamic tokens), and
    never more than the windows leave. A ``retention`` of 1 keeps all tokens, where the authors still merge windows.
    Tokens stay in place, where theirs come static ones first. Their merging inside the language model is no matter
    of this stage, and their contextual tokens (``D > 0``) fail inside windows: both are left out.
    """

    kind: ClassVar[str] = "segmentation and merging"
    merges: ClassVar[bool] = True
    complexity: ClassVar[str] = "O(TND + T^2 + W N^2 D) for W windows"
    fidelity: ClassVar[str] = "authors' vectors"

    attention: Attention = Field("received", description="whose attention in the vision tower makes a token salient")
    retention: Retention = 0.1
    similarity: float = Field(0.8, ge=-1, le=1, description="cosine above which a place stays the same")
    beta: float | None = Field(0.6, ge=0, le=1, description="weight of a centre against its members' mean; null: equal")
    neighbours: int = Field(7, ge=1, description="neighbours that a density is taken from")
    max_window: int = Field(1024, ge=1, description="most frames of a window")

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        if self.retention == 1:
            return ReducedTokens.everything(video)
        frames, places = video.frames, video.tokens_per_frame
        since = static_since(frames, self.similarity)
        windows = static_windows(static_counts(since).tolist(), self.max_window)
        index = torch.arange(video.num_tokens, device=since.device).view_as(since)
        saliency = video.needed("saliency")[0].view_as(since)
        owner = torch.full_like(index, -1).flatten()  # the token that each goes to
        sources, anchors, merged = [], index[:0, 0], frames[0, :0].float()
        for window, (statics, dynamics) in zip(windows, holitom_budget(windows, places, self.retention), strict=True):
            span = slice(window.start, window.stop)
            order = (since[window.stop - 1] <= window.start).to(torch.uint8).argsort(descending=True, stable=True)
            still, moving = order[: window.static], order[window.static :]
            chosen = index[span, moving].gather(1, top_indices(saliency[span, moving], dynamics)).flatten()
            owner[chosen] = chosen
            sources.append(chosen)
            if statics:
                tokens = frames[span, still].float().mean(dim=0)
                tokens, centres, cluster = merge_static(tokens, statics, self.neighbours, self.beta)
                sources.append(index[window.start, still[centres]])
                owner[index[span, still]] = sources[-1][cluster]
                anchors, merged = torch.cat([anchors, sources[-1]]), torch.cat([merged, tokens])
        source = torch.cat(sources).sort().values
        rank = torch.empty_like(owner).index_copy_(0, source, torch.arange(source.shape[0], device=source.device))
        embeddings = video.embeddings[source].index_copy_(0, rank[anchors], merged.to(video.embeddings.dtype))
        return ReducedTokens(embeddings, source, torch.where(owner < 0, -1, rank[owner]))
