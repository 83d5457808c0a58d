"""D-CoDe's frames: most at equal distances, then what is least like these."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.frames.base import ScoredSelector
from spatiotoken.frames.scorer import Scorer
from spatiotoken.structures import FrameChoice, Frames


def dcode_uniform(num_frames: int, count: int) -> list[int]:
    """``count`` indices, rising, at equal distances from the first frame to the last; one alone is the first.

    Args:
        num_frames: no fewer than ``count``.
    """
    step = (num_frames - 1) / max(1, count - 1)
    inner = [int(place * step) for place in range(count - 1)]  # truncated in floating point, as numpy's linspace is
    return inner + [num_frames - 1 if count > 1 else 0] * min(count, 1)


def dcode_keyframes(features: Tensor, count: int, uniform_ratio: float) -> Tensor:
    """``[count]`` indices, rising, the truncated ``uniform_ratio`` of them at equal distances.

    Each further one is the frame with the lowest mean cosine to all chosen so far, of equals the earliest.

    Args:
        features: ``[T, F]`` with ``T >= count``.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    chosen = torch.tensor(dcode_uniform(unit.shape[0], int(count * uniform_ratio)), dtype=torch.int64)
    chosen = chosen.to(unit.device)
    likeness = (unit @ unit[chosen].sum(dim=0)).index_fill(0, chosen, torch.inf)
    picks = [chosen]
    for _ in range(count - chosen.shape[0]):
        # Rounded, so that copies of a frame tie.
        picks.append(likeness.float().argmin(0, keepdim=True))
        likeness = (likeness + unit @ unit.index_select(0, picks[-1])[0]).index_fill(0, picks[-1], torch.inf)
    return torch.cat(picks).sort().values


class DCoDe(ScoredSelector, method="dcode", paper="2510.08818"):
    """Representative frames of D-CoDe: most at equal distances, then the least similar ones (arXiv 2510.08818).

    ``int(uniform_ratio * num_frames)`` frames at equal distances, the first and the last among them. The others are
    chosen one by one: the frame whose CLIP features have the lowest mean cosine to all that were chosen before. A video
    with no more frames than ``num_frames`` is left whole; the authors choose 15 of 50. Where all that is left is alike,
    they may choose a frame twice; this does not.

    The question has no part in this. Their tokens are a stage of their own, ``dcode_tokens``, and their questions to a
    language model, which break the question up, are left out.
    """

    kind: ClassVar[str] = "question-agnostic"
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    complexity: ClassVar[str] = "O(T K F)"
    fidelity: ClassVar[str] = "authors' vectors"

    num_frames: int = Field(15, ge=1, description="how many frames are kept at most")
    scorer: Scorer = Field(Scorer(kind="clip"), description="by what frames are described")
    uniform_ratio: float = Field(0.85, ge=0, le=1, description="share of the kept frames that is at equal distances")

    def select(self, frames: Frames) -> FrameChoice:
        if frames.num_frames <= self.num_frames:
            return FrameChoice.everything(frames)
        chosen = dcode_keyframes(frames.needed("features"), self.num_frames, self.uniform_ratio)
        return FrameChoice(tuple(chosen.tolist()))
