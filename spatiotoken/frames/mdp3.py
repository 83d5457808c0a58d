"""Keyframes that fit the question and differ from each other, segment by segment."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import normalize

from spatiotoken.frames.base import ScoredSelector
from spatiotoken.frames.determinantal import greedy_determinant
from spatiotoken.frames.scorer import Scorer
from spatiotoken.structures import FrameChoice, Frames

_WHOLE = 512  # frames of a segment whose kernel is computed at once; of longer ones only the columns that are asked for


def kernel(cosines: Tensor, scales: tuple[float, ...]) -> Tensor:
    """Mean of the Gaussian kernels ``exp(-distance^2 / (2 scale))`` of unit vectors with those cosines."""
    # Their squared distance is twice what the cosine lacks to one.
    lacking = (1 - cosines).clamp(min=0)
    return torch.stack([(lacking / -scale).exp() for scale in scales]).mean(dim=0)


def mdp3_keyframes(
    features: Tensor, quality: Tensor, count: int, segment: int | None, scales: tuple[float, ...]
) -> list[int]:
    """Indices of ``count`` frames, rising.

    Args:
        features: ``[T, F]`` with ``T > count``.
        quality: ``[T]`` what each frame alone adds to the logarithm of a set's probability.
        segment: frames of a segment, the last one may be shorter; None for one segment.
    """
    units, quality = normalize(features.double().cpu(), dim=1), quality.double().cpu()
    # For each number of frames chosen so far: the best logarithm, and the last of these frames (-1 if there is none).
    value, last = torch.zeros(1, dtype=torch.float64), torch.tensor([-1])
    steps = []
    for begin in range(0, len(units), segment or len(units)):
        part = units[begin : begin + (segment or len(units))]
        most, reach = min(len(part), count), min(begin + len(part), count)
        conditions, which = last.unique(return_inverse=True)
        given = kernel(units[conditions] @ part.T, scales) * (conditions >= 0)[:, None]
        order, gains = _greedy(part, quality[begin : begin + len(part)], most, given[:, None], scales)
        order = order[which]
        gained = torch.cat([value[:, None], gains.cumsum(dim=1)[which] + value[:, None]], dim=1)
        latest = torch.cat([last[:, None], begin + order.cummax(dim=1).values], dim=1)
        # Rows are frames chosen before, columns those chosen by now: how many are chosen here.
        here = torch.arange(reach + 1) - torch.arange(len(value))[:, None]
        offers = gained.gather(1, here.clamp(0, most)).masked_fill_((here < 0) | (here > most), -torch.inf)
        value, before = offers.max(dim=0)
        last = latest[before, here[before, torch.arange(reach + 1)]]
        steps.append((begin, order, before))
    chosen: list[int] = []
    left = count
    for begin, order, before in reversed(steps):
        earlier = int(before[left])
        chosen += [begin + item for item in order[earlier, : left - earlier].tolist()]
        left = earlier
    return sorted(chosen)


def _greedy(
    part: Tensor, quality: Tensor, count: int, given: Tensor, scales: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    def column(index: Tensor) -> Tensor:
        return kernel(part[index] @ part.T, scales)

    ones = given.new_ones(len(given), len(part))
    if len(part) > _WHOLE:
        return greedy_determinant(column, ones, count, quality, given)
    whole = column(torch.arange(len(part)))
    return greedy_determinant(whole.__getitem__, ones, count, quality, given)


class MDP3(ScoredSelector, method="mdp3", paper="2501.02885"):
    """Keyframes relevant to the question and diverse, by determinants, segment by segment (arXiv 2501.02885).

    A set of frames is the better the larger ``2 / weight * sum(log r) + log det S`` is: ``r`` compares frames with the
    question and ``S`` with each other, both by the mean of Gaussian kernels on unit vectors (so ``relevance`` must be a
    cosine). Each ``segment`` is searched greedily, given the last frame chosen before it, and a dynamic program finds
    how many frames each is worth. ``num_frames`` are kept, no fewer.

    Settings are the paper's, but for ``scales``, which are the released code's; the paper has 1/8, 1/4, 1, 2 and 4.
    That code has a single segment unless told otherwise, and then chooses the same frames. With several it fails where
    the last is shorter, and counts the frame that a segment is conditioned on once more for each segment that frames
    are taken from, but not where none are; here a segment's frames are valued given that frame, as in the paper's
    formula without its normaliser (which the code leaves out too). Questions longer than the text tower reads are coded
    in pieces there; here that is the scorer's business.
    """

    kind: ClassVar[str] = "question-aware"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "relevance"})
    complexity: ClassVar[str] = "O(T K F + T K^3)"
    fidelity: ClassVar[str] = "paper only"

    num_frames: int = Field(8, ge=1, description="how many frames are kept at most")
    segment: int | None = Field(32, ge=2, le=512, description="frames of a segment; null for one segment")
    weight: float = Field(0.2, ge=0.001, le=1000.0, description="weight of diversity against relevance")
    scales: tuple[float, ...] = Field(
        (0.125, 0.25, 0.5, 1.0, 2.0), min_length=1, description="variances of the Gaussian kernels of unit features"
    )
    scorer: Scorer = Field(Scorer(kind="siglip2"), description="by what frames are compared with the question")

    @field_validator("scales")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0.01 <= scale <= 100 for scale in value):
            raise ValueError(f"scales must be from 0.01 to 100, got {value}")
        return value

    def select(self, frames: Frames) -> FrameChoice:
        if frames.num_frames <= self.num_frames:
            return FrameChoice.everything(frames)
        relevance = frames.needed("relevance")
        quality = 2 / self.weight * kernel(relevance.double(), self.scales).log()
        chosen = mdp3_keyframes(frames.needed("features"), quality, self.num_frames, self.segment, self.scales)
        return FrameChoice(tuple(chosen), scores=relevance.float())
