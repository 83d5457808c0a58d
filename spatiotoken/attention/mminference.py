"""A sparse pattern per head that knows pictures from text: grid heads over permuted videos, cut at modality borders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.attention.base import Part, PrefillInputs
from spatiotoken.attention.blocks import num_blocks, per_head
from spatiotoken.attention.grid_heads import (
    Span,
    either,
    equal_candidates,
    grid_pattern,
    grid_segments,
    modality_spans,
    recovered,
    text_key_blocks,
)
from spatiotoken.attention.head_patterns import KINDS, head_pattern, seen_by
from spatiotoken.attention.kernels import SparsePattern
from spatiotoken.attention.minference import MInference


class MMInference(MInference, method="mminference", paper="2504.16083"):
    """Sparse prefill with a pattern per head, over permuted videos and cut at modality borders (arXiv 2504.16083).

    A ``grid`` head sorts the tokens of a video by their place in the frame and attends, causally in time, within blocks
    of this order: to the same place in earlier frames, a few neighbours, and all that precedes the video. Other heads
    have the patterns of ``minference``, ranked by the last queries of each video. Modality borders cut the pattern:
    text queries see everything, visual ones all earlier text and their head's share of what is visual. Without pictures
    heads are vertical-slash.

    From the paper, which has no public code: grid heads by permutation, and patterns of their own for each modality of
    the queries (Q-boundary) and pair of modalities (2D-boundary). Ours: the stride of a grid is the frame (the paper
    searches stride and phase). The sorted tokens are cut into segments of ``density`` of the video, of at least one
    place in all frames, rounded up to blocks, and put back in order of time within them, so that nothing sees what is
    later; a place that the border of two segments cuts does not see its part in the other. Tokens inside a video that
    are no part of the picture, as newlines, are no text (a row of theirs would have to be cut out of the permuted ones)
    but stand at the place of the token before. Where ``heads`` is empty, each head takes of grid, A-shape and
    vertical-slash, at about equal density, the one that recovers the most mass of the last queries of the video (theirs
    are searched offline). Waits for the device once to find the borders.

    Raises:
        ValueError: ``heads`` has another number of layers or heads than the model.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"coordinates"})
    fidelity: ClassVar[str] = "paper only"
    kinds: ClassVar[Mapping[str, tuple[str, ...]]] = {**KINDS, "grid": ()}

    density: float = Field(
        0.1, gt=0, le=1, description="share of a video that grid heads see, and all where heads is empty"
    )

    def is_dense(self, length: int, layer: int, depth: int) -> bool:
        return not self.heads and self.density == 1

    def parts(self, inputs: PrefillInputs) -> Sequence[Part]:
        spans = modality_spans(inputs.needed("coordinates").cpu())
        if any(span.frames for span in spans):
            return [(self._visual if span.frames else self._text)(inputs, span) for span in spans]
        lines = ("vertical_slash", (self.vertical, self.slash))
        heads = [lines if head[0] == "grid" else head for head in self.head_list(inputs)]
        return [Part(inputs.query, inputs.key, inputs.value, self.pattern_of(inputs, heads))]

    def _text(self, inputs: PrefillInputs, span: Span) -> Part:
        start, stop, _ = span
        count = num_blocks(stop, self.block)
        blocks = torch.ones(1, 1, count, count, dtype=torch.bool, device=inputs.query.device)
        pattern = SparsePattern(blocks, None, self.block, self.block)
        rows = torch.arange(start, stop, device=blocks.device)
        return Part(inputs.query[:, start:stop], inputs.key[:, :stop], inputs.value[:, :stop], pattern, rows)

    def _visual(self, inputs: PrefillInputs, span: Span) -> Part:
        """The queries of one video, each head's in its own order: grid heads' by segment, the others' as they are."""
        start, stop, frames = span
        places, offset = inputs.needed("coordinates")[:stop], start % self.block
        size = self.block * math.ceil(max(frames, self.density * (offset + stop - start)) / self.block)
        segment = grid_segments(places[start:], offset, size)
        query, key, value = (x[:, :stop] for x in (inputs.query, inputs.key, inputs.value))
        known = replace(inputs, query=query, key=key, value=value)
        is_grid, other = self._kinds(known, span, segment)
        pattern = either(is_grid, grid_pattern(span, size, self.block, places.device), other)

        number = torch.arange(stop, device=places.device)
        sorted_rows = torch.cat([number[:start], segment.argsort(stable=True) + start])
        order = torch.where(is_grid[:, None], sorted_rows, number)
        index = order[..., None].expand(-1, -1, query.shape[-1])
        key, value = (per_head(x, inputs.groups).gather(1, index) for x in (key, value))
        return Part(query.gather(1, index[:, start:]), key, value, pattern, order[:, start:])

    def _kinds(self, inputs: PrefillInputs, span: Span, segment: Tensor) -> tuple[Tensor, SparsePattern]:
        """Which heads are grid heads, bool ``[heads]``, and the pattern of the others; the video ends the inputs."""
        start, stop, _ = span
        places, rows = inputs.needed("coordinates")[:start], min(self.last_queries, stop - start)
        sizes = {"sink": self.sink, "local": self.local, "last_queries": rows, "block": self.block}
        text = text_key_blocks(places, stop, self.block)
        if self.heads:
            heads = self.head_list(inputs)
            # What a grid head has here is not used.
            other = head_pattern(
                inputs, [("a_shape", (1, 1)) if head[0] == "grid" else head for head in heads], **sizes
            )
            is_grid = torch.tensor([head[0] == "grid" for head in heads], device=places.device)
            return is_grid, replace(other, blocks=other.blocks | text)
        candidates = [replace(one, blocks=one.blocks | text) for one in equal_candidates(inputs, self.density, **sizes)]
        number = torch.arange(stop, device=places.device)
        latest = number[stop - rows :]
        # In the order of the prompt, grid heads see all before the video and what is in their query's segment.
        among = torch.cat([segment.new_full((start,), -1), segment])
        grid = ((number < start) | (among == among[latest, None])) & (number <= latest[:, None])
        mass = recovered(inputs, rows, [grid[None], *(seen_by(one, latest, stop) for one in candidates)])
        best = mass.argsort(dim=0, descending=True, stable=True)[0]
        return best == 0, either(best == 1, *candidates)
