"""STA: patches go whose like was there in earlier frames and that are little activated."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.tokens.budgets import whole_share
from spatiotoken.tokens.merging import top_mask
from spatiotoken.vision.base import TowerMerge, TowerReducer, TowerShape, TowerTokens
from spatiotoken.vision.pairs import mean_keys
from spatiotoken.vision.pruning import PAIRS, DepthShare, nearest_layers, pruned


def sta_count(patches: int, retention: float, step: int, steps: int) -> int:
    """How many of a frame's ``patches`` are left after ``step + 1`` of ``steps``.

    Each takes half of what the one before took; after the last ``int(retention * patches)``, at least one, are left.
    """
    going = patches - whole_share(patches, retention)
    return patches - going * (2**steps - 2 ** (steps - 1 - step)) // (2**steps - 1)


def dullness(hidden: Tensor) -> Tensor:
    """``[T, n]`` float32: 0 at a frame's most activated patch of ``hidden [T, n, D]``, 1 at the least activated one."""
    active = hidden.float().abs().sum(dim=-1)
    most, least = active.amax(dim=1, keepdim=True), active.amin(dim=1, keepdim=True)
    return (most - active) / (most - least).clamp(min=1e-12)


def first_frame(unit: Tensor, count: int) -> Tensor:
    """``[n]`` bool with ``count`` True: of ``unit [n, d]``, even patches go first, those most like an odd one ahead.

    If all even ones are gone, the last odd ones go.
    """
    places = unit.shape[0]
    # Cosines reach down to -1, so every odd patch is behind every even one.
    order = torch.arange(places, device=unit.device) / places - 3.0
    if places > 1:
        order[::2] = (unit[::2] @ unit[1::2].mT).amax(dim=1)
    return ~top_mask(order, places - count)


def accumulated(unit: Tensor, dull: Tensor, count: int) -> Tensor:
    """``[T, n]`` bool with ``count`` True in each frame: what STA keeps.

    Args:
        unit: ``[T, n, d]`` float32 unit keys, in the order in which frames are gone through.
        dull: ``[T, n]`` as ``dullness`` gives it.
    """
    frames, places = dull.shape
    kept = [first_frame(unit[0], count)]
    score = torch.ones_like(dull[0])
    step = max(1, PAIRS // places**2)
    for start in range(1, frames, step):
        some = slice(start, min(start + step, frames))
        # Each patch hands its score on to the next frame's patches, the more the more alike they are.
        handed = (unit[some] @ unit[some.start - 1 : some.stop - 1].mT).softmax(dim=1)
        for share, own in zip(handed, dull[some], strict=True):
            score = share @ score
            kept.append(top_mask(score * own, count, largest=False))
            score = torch.where(kept[-1], score, 0.0)
            score = score / score.sum()
    return torch.stack(kept)


class STA(TowerReducer, method="sta", paper="2308.04549"):
    """Leaves out patches that repeat earlier frames and matter little (arXiv 2308.04549).

    Frames of ``[n, D]`` patches are gone through in order. Each patch hands its score on to those of the next frame, in
    the shares of a softmax over the cosines of their keys (mean over heads); what a patch gets, times how little it is
    activated (the sum of ``|hidden|``, scaled to 0 and 1 within the frame), ranks it, and the highest go. The others
    hand on what they got, scaled to a sum of 1. Of the first frame those go that are most like another one of it. This
    is done in the first layer and after each third of the tower, backwards in time at the second place, and each time
    half as many go as before, so that of a frame's ``N`` patches ``int(retention * N)``, at least one, are left at the
    end. The most similar patch of its frame that is left, by key, stands for each that goes. A picture, a video of one
    frame, loses what repeats within it. The default is what the authors leave of 196 patches with ``r`` of 64.

    Follows the released code. There frames of a video attend to one another; pairs, then fours of frames are joined at
    the later places, each of which takes ``r`` of every group. Ours are encoded one by one, so each keeps a budget of
    its own, of which each place takes the same share (4, 2 and 1 of 7). Patches go between attention and MLP, not
    behind the MLP, and activation is read there. Where it is the same everywhere, it counts as the most; theirs divides
    by zero. Keys are those that attend, with rotary positions where the tower has them.
    """

    kind: ClassVar[str] = "pruning"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    complexity: ClassVar[str] = "O(TN^2 D) per layer"
    fidelity: ClassVar[str] = "authors' code, by an independent rewrite"

    retention: Retention = 0.43
    at: tuple[DepthShare, ...] = Field(
        (0.0, 0.33, 0.67), min_length=1, description="shares of the depth at which patches go"
    )

    def layers(self, tower: TowerShape) -> tuple[int, ...]:
        return () if self.retention == 1 else nearest_layers(self.at, range(tower.depth), tower.depth)

    def reduce(self, tokens: TowerTokens) -> TowerMerge | None:
        acting, frames = self.layers(tokens.tower), len(tokens.counts)
        step = acting.index(tokens.layer)
        count = sta_count(tokens.grid[1] * tokens.grid[2], self.retention, step, len(acting))
        if count == tokens.counts[0]:
            return None
        keys, dull = mean_keys(tokens), dullness(tokens.hidden.unflatten(0, (frames, -1)))
        order = torch.arange(frames, device=keys.device)
        if step % 2:
            order = order.flip(0)
        kept = accumulated(torch.nn.functional.normalize(keys, dim=-1)[order], dull[order], count)[order]
        return pruned(tokens, keys, kept, (count,) * frames)
