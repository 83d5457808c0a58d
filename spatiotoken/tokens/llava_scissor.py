"""LLaVA-Scissor: semantic connected components, within frames and then over the clip."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import TokenReducer
from spatiotoken.tokens.components import best_in_group, connected_components, nearest_from
from spatiotoken.tokens.merging import mean_by_assignment


def semantic_components(features: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Components of tokens that are linked by cosines above ``threshold``.

    A component stands where its most connected token is, of equals the first; components are in that order.

    Args:
        features: ``[B, n, D]``, each ``B`` by itself.

    Returns:
        ``[C]`` indices of these tokens in the ``B * n``, rising, and ``[B, n]`` the component of each token.
    """
    roots, degree = connected_components(features, threshold)
    heads = best_in_group(degree, roots, roots.shape[1]).gather(1, roots)
    index = torch.arange(roots.shape[1], device=roots.device)
    standing = (heads == index).flatten()
    offset = roots.shape[1] * torch.arange(roots.shape[0], device=roots.device)[:, None]
    return standing.nonzero()[:, 0], (standing.cumsum(0) - 1)[heads + offset]


def scissor_merge(frames: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Components of components, and every token averaged into the most similar of them.

    Args:
        frames: ``[T, N, D]``.

    Returns:
        ``[M, D]`` float32 survivors, ``[M]`` the token in whose place each stands, rising, and ``[T * N]`` the survivor
        that each token was averaged into.
    """
    tokens = frames.flatten(0, 1).float()
    standing, part = semantic_components(frames, threshold)
    representatives = mean_by_assignment(tokens, part.flatten(), standing.shape[0])
    again, component = semantic_components(representatives[None], threshold)
    count = again.shape[0]
    survivors = mean_by_assignment(representatives, component[0], count)
    owner = nearest_from(tokens, survivors, component[0][part.flatten()])
    joined = survivors.new_zeros(count, 1).index_add_(0, owner, survivors.new_ones(owner.shape[0], 1))
    values = survivors.lerp(mean_by_assignment(tokens, owner, count), joined / (joined + 1))
    return values, standing[again], owner


class LLaVAScissor(TokenReducer, method="llava_scissor", paper="2506.21862"):
    """Merges connected components of similar tokens, in each frame and then over the clip (arXiv 2506.21862).

    Tokens ``[D]`` of a frame whose cosine is above ``threshold`` are linked, and each component is averaged; the means
    of all frames are linked and averaged likewise. Then every token joins the most similar result, which becomes the
    mean of itself and of these. It stands in the place of its most connected token's most connected token, so that
    survivors come in the authors' order; they keep position ids, where theirs are renumbered. ``assignment`` tells
    which survivor a token joined at the end, except that a survivor's own place counts as its own; the survivor is a
    convex combination of these tokens and of the others of its component.

    Components are exact. The authors sample nodes of graphs of more than ``ln(n) / 0.05^2`` (some 3,300) and their
    union-find loses nodes; where neither happens, results agree. ``threshold`` 1 keeps all tokens, even equal ones.
    """

    kind: ClassVar[str] = "segmentation and merging"
    merges: ClassVar[bool] = True
    complexity: ClassVar[str] = "O((T N^2 + R^2 + TN M) D) for R components of frames, M of the clip"
    fidelity: ClassVar[str] = "authors' vectors"

    threshold: float = Field(0.9, ge=-1, le=1, description="cosine above which two tokens are linked")

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        if self.threshold == 1:
            return ReducedTokens.everything(video)
        values, source, owner = scissor_merge(video.frames, self.threshold)
        owner = owner.index_copy(0, source, torch.arange(source.shape[0], device=source.device))
        return ReducedTokens(values.to(video.embeddings.dtype), source, owner)
