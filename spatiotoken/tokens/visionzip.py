"""VisionZip: dominant tokens as they are, the others merged into a few contextual ones."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.registry import Retention
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens.base import SaliencyReducer
from spatiotoken.tokens.budgets import frame_budgets, leading, places
from spatiotoken.tokens.merging import mean_by_assignment
from spatiotoken.tokens.vtc_cls import vtc_cls_count


def visionzip_count(grid: tuple[int, int, int], retention: float) -> int:
    """How many tokens are kept of a ``(T, H, W)`` grid: the truncated share, at least one."""
    return vtc_cls_count(grid, retention)


def evenly_spaced(candidates: Tensor, counts: Tensor) -> Tensor:
    """``[T, N]`` bool, True at ``counts[t]`` of the places where ``candidates [T, N]`` is.

    These are the first candidate of a frame and every s-th after it, where s is the truncated quotient of the number
    of candidates and the count.
    """
    rank = candidates.cumsum(dim=1) - 1
    step = (candidates.sum(dim=1) // counts.clamp(min=1)).clamp(min=1)[:, None]
    return candidates & (rank % step == 0) & (rank // step < counts[:, None])


def visionzip_selection(saliency: Tensor, keys: Tensor, count: int, contextual: float) -> tuple[Tensor, Tensor]:
    """The ``count`` survivors and what each of them absorbs.

    Args:
        saliency: ``[T, N]``; the most salient tokens of a frame are dominant, of equals the first.
        keys: ``[T, N, Dk]``, by whose cosine the others find their contextual token, of equals the first.
        count: how many tokens are kept of all frames together.
        contextual: share of a frame's kept tokens that are contextual.

    Returns:
        ``[count]`` flat indices, ascending, and ``[T * N]`` the survivor that each token goes to, -1 where its frame
        has no contextual token.
    """
    frames, size = saliency.shape
    budgets = frame_budgets(count, frames)
    merged = [round(budget * contextual) for budget in budgets]
    slots, budget = max(merged), torch.tensor(budgets, device=saliency.device)
    centres = torch.tensor(merged, device=saliency.device)
    dominant = leading(saliency.argsort(dim=1, descending=True, stable=True), budget - centres)
    target = evenly_spaced(~dominant, centres)
    flat = torch.arange(frames * size, device=saliency.device).view(frames, size)
    bearer = torch.where(dominant, flat, -1)
    if slots:
        place = target.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :slots]
        unit = torch.nn.functional.normalize(keys.float(), dim=-1)
        similarity = unit @ unit.gather(1, place[..., None].expand(-1, -1, keys.shape[2])).mT
        unused = torch.arange(slots, device=saliency.device) >= centres[:, None]
        nearest = similarity.masked_fill_(unused[:, None], -torch.inf).argmax(dim=2)
        nearest = torch.where(target, flat, flat.gather(1, place.gather(1, nearest)))
        bearer = torch.where(dominant | (centres == 0)[:, None], bearer, nearest)
    survivor = dominant | target
    number = survivor.flatten().cumsum(dim=0) - 1
    bearer = bearer.flatten()
    return places(survivor, count), torch.where(bearer < 0, -1, number[bearer])


class VisionZip(SaliencyReducer, method="visionzip", paper="2412.04467"):
    """Keep the most attended tokens, average the others into evenly spaced contextual ones (arXiv 2412.04467).

    An image method, applied to every frame: ``int(retention * N)`` of the ``[N, D]`` tokens of the clip are kept, the
    same number in every frame but for a remainder of less than one a frame. Of a frame's tokens the most salient stay
    as they are; of the others every s-th, so that they are ``contextual`` of those kept, absorbs the tokens whose key
    is most like its own and takes their mean, itself included.

    The authors add the mean of the absorbed tokens to the target, which doubles its length; everything else is as
    their vectors have it. They also merge before the projector, append the contextual tokens at the end, renumber
    positions, and keep the CLS token as one of their 54 dominant and 10 contextual tokens (or 108 and 20, 162 and
    30), from which the default of ``contextual`` is.
    """

    kind: ClassVar[str] = "importance and diversity"
    needs: ClassVar[frozenset[str]] = frozenset({"saliency", "keys"})
    merges: ClassVar[bool] = True
    complexity: ClassVar[str] = "O(TN KD) for K contextual tokens a frame"
    fidelity: ClassVar[str] = "authors' vectors, in part"

    retention: Retention = 0.25
    contextual: float = Field(10 / 64, ge=0, le=1, description="share of the kept tokens that others are merged into")

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        count = visionzip_count(video.grid, self.retention)
        if count == video.num_tokens:
            return ReducedTokens.everything(video)
        frames = video.grid[0]
        saliency = video.needed("saliency")[0].view(frames, -1)
        keys = video.needed("keys").unflatten(0, (frames, -1))
        source, assignment = visionzip_selection(saliency, keys, count, self.contextual)
        return ReducedTokens(mean_by_assignment(video.embeddings, assignment, count), source, assignment)
