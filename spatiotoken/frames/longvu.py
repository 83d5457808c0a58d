"""LongVU's temporal reduction: frames like most of their window are dropped."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.frames.base import ScoredSelector
from spatiotoken.frames.scorer import Scorer
from spatiotoken.structures import FrameChoice, Frames


def longvu_similarity(patches: Tensor, window: int) -> Tensor:
    """``[T]`` float32 mean cosine of each frame of ``patches [T, P, F]`` to all of its window, itself among them.

    A frame is the vector of all its patches. Windows follow one another, the last may be shorter. Beside the patches no
    more is held than one window.
    """
    similarity = []
    for part in patches.split(window):
        vectors = part.flatten(1).float()
        scale = 1 / torch.linalg.vector_norm(vectors, dim=1).clamp(min=1e-12)
        similarity.append((vectors @ (scale @ vectors)) * scale / part.shape[0])
    return torch.cat(similarity)


def longvu_keyframes(similarity: Tensor, count: int, window: int, threshold: float) -> Tensor:
    """``[K]`` indices, rising, ``K <= count``: frames below ``threshold``, and the middle one of each window.

    Of more than ``count`` such frames, those at equal distances among them.
    """
    kept = similarity < threshold
    starts = torch.arange(0, similarity.shape[0], window, device=kept.device)
    lengths = (similarity.shape[0] - starts).clamp(max=window)
    indices = kept.index_fill(0, starts + lengths // 2, True).nonzero()[:, 0]
    found = indices.shape[0]
    if found <= count:
        return indices
    return indices[[int(found / count * place) for place in range(count)]]


class LongVU(ScoredSelector, method="longvu", paper="2410.17434"):
    """LongVU's temporal reduction: drops frames like the rest of their window, by DINOv2 (arXiv 2410.17434).

    A frame is dropped if the mean cosine of its flattened patch features to those of its window, its own cosine of 1
    included, reaches ``threshold``; the middle of each window stays. There may be fewer frames than ``num_frames``; if
    there are more, those at equal distances among them are taken, as in the authors' code, which has 400 in it.

    A video with no more frames than ``num_frames`` is left whole, so short videos call for a smaller one: the authors
    leave whole what fits into the context of their language model. A frame without features is like no other and
    stays (theirs drops it). Their model is trained; this is one of two steps that need no training, and the other one,
    spatial token compression, is a matter of ``tokens``, not built.
    """

    kind: ClassVar[str] = "question-agnostic"
    needs: ClassVar[frozenset[str]] = frozenset({"patches"})
    complexity: ClassVar[str] = "O(T P F) for P patches"
    fidelity: ClassVar[str] = "authors' vectors"

    num_frames: int = Field(400, ge=1, description="how many frames are kept at most")
    scorer: Scorer = Field(Scorer(kind="dinov2"), description="by what the parts of frames are described")
    window: int = Field(16, ge=1, description="frames that are compared with one another")
    threshold: float = Field(0.83, ge=0, le=1, description="mean cosine to its window from which on a frame is dropped")

    def select(self, frames: Frames) -> FrameChoice:
        if frames.num_frames <= self.num_frames:
            return FrameChoice.everything(frames)
        similarity = longvu_similarity(frames.needed("patches"), self.window)
        chosen = longvu_keyframes(similarity.cpu(), self.num_frames, self.window, self.threshold)
        return FrameChoice(tuple(chosen.tolist()), scores=1 - similarity)
