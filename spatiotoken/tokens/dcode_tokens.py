"""D-CoDe's tokens: the longest of each frame, like ones merged."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import TokenReducer
from spatiotoken.tokens.budgets import frame_budgets, whole_share


def dcode_tokens_count(num_tokens: int, retention: float) -> int:
    """How many tokens go on to merging, which may leave fewer: the truncated share, at least one."""
    return whole_share(num_tokens, retention)


def dcode_leaders(tokens: Tensor, valid: Tensor, threshold: float, reference: bool = False) -> tuple[Tensor, Tensor]:
    """``[T, k]`` bool, the tokens that others are merged into, and ``[T, k, k]`` bool, which are alike.

    A token leads unless it is like a leader before it; by ``reference``, unless it is like any token before it.

    Args:
        tokens: ``[T, k, D]`` float32, in falling order of length.
        valid: ``[T, k]`` bool, False where a frame has fewer than ``k``.
        threshold: cosine from which on two tokens are alike. Every token is like itself.
    """
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    similar = (unit @ unit.mT >= threshold) & valid[:, None] & valid[:, :, None]
    similar.diagonal(dim1=1, dim2=2).fill_(True)
    earlier = similar.tril(-1)
    if reference:
        return valid & ~earlier.any(dim=-1), similar
    leader = valid.clone()
    # One wait for the places where there is anything to decide.
    for place in earlier.any(dim=-1).any(dim=0).nonzero()[:, 0].tolist():
        leader[:, place] &= ~(leader[:, :place] & earlier[:, place, :place]).any(dim=1)
    return leader, similar


def dcode_owners(leader: Tensor, similar: Tensor) -> Tensor:
    """``[T, k]`` the first leader that each token is like (a leader: itself), ``k`` where there is none."""
    count = leader.shape[1]
    place = torch.arange(count, device=leader.device, dtype=torch.int32)
    return torch.where(similar & leader[:, None], place, count).amin(dim=-1).long()


def _means(tokens: Tensor, weights: Tensor, member: Tensor) -> Tensor:
    """``[M, D]`` weighted mean of each cluster, frame by frame.

    Args:
        tokens: ``[T, k, D]`` float32.
        weights: ``[T, k]`` float32, above 0.
        member: ``[T, k, k]`` bool, the tokens of the cluster of each leader; none in the rows of other tokens.
    """
    total = torch.where(member, weights[:, None], 0).sum(dim=-1)
    frame, leader, token = member.nonzero(as_tuple=True)
    sizes = member.sum(dim=-1)[total > 0]
    # Adds up members only: a product with all tokens of a frame takes twice as long.
    return torch.nn.functional.embedding_bag(
        frame * tokens.shape[1] + token,
        tokens.flatten(0, 1),
        sizes.cumsum(0) - sizes,
        mode="sum",
        per_sample_weights=weights[frame, token] / total[frame, leader],
    )


class DCoDeTokens(TokenReducer, method="dcode_tokens", paper="2510.08818"):
    """Token merging of D-CoDe: the longest tokens of a frame, similar ones averaged (arXiv 2510.08818).

    Of each frame's ``[N, D]`` tokens the ``retention`` of greatest L2 norm go on; frames share ``int(retention * T *
    N)`` evenly, 288 of 576 tokens each in the authors' code. From the longest on, a token leads a cluster of all that
    have a cosine of at least ``threshold`` to it and are in none yet; the mean stands in the place of the leader, whose
    position id is kept. What does not go on is dropped. At ``threshold`` 1 none are merged, even equal ones.

    In the authors' code a cluster vanishes as a whole if its leader is like a token that is merged already: 32 of 180
    tokens in the first of their vectors. ``reference`` does the same, as published numbers have it; a token then counts
    in the mean of every leader that it is like, ``assignment`` names the longest of these, and a frame may lose all but
    one token. Their tokens are left in order of length, with new position ids. Their third kind of average, the
    maximum, is left out.
    """

    kind: ClassVar[str] = "importance and diversity"
    merges: ClassVar[bool] = True
    complexity: ClassVar[str] = "O(T k^2 D) for k tokens per frame that go on"
    fidelity: ClassVar[str] = "authors' vectors"

    retention: Retention = 0.5
    threshold: float = Field(0.8, ge=-1, le=1, description="cosine from which on two tokens of a frame are merged")
    weighted: bool = Field(False, description="weigh tokens by their length when they are averaged")
    reference: bool = Field(False, description="drop clusters that begin beside another one, as the authors do")

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        frames, places = video.grid[0], video.tokens_per_frame
        budgets = frame_budgets(dcode_tokens_count(video.num_tokens, self.retention), frames)
        most, device = max(budgets), video.embeddings.device
        length = torch.linalg.vector_norm(video.frames, dim=-1, dtype=torch.float32)
        order = length.argsort(dim=1, descending=True, stable=True)[:, :most]
        index = order + places * torch.arange(frames, device=device)[:, None]
        valid = torch.arange(most, device=device) < torch.tensor(budgets, device=device)[:, None]
        if self.threshold == 1:
            return ReducedTokens.pruned(video, index[valid].sort().values)
        tokens = video.embeddings.index_select(0, index.flatten()).float().unflatten(0, index.shape)
        leader, similar = dcode_leaders(tokens, valid, self.threshold, self.reference)
        owner = dcode_owners(leader, similar)
        member = similar if self.reference else owner[:, None] == torch.arange(most, device=device)[:, None]
        weights = length.gather(1, order).clamp(min=1e-12) if self.weighted else torch.ones_like(owner).float()
        means = _means(tokens, weights, member & leader[:, :, None])

        source, first = index[leader].sort()  # means are in order of length
        survivor = torch.full_like(index, -1).masked_scatter_(leader, first.argsort())
        # Tokens without a leader, and places beyond a frame's share, find a -1 behind the last.
        survivor = torch.nn.functional.pad(survivor, (0, 1), value=-1).gather(1, owner)
        assignment = torch.full((video.num_tokens,), -1, device=device)
        assignment[index.flatten()] = survivor.where(valid, -1).flatten()
        return ReducedTokens(means.index_select(0, first).to(video.embeddings.dtype), source, assignment)
