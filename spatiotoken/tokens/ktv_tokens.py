"""KTV's key tokens: attended, unlike the rest of their frame, and more of them in frames that match the question."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import SaliencyReducer
from spatiotoken.tokens.budgets import apportion, first_picks, ranks, whole_share
from spatiotoken.tokens.merging import question_direction

Weight = Annotated[float, Field(gt=0)]


def ktv_tokens_count(num_tokens: int, retention: float) -> int:
    """How many tokens are kept: the truncated share, at least one."""
    return whole_share(num_tokens, retention)


def ktv_tokens_scores(features: Tensor, saliency: Tensor, rate: float) -> Tensor:
    """``[T, N]``: ``rate`` times the saliency plus the rest times the unlikeness, each over [0, 1] within its frame.

    Args:
        features: ``[T, N, D]``, whose summed cosines to the rest of the frame say how redundant a token is.
        saliency: ``[T, N]`` on any scale.
    """
    values = features.float()
    scale = 1 / torch.linalg.vector_norm(values, dim=-1).clamp(min=1e-12)
    # The sum of a token's cosines is its product with the sum of all unit tokens: no N x N matrix is needed. Its cosine
    # to itself, 1 unless it is zero, is not redundancy.
    total = scale[:, None] @ values
    redundancy = (values @ total.transpose(1, 2))[:, :, 0] * scale - (scale < 1e12).float()
    return rate * _stretched(saliency.float()) + (1 - rate) * (1 - _stretched(redundancy))


def ktv_tokens_quotas(count: int, relevance: Tensor, places: int, shares: tuple[float, float, float]) -> Tensor:
    """``[T]`` how many of its ``places`` tokens each frame keeps, ``count`` together.

    Args:
        relevance: ``[T]`` of the frames to the question.
        shares: weights of the most relevant sixth of the frames (rounded up), of those between, and of the least
            relevant sixth (rounded down).
    """
    frames = relevance.shape[0]
    most, least = -(-frames // 6), frames // 6
    weights = [shares[0]] * most + [shares[1]] * (frames - most - least) + [shares[2]] * least
    return apportion(count, torch.tensor(weights, device=relevance.device), places)[ranks(relevance)]


def _stretched(values: Tensor) -> Tensor:
    """Rows over [0, 1] by their extremes; zeros where these differ by no more than rounding."""
    low, high = values.aminmax(dim=-1, keepdim=True)
    spread = high - low
    return (values - low) / spread.where(spread > 1e-5 * torch.maximum(high, -low), torch.inf)


class KTVTokens(SaliencyReducer, method="ktv_tokens", paper="2602.03615"):
    """Key tokens of KTV: salient and not redundant in their frame, more in relevant frames (arXiv 2602.03615).

    Keeps ``int(retention * N)`` of the ``[N, D]`` tokens, unchanged, with their positions. A token's score is ``rate *
    saliency + (1 - rate) * (1 - redundancy)``, both over [0, 1] within its frame, redundancy being the summed cosine
    of its features before the projector to the others of its frame. Frames are ranked by the cosine of their mean
    embedding to the mean of ``question``; ``shares`` weigh the quotas of the first sixth, the middle and the last
    sixth; equal shares give all frames the same.

    The authors' quotas for six or twelve frames of 576 tokens are such shares: (4, 2, 1) of 936 or 1872 tokens, (2, 1,
    1) of 504. Their frames are ranked by CLIP's text tower, and the saliency is the CLS token's dot product in the last
    layer, where a softmax was commented out; here it is attention. Their vectors, which begin with that dot product,
    are reproduced from it. The choice of keyframes is the other half of their method and a matter of ``frames``.
    """

    kind: ClassVar[str] = "importance and diversity"
    needs: ClassVar[frozenset[str]] = frozenset({"saliency", "hidden", "question"})
    complexity: ClassVar[str] = "O(TND)"
    fidelity: ClassVar[str] = "authors' vectors, in part"

    retention: Retention = 0.146
    rate: float = Field(0.2, ge=0, le=1, description="weight of the saliency against redundancy")
    shares: tuple[Weight, Weight, Weight] = Field(
        (2.0, 1.0, 1.0), description="weights of the most relevant sixth of the frames, the middle, the last sixth"
    )

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        count, shape = ktv_tokens_count(video.num_tokens, self.retention), (video.grid[0], video.tokens_per_frame)
        if count == video.num_tokens:
            return ReducedTokens.everything(video)
        mean = torch.nn.functional.normalize(video.frames.float().mean(dim=1), dim=-1)
        relevance = mean @ question_direction(video.needed("question"))
        quotas = ktv_tokens_quotas(count, relevance, shape[1], self.shares)
        hidden, saliency = video.needed("hidden").unflatten(0, shape), video.needed("saliency")[-1].view(shape)
        order = ktv_tokens_scores(hidden, saliency, self.rate).argsort(dim=1, descending=True, stable=True)
        return ReducedTokens.pruned(video, first_picks(order, quotas, shape[1], count))
