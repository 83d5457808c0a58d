"""Patches that do not change never enter the tower."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.tokens.merging import top_mask, true_indices
from spatiotoken.vision.base import TowerMerge, TowerReducer, TowerShape, TowerTokens


def changed_patches(pixels: Tensor, threshold: float) -> Tensor:
    """``[T, P]`` bool: which patches differ from the latest one at their place that was kept. The first frame's all do.

    Args:
        pixels: ``[T, P, F]`` colours in 0..1.
        threshold: mean absolute difference up to which a patch is as before. NaN always differs.
    """
    changed = torch.ones(pixels.shape[:2], dtype=torch.bool, device=pixels.device)
    reference = pixels[0]
    # Not frame against frame, or what changes slowly would never be seen.
    for frame, mask in zip(pixels[1:], changed[1:], strict=True):
        mask.copy_(~((frame - reference).abs().mean(dim=-1) <= threshold))
        reference = torch.where(mask[:, None], frame, reference)
    return changed


def static_count(frames: int, patches: int, retention: float) -> int:
    """Patches that a budget leaves of ``frames`` of ``patches`` each: never less than the first frame."""
    return max(patches, int(frames * patches * retention + 1e-6))


def most_changed(pixels: Tensor, count: int) -> Tensor:
    """``[T, P]`` bool with ``count`` True: the first frame, and the patches that differ most from the frame before.

    What is not a number differs most.

    Args:
        pixels: ``[T, P, F]``.
        count: at least ``P``.
    """
    change = (pixels[1:] - pixels[:-1]).abs().mean(dim=-1).nan_to_num(torch.inf)
    later = top_mask(change.flatten(), count - pixels.shape[1]).view(change.shape)
    return torch.cat([later.new_ones(1, pixels.shape[1]), later])


def latest_kept(kept: Tensor) -> Tensor:
    """``[T, P]`` int64: the latest frame up to each in which the patch at that place was ``kept``."""
    frames = torch.arange(kept.shape[0], device=kept.device)[:, None]
    return torch.where(kept, frames, 0).cummax(dim=0).values


class StaticPatches(TowerReducer, method="static_patches", paper="2411.05222"):
    """Patches unchanged since the latest kept one at their place do not enter the tower (after arXiv 2411.05222).

    They are told by their pixels, before the first layer, and get at the end what the tower made of the patch that they
    repeat. This is how run-length tokenization (arXiv 2411.05222) and the gate of gated residual tokenization (arXiv
    2509.14199) find them; EVS does it behind the tower. These were trained with what is left; here the towers are as
    they are, and what differs is:

    * Patches that are left attend to their whole frame (``context: frame``), with the keys and values of the repeated
      patches, so that a few moving patches are not seen without their surroundings. ``context: kept`` is what the
      authors do, among themselves; it saves more attention and costs much accuracy where little moves.
    * A patch is compared with the one that it would repeat, not with that of the frame before, so a slow change is seen
      when it has become large enough. With ``retention`` it is that of the frame before, as EVS ranks.

    In the Qwen-VL families a patch is one of a temporal unit, of several frames. Images are left alone.
    """

    kind = "before the tower"
    needs = frozenset({"pixels"})
    complexity = "O(T N F) for F values of a patch"
    fidelity = "brute force"
    before_layer = True

    threshold: float = Field(
        0.03, ge=0.0, le=1.0, description="mean absolute difference of colours, of 1, up to which a patch is as before"
    )
    retention: Retention | None = Field(
        None, description="share of the patches that enters the tower, the most changed, instead of a threshold"
    )
    context: Literal["frame", "kept"] = Field("frame", description="what patches attend to: their frame, or those kept")

    @property
    def whole_context(self) -> bool:
        return self.context == "frame"

    def layers(self, tower: TowerShape) -> tuple[int, ...]:
        return () if self.retention == 1.0 else (0,)

    def reduce(self, tokens: TowerTokens) -> TowerMerge | None:
        """What is left of a video; the host waits for the device once or twice, to learn how much that is."""
        frames, height, width = tokens.grid
        if frames == 1:
            return None
        pixels = tokens.needed("pixels").unflatten(0, (frames, height * width))
        if self.retention is None:
            kept = changed_patches(pixels, self.threshold)
        else:
            kept = most_changed(pixels, static_count(frames, height * width, self.retention))
        places = torch.arange(height * width, device=kept.device)
        owners = latest_kept(kept) * (height * width) + places
        rank = kept.flatten().cumsum(0) - 1
        return TowerMerge(true_indices(kept.flatten(), int(kept.sum())), rank[owners.flatten()])
