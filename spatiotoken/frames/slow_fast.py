"""Full size where the picture changes, a smaller one where it does not."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from spatiotoken.frames.base import ScoredSelector
from spatiotoken.frames.fps import evenly_spaced
from spatiotoken.structures import FrameChoice, Frames


def slow_frames(patches: Tensor, threshold: float, patch_similarity: float) -> Tensor:
    """``[T]`` bool: the first frame, and each that is less similar than ``threshold`` to the last of these.

    Args:
        patches: ``[T, P, F]``.
        patch_similarity: two patches are alike if their cosine is larger; frames are as similar as their share of alike
            patches, of those that are not zero in both.
    """
    empty = ~patches.any(dim=2)
    units = normalize(patches.float(), dim=2)
    reference, reference_empty = units[0], empty[0]
    slow = [torch.ones_like(empty[0, 0])]
    # Nothing here waits for the device, however many frames there are.
    for unit, blank in zip(units[1:], empty[1:], strict=True):
        shown = ~(blank & reference_empty)
        alike = ((unit * reference).sum(dim=1) > patch_similarity) & shown
        changed = alike.sum() < threshold * shown.sum()
        reference = torch.where(changed, unit, reference)
        reference_empty = torch.where(changed, blank, reference_empty)
        slow.append(changed)
    return torch.stack(slow)


def hsv(rgb: Tensor) -> Tensor:
    """Colours ``[..., 3]`` in 0..1 as hue in 0..180, saturation and value in 0..255, the ranges of 8-bit images."""
    value, lead = rgb.max(dim=-1)
    spread = value - rgb.min(dim=-1).values
    red, green, blue = rgb.unbind(dim=-1)
    sides = torch.stack([green - blue, blue - red, red - green], dim=-1).gather(-1, lead[..., None])[..., 0]
    hue = (2 * lead + sides / spread.clamp(min=1e-8)) % 6 * (spread > 0)
    return torch.stack([30 * hue, 255 * spread / value.clamp(min=1e-8), 255 * value], dim=-1)


class SlowFast(ScoredSelector, method="slow_fast", paper="2509.01563"):
    """Slow and fast frames of Keye-VL 1.5: full size where the picture changes, else smaller (arXiv 2509.01563).

    The first frame is slow, and each that has less than ``threshold`` of its patches in common with the last slow one;
    the others are fast and get ``fast_share`` of a slow frame's tokens: both sides are its square root as long. More
    than ``num_frames`` frames are first thinned to equal distances, with the first and the last. The model was trained
    for this; only the rule is built here.

    ``threshold`` is the paper's; the released code has 0.9. As there, ``pixels`` are compared by hue, saturation and
    value, but by the average colours of 16 x 16 patches and not by all pixels (of at most 256 patches of the frame's
    own shape); patches of other scorers are compared as they are. ``full_frames`` is the authors' budget of tokens for
    the whole video in units of full frames: where it is exceeded, all frames shrink alike. They find the size by
    bisection, since no frame has less than 48 tokens there; without that bound it is a quotient.
    """

    kind: ClassVar[str] = "several sizes"
    needs: ClassVar[frozenset[str]] = frozenset({"patches"})
    complexity: ClassVar[str] = "O(K F)"
    fidelity: ClassVar[str] = "paper only"

    num_frames: int = Field(64, ge=1, description="how many frames are kept at most")
    threshold: float = Field(0.95, ge=0.0, le=1.0, description="share of alike patches below which a frame is slow")
    patch_similarity: float = Field(0.7, ge=-1.0, le=1.0, description="cosine above which two patches are alike")
    fast_share: float = Field(0.3, gt=0.0, le=1.0, description="tokens of a fast frame, as a share of a slow one's")
    full_frames: float | None = Field(
        None, gt=0.0, le=1e6, description="full-size frames that all frames together may be worth; null for no limit"
    )

    def select(self, frames: Frames) -> FrameChoice:
        chosen = evenly_spaced(frames.num_frames, self.num_frames)
        patches = frames.needed("patches")
        if len(chosen) < frames.num_frames:
            patches = patches[chosen]
        if self.scorer.kind == "pixels":
            patches = hsv(patches)
        slow = slow_frames(patches, self.threshold, self.patch_similarity).tolist()
        worth = sum(1.0 if full else self.fast_share for full in slow)
        size = 1.0 if self.full_frames is None else min(1.0, self.full_frames / worth)
        scales = tuple(math.sqrt(size * (1.0 if full else self.fast_share)) for full in slow)
        return FrameChoice(tuple(chosen), scales=None if min(scales) == 1.0 else scales)
