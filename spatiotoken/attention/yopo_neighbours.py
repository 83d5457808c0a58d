"""Visual tokens see only their neighbours in space and time, and in idle heads no visual ones (arXiv 2410.06169)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from spatiotoken.attention.base import BlockPattern, PrefillInputs
from spatiotoken.attention.blocks import as_columns, num_blocks
from spatiotoken.attention.kernels import SparsePattern
from spatiotoken.attention.psa import text_blocks


def numbered_places(places: Tensor) -> Tensor:
    """``[L, 3]`` int64 frame, row and column of each token of ``places [L, 4]``, frames counted on over all grids.

    What has no place stands at that of the token before; what is before all pictures is in no row.
    """
    number = torch.arange(len(places), device=places.device)
    own = places[number.where(places[:, 0] >= 0, 0).cummax(dim=0).values]
    new = torch.nn.functional.pad((own[1:, :2] != own[:-1, :2]).any(dim=1), (1, 0))
    return torch.cat([new.cumsum(dim=0)[:, None], own[:, 2:]], dim=1)


def neighbour_blocks(places: Tensor, grid: tuple[int, int, int], radius: int, frames: int, block: int) -> Tensor:
    """``[n, n]`` True at blocks of earlier keys with one at most ``radius`` rows and columns and ``frames`` frames off.

    Makes nothing of size ``L x L``: what a token sees of a row of a frame is one stretch of the prompt.

    Args:
        places: ``[L, 3]`` of ``numbered_places``; tokens lie in the order of frames, rows and columns.
        grid: how many frames, rows and columns there are.
    """
    count, (depth, height, width) = num_blocks(len(places), block), grid
    frame, row, column = places.unbind(dim=1)
    code = ((frame * height + row) * width + column).contiguous()

    def stretches() -> Iterator[tuple[Tensor, Tensor]]:
        """First and last code that each token sees, the last before the first where there is none."""
        if radius >= max(height, width) - 1:
            yield (frame - frames) * height * width, code
            return
        left, right = (column - radius).clamp(min=0), (column + radius).clamp(max=width - 1)
        rows = min(radius, height - 1)
        for back in range(min(frames, depth - 1) + 1):
            for down in range(-rows, rows + 1):
                there = (row >= 0) & (row + down >= 0) & (row + down < height) & (frame >= back)
                start = ((frame - back) * height + row + down) * width
                yield start + left, torch.where(there, start + right, -1)

    edges = torch.zeros(count, count + 1, dtype=torch.int64, device=places.device)
    first_of_row = torch.arange(len(places), device=places.device) // block * (count + 1)
    for low, high in stretches():
        first, last = torch.searchsorted(code, low), torch.searchsorted(code, high, right=True) - 1
        seen = (first <= last).long()
        edges.view(-1).scatter_add_(0, first_of_row + first // block, seen)
        edges.view(-1).scatter_add_(0, first_of_row + last.clamp(min=0) // block + 1, -seen)
    return (edges.cumsum(dim=1)[:, :count] > 0).tril()


class YOPONeighbours(BlockPattern, method="yopo_neighbours", paper="2410.06169"):
    """Sparse prefill in which visual tokens see only their neighbours in space and time (arXiv 2410.06169).

    A visual token sees the visual ones at most ``radius`` rows and as many columns from it, rounded up to blocks, and
    all text before it; text sees everything. In ``inactive_heads`` visual tokens see no visual ones but those in their
    own block. Another part of the paper, doing without visual tokens in the last layers, is the method ``yopo`` of the
    stage ``layers``.

    The paper has one picture. For videos (ours): neighbours are in the same frame and in the ``frames`` before it.
    Frames are counted on over all pictures of a prompt, so that a ``radius`` and ``frames`` that cover everything are
    dense attention. Tokens inside a video that are no part of the picture, as newlines and time stamps, are seen by
    all, and themselves see what the token before them sees. Blocks with text outside of pictures are text altogether.

    The public code is a simulation for pictures of 24 x 24. There neighbours see each other both ways, even those that
    come later; here attention stays causal. There idle heads (found offline, by how little of their attention is on
    visual tokens; masks are there for LLaVA-1.5 only, so none are given here by default) give the words nothing of the
    pictures either, and visual tokens nothing at all; here only their visual part is left out, as far as blocks allow.
    Its radius is in the settings of each of its models, which are tuned on with it: the default is ours. Waits for the
    device once per layer.

    Raises:
        ValueError: ``inactive_heads`` has another number of layers than the model, or heads that it has not.
    """

    kind: ClassVar[str] = "static"
    complexity: ClassVar[str] = "O(L r t log L) for r rows, t frames"
    fidelity: ClassVar[str] = "paper only"
    needs: ClassVar[frozenset[str]] = frozenset({"coordinates"})

    radius: int = Field(3, ge=0, description="rows and columns, in tokens, to the farthest visual token that is seen")
    frames: int = Field(1, ge=0, description="earlier frames in which neighbours are seen")
    inactive_heads: tuple[tuple[int, ...], ...] = Field(
        (), description="per layer the query heads in which visual tokens see no other blocks of them; empty: none"
    )
    block: int = Field(64, ge=1, description="tokens of a block of queries or keys")

    @field_validator("inactive_heads")
    @classmethod
    def _numbers(cls, heads: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        if any(head < 0 for layer in heads for head in layer):
            raise ValueError("inactive_heads counts heads from 0")
        return heads

    def is_dense(self, length: int, layer: int, depth: int) -> bool:
        return length <= self.block

    def idle(self, inputs: PrefillInputs) -> tuple[int, ...]:
        """The inactive heads of this layer."""
        if not self.inactive_heads:
            return ()
        if len(self.inactive_heads) != inputs.depth:
            given = len(self.inactive_heads)
            raise ValueError(f"inactive_heads describes {given} layers, the model has {inputs.depth}")
        heads, count = self.inactive_heads[inputs.layer], inputs.query.shape[0]
        if heads and max(heads) >= count:
            raise ValueError(f"inactive_heads names head {max(heads)} at layer {inputs.layer}, the model has {count}")
        return heads

    def pattern(self, inputs: PrefillInputs) -> SparsePattern:
        coordinates, idle = inputs.needed("coordinates"), self.idle(inputs)
        places, text = numbered_places(coordinates), text_blocks(coordinates, self.block)
        number = torch.arange(inputs.length, device=places.device) // self.block
        inside = (coordinates[:, 0] < 0) & ~text[number]
        sizes = (places.amax(dim=0) + 1).clamp(min=1)
        depth, height, width, stripes = torch.cat([sizes, inside.sum()[None]]).tolist()

        least = text | text[:, None] | torch.eye(len(text), dtype=torch.bool, device=text.device)
        near = neighbour_blocks(places, (depth, height, width), self.radius, self.frames, self.block)
        blocks = (least | near).tril()[None]
        if idle:
            active = torch.ones(inputs.query.shape[0], dtype=torch.bool, device=text.device)
            active[list(idle)] = False
            blocks = torch.where(active[:, None, None], blocks, least.tril())
        columns = as_columns(inside[None], stripes).expand(len(blocks), -1)[None] if stripes else None
        return SparsePattern(blocks[None], columns, self.block, self.block)
