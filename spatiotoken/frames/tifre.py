"""TiFRe: the frames that match the question best, with the others merged into them."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.frames.base import ScoredSelector
from spatiotoken.frames.scorer import Scorer
from spatiotoken.structures import FrameChoice, Frames


def tifre_keyframes(relevance: Tensor, count: int) -> Tensor:
    """``[count]`` indices, rising, of the highest ``relevance [T]``; ties go to the earliest frame."""
    return relevance.argsort(descending=True, stable=True)[:count].sort().values


def tifre_mixing(features: Tensor, keyframes: Tensor, key_weight: float) -> Tensor:
    """``[K, T]`` float32, rows of sum 1: shares of all frames in the picture seen in the place of each keyframe.

    Every other frame goes to the keyframe of the highest cosine, of equals the first. A keyframe keeps ``key_weight``;
    the frames that go to it share the rest in proportion to their cosines. Those without a positive one have no part in
    it, and a keyframe that is left alone stays as it is.

    Args:
        features: ``[T, F]``.
        keyframes: ``[K]`` indices, rising.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    # Rounded, so that copies of a keyframe tie.
    cosine, owner = (unit @ unit[keyframes].T).float().max(dim=1)
    cosine = cosine.clamp(min=0).index_fill(0, keyframes, 0)
    place = torch.arange(keyframes.shape[0], device=keyframes.device)
    shares = cosine.where(owner == place[:, None], 0)
    total = shares.sum(dim=1, keepdim=True)
    shares = shares * ((1 - key_weight) / total.where(total > 0, 1))
    own = torch.where(total > 0, key_weight, 1.0)
    return shares.scatter(1, keyframes[:, None], own.to(shares.dtype))


class TiFRe(ScoredSelector, method="tifre", paper="2602.08861"):
    """Text-guided frames of TiFRe, with the frames left out merged into the most similar kept (arXiv 2602.08861).

    Frames are ranked by their similarity to the question; each frame that is not among the ``num_frames`` best goes to
    the keyframe whose features are the most similar, and the picture that is seen there is a weighted mean of them all
    (``FrameChoice.mixing``). A video with no more frames than ``num_frames`` is left whole.

    Built from the paper's outline; no code could be had. Its are the ranking by CLIP, the matching, and that merging is
    a weighted mean. Ours are the weights, by which the keyframe outweighs all others, and 8 frames, about the 8.6 which
    the paper has on average. Left out is the language model that rewrites the question as captions of the objects asked
    about, of which the most similar would count: the question itself is compared.
    """

    kind: ClassVar[str] = "question-aware"
    needs: ClassVar[frozenset[str]] = frozenset({"relevance", "features"})
    complexity: ClassVar[str] = "O(T K F)"
    fidelity: ClassVar[str] = "paper only"

    num_frames: int = Field(8, ge=1, description="how many frames are kept at most")
    scorer: Scorer = Field(
        Scorer(kind="clip"), description="by what frames are described, and compared with the question"
    )
    key_weight: float = Field(
        0.8, gt=0.5, le=1, description="share of a keyframe in the picture it is merged into; at 1 none is merged"
    )

    def select(self, frames: Frames) -> FrameChoice:
        if frames.num_frames <= self.num_frames:
            return FrameChoice.everything(frames)
        relevance = frames.needed("relevance").float()
        keyframes = tifre_keyframes(relevance, self.num_frames)
        mixing = None
        if self.key_weight < 1:
            features = frames.needed("features")
            mixing = tifre_mixing(features, keyframes.to(features.device), self.key_weight)
        return FrameChoice(tuple(keyframes.tolist()), mixing=mixing, scores=relevance)
