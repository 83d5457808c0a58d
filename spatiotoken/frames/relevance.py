"""How similar frames are to a question, in the space of a model's own token embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

_SAME = 1e-5
"""Frames that differ by less than this share of their length differ by rounding only."""


def question_similarity(features: Tensor, question: Tensor) -> Tensor:
    """``[T]`` float32 in -1..1: cosine of what sets each frame apart with the mean of the question's tokens.

    Frame features of one video share most of what they are, and projected features share an offset from the words;
    either would be most of a plain cosine. So the mean over the frames is taken from them first. Where nothing is left
    (one frame, equal frames) or nothing is asked, the similarity is 0.

    Args:
        features: ``[T, D]``, such as means of projected visual tokens.
        question: ``[L, D]`` token embeddings.
    """
    # In double precision the mean of equal frames is exactly the frame.
    frames = features.double()
    words = question.to(frames).sum(dim=0) / max(1, question.shape[0])
    centred = frames - frames.sum(dim=0) / max(1, frames.shape[0])
    length = centred.norm(dim=1)
    cosine = centred @ words / (length * words.norm()).clamp(min=torch.finfo(torch.float64).tiny)
    differs = length > _SAME * frames.norm(dim=1)
    return torch.where(differs, cosine.clamp(-1, 1), 0).float()
