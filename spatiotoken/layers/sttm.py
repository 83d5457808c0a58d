"""STTM: merge like regions of a frame by a quadtree, then like regions of consecutive frames."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.layers.base import LayerReducer
from spatiotoken.layers.depth import LayerPlace, layer_index
from spatiotoken.layers.quadtree import sttm_spatial
from spatiotoken.structures import LayerReduction, LayerTokens
from spatiotoken.tokens.merging import mean_by_assignment

_PAIRS = 512
"""Pairs of nodes that are copied at once."""


def sttm_temporal(
    nodes: Tensor, source: Tensor, assignment: Tensor, frames: int, threshold: float, *, reference: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge nodes of consecutive frames that overlap and are alike, into the earliest.

    Args:
        nodes, source, assignment: as ``sttm_spatial`` returns them. Of two nodes that overlap one contains the other.
        frames: ``T``.
        threshold: cosine from which two nodes are alike.
        reference: as in the authors' code, the search for the earliest node stops at the first labels that name
            themselves, so that groups may stay apart though a pair links them. False: until linked nodes are together.

    Returns:
        the same three, with fewer nodes: the plain means of those merged.
    """
    here = torch.zeros_like(assignment, dtype=torch.bool).index_fill_(0, source, True).view(frames, -1)
    owner = assignment.view(frames, -1)
    # The upper left token of the smaller one names the pair, and no other token does so.
    meets = here[1:] | here[:-1]
    earlier, later = owner[:-1][meets], owner[1:][meets]
    linked = _pair_cosines(nodes, earlier, later) >= threshold
    earlier, later = earlier[linked], later[linked]

    ends = torch.cat([earlier, later])
    label = torch.arange(nodes.shape[0], device=nodes.device)
    while True:
        least = torch.minimum(label[earlier], label[later])
        label = label.scatter_reduce(0, ends, torch.cat([least, least]), "amin")
        label = label[label]
        if torch.equal(label, label[label]) if reference else torch.equal(label[earlier], label[later]):
            break
    kept, group = label.unique(return_inverse=True)
    return mean_by_assignment(nodes, group, kept.shape[0]), source[kept], group[assignment]


def _pair_cosines(nodes: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``[P]`` cosines of the rows ``first [P]`` and ``second [P]`` of ``nodes [M, D]``; 0 beside a zero vector."""
    length = torch.linalg.vector_norm(nodes, dim=1)
    pairs = zip(first.split(_PAIRS), second.split(_PAIRS), strict=True)
    dots = torch.cat([(nodes.index_select(0, a) * nodes.index_select(0, b)).sum(dim=1) for a, b in pairs])
    return dots / (length[first] * length[second]).clamp(min=1e-16)


def sttm_merge(
    hidden: Tensor, spatial: float, temporal: float, *, root_level: int = 1, reference: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Both merges, one after the other.

    Args:
        hidden: ``[T, H, W, D]`` visual tokens as they enter a decoder layer.
        spatial: cosine from which a region of a frame is like its parts.
        temporal: cosine from which overlapping regions of consecutive frames are alike.
        root_level, reference: see ``sttm_spatial`` and ``sttm_temporal``.

    Returns:
        ``merged [M, D]`` in the type of ``hidden``; ``source [M]``, rising, the upper left token of each survivor;
        ``assignment [T * H * W]``, the survivor that each token is part of.
    """
    parts = sttm_spatial(hidden, spatial, root_level=root_level, reference=reference)
    merged, source, assignment = sttm_temporal(*parts, hidden.shape[0], temporal, reference=reference)
    return merged.to(hidden.dtype), source, assignment


class STTM(LayerReducer, method="sttm", paper="2507.07990"):
    """Quadtree merging within frames, then merging of like regions over time, in an early layer (arXiv 2507.07990).

    Works on the ``[T, H, W, D]`` hidden states of each video as they enter decoder layer ``layer``. A region of a frame
    stays one token if its mean is like each of its four parts (cosine of at least ``spatial``); regions of consecutive
    frames that overlap merge where their cosine is at least ``temporal``. How many tokens are left is up to the video.
    The feature of a region is the plain mean of its parts, and that of regions merged over time their plain mean, so a
    survivor is a convex combination of tokens, but not their plain mean. Survivors keep the position ids of their first
    token; the authors renumber them for LLaVA. Images are grids of one frame. A threshold above 1 never merges.

    Raises:
        ValueError: a ``tokens`` method has left gaps in a frame.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hidden", "coordinates"})

    merges: ClassVar[bool] = True
    complexity: ClassVar[str] = "O(TND)"
    fidelity: ClassVar[str] = "authors' vectors"

    layer: LayerPlace = Field(2, description="decoder layer before which tokens are merged (a fraction: of the depth)")
    spatial: float = Field(0.85, ge=-1, le=1.1, description="cosine from which a region is one token")
    temporal: float = Field(0.55, ge=-1, le=1.1, description="cosine from which regions merge over time")
    root_level: int = Field(1, ge=0, description="level of the tree that it begins at, 0 being the coarsest")
    reference: bool = Field(True, description="as the authors' code does at odd borders and with chains of regions")

    def prune_layers(self, depth: int) -> tuple[int, ...]:
        return (layer_index(self.layer, depth),)

    def reduce(self, tokens: LayerTokens, memory: Any) -> LayerReduction:
        hidden, coordinates = tokens.needed("hidden"), tokens.needed("coordinates")
        everything = torch.arange(hidden.shape[0], device=hidden.device)
        survivor, values = everything.clone(), hidden.clone()
        for grid in coordinates[:, 0].unique().tolist():
            if grid < 0:
                continue
            own = everything[coordinates[:, 0] == grid]
            merged, source, assignment = sttm_merge(
                hidden[own].view(*_extent(coordinates[own]), -1),
                self.spatial,
                self.temporal,
                root_level=self.root_level,
                reference=self.reference,
            )
            values[own[source]] = merged
            survivor[own] = own[source][assignment]
        kept, assignment = survivor.unique(return_inverse=True)
        return LayerReduction(kept, values[kept], assignment)


def _extent(coordinates: Tensor) -> tuple[int, int, int]:
    """``(T, H, W)`` of the frames that are left of one grid."""
    height, width = (coordinates[:, 2:].amax(dim=0) + 1).tolist()
    frames = coordinates[:, 1].unique().shape[0]
    if frames * height * width != coordinates.shape[0]:
        raise ValueError("sttm merges whole frames: it cannot follow a `tokens` method")
    return frames, height, width
