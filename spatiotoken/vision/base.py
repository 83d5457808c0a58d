"""The contract of the ``vision`` stage: fewer patches in the layers of the vision tower.

Whatever a tower method leaves out, the tower's output is whole again at the end: each patch gets the value of the one
that stands for it. What enters the language model is up to the stages behind.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from spatiotoken.registry import Method
from spatiotoken.structures import Asked


@dataclass(frozen=True)
class TowerAttention:
    """Attention of one tower layer, before the softmax.

    Attributes:
        query, key, value: ``[R, heads, d]`` of the patches, rotated where the tower has rotary positions.
        cls_query: ``[frames, heads, d]`` of the CLS tokens; None where the tower has none.
        scale: of the logits.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cls_query: Tensor | None
    scale: float


@dataclass(frozen=True)
class TowerShape:
    """What methods plan by.

    Attributes:
        depth: layers that run, up to the one that the projector reads.
        whole_frames: which of them attend to whole frames, not to windows only.
        has_cls: frames have a CLS token.
    """

    depth: int
    whole_frames: tuple[int, ...]
    has_cls: bool


@dataclass(frozen=True)
class TowerTokens(Asked):
    """What is left, within the tower, of the patches of one video, or of one view of an image as a video of one frame.

    CLS tokens are not among them. ``pixels`` and ``attention`` are there only if the method asks for them.

    Attributes:
        hidden: ``[R, D]`` hidden states, time-major and row-major within a frame.
        sizes: ``[R]`` float32: how many patches each stands for, itself included.
        places: ``[R]`` int64, strictly increasing: the patch ``(t * H + y) * W + x`` whose position each keeps.
        counts: how many there are of each frame; frames of which none is left do not count.
        grid: ``(T, H, W)`` of all patches.
        layer: of the tower, counted from 0.
        tower: whose layer it is.
        pixels: ``[R, F]`` float32 colours in 0..1.
        attention: of this layer.
    """

    noun: ClassVar[str] = "tower tokens"

    hidden: Tensor
    sizes: Tensor
    places: Tensor
    counts: tuple[int, ...]
    grid: tuple[int, int, int]
    layer: int
    tower: TowerShape
    pixels: Tensor | None = None
    attention: TowerAttention | None = None

    @property
    def num_tokens(self) -> int:
        return self.hidden.shape[0]

    @property
    def is_regular(self) -> bool:
        """Whether every frame that is left has as many tokens."""
        return len(set(self.counts)) == 1

    def rows_by_frame(self) -> tuple[Tensor, Tensor]:
        """``[frames, n]`` rows of each frame that is left, and which of them are real; the others repeat the last."""
        device = self.hidden.device
        counts = torch.tensor(self.counts, device=device)[:, None]
        first = torch.tensor([0, *accumulate(self.counts)][:-1], device=device)[:, None]
        step = torch.arange(max(self.counts), device=device)
        return first + torch.minimum(step, counts - 1), step < counts


@dataclass(frozen=True)
class TowerMerge:
    """What a ``vision`` method leaves at a layer.

    Attributes:
        survivors: ``[K]`` int64, strictly increasing rows of ``TowerTokens``.
        assignment: ``[R]`` int64: which of the survivors stands for each row from now on; survivors stand for
            themselves.
        weights: ``[R]`` float32 shares with which rows make up the mean that their survivor becomes, ``sizes`` for a
            mean over patches; None where survivors stay as they are.
        counts: how many survivors each frame has that has any, where the method knows without looking; else None.
    """

    survivors: Tensor
    assignment: Tensor
    weights: Tensor | None = None
    counts: tuple[int, ...] | None = None


class TowerReducer(Method):
    """Leaves out patches of one video at a time, independent of what else is in the batch.

    The class variables are what the catalogue of methods tells, and how the tower is to run.
    """

    stage: ClassVar[str] = "vision"
    kind: ClassVar[str]
    """"before the tower", "merging in a frame", "merging over time" or "pruning"."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Optional fields of ``TowerTokens`` that ``reduce`` reads."""
    complexity: ClassVar[str]
    """Arithmetic in ``T`` frames, ``N`` patches per frame and ``D`` channels."""
    fidelity: ClassVar[str]
    """What the results were compared with."""
    before_layer: ClassVar[bool] = False
    """``reduce`` comes before a layer, else within it: between its attention and its MLP."""
    proportional: ClassVar[bool] = False
    """A token that stands for several patches gets as much attention as they would: proportional attention."""

    @property
    def whole_context(self) -> bool:
        """Patches that are left attend to keys and values of all patches, those left out included.

        For these the keys and values of whatever stands for them are taken.
        """
        return False

    @abstractmethod
    def layers(self, tower: TowerShape) -> tuple[int, ...]:
        """The layers at which ``reduce`` is called, rising; none where the method's settings keep everything."""

    @abstractmethod
    def reduce(self, tokens: TowerTokens) -> TowerMerge | None:
        """What is left at one of these layers; None for everything."""
