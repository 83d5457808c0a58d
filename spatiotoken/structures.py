"""The values that pass between stages: small, frozen, and free of any model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VideoFeatures:
    """Projected visual tokens of one video (or of one image, as a video of one frame).

    Attributes:
        embeddings: ``[N, D]`` tokens after the projector, time-major and row-major within a frame.
        grid: ``(T, H, W)`` with ``N = T * H * W``.
    """

    embeddings: Tensor
    grid: tuple[int, int, int]

    def __post_init__(self) -> None:
        frames, height, width = self.grid
        if min(self.grid) < 1 or self.embeddings.ndim != 2 or self.embeddings.shape[0] != frames * height * width:
            raise ValueError(f"{tuple(self.embeddings.shape)} embeddings do not fill a {self.grid} (T, H, W) grid")

    @property
    def num_tokens(self) -> int:
        return self.embeddings.shape[0]

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[1] * self.grid[2]


@dataclass(frozen=True)
class ReducedTokens:
    """What a ``tokens`` method leaves of a video.

    Attributes:
        embeddings: ``[M, D]`` survivors.
        source: ``[M]`` int64, strictly increasing: the token whose position ids each survivor keeps.
        assignment: ``[N]`` int64: the survivor that absorbed each token, -1 where a token was dropped.
    """

    embeddings: Tensor
    source: Tensor
    assignment: Tensor

    def __post_init__(self) -> None:
        if self.source.ndim != 1 or self.embeddings.shape[0] != self.source.shape[0] or not self.source.shape[0]:
            raise ValueError(
                f"{tuple(self.embeddings.shape)} survivors for {tuple(self.source.shape)} sources: must be as many, "
                "and at least one"
            )

    @classmethod
    def pruned(cls, video: VideoFeatures, source: Tensor) -> ReducedTokens:
        """Survivors are the tokens at ``source`` (strictly increasing), unchanged; the others are dropped."""
        assignment = source.new_full((video.num_tokens,), -1)
        assignment[source] = torch.arange(source.shape[0], device=source.device)
        return cls(video.embeddings[source], source, assignment)


@dataclass(frozen=True)
class Frames:
    """Candidate frames as a selector sees them.

    Attributes:
        features: ``[T, F]`` float, cheap appearance features of each frame.
        timestamps: ``[T]`` seconds; frame numbers where the model is not told the time.
    """

    features: Tensor
    timestamps: Tensor

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.timestamps.shape != self.features.shape[:1] or not self.features.shape[0]:
            raise ValueError(
                f"features {tuple(self.features.shape)} and timestamps {tuple(self.timestamps.shape)} "
                "must be [T, F] and [T] with T >= 1"
            )

    @property
    def num_frames(self) -> int:
        return self.features.shape[0]


@dataclass(frozen=True)
class FrameChoice:
    """Indices of the chosen frames, strictly increasing."""

    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.indices or any(a >= b for a, b in zip(self.indices, self.indices[1:], strict=False)):
            raise ValueError(f"chosen frames must be at least one and strictly increasing, got {self.indices}")


@dataclass(frozen=True)
class LayerTokens:
    """Visual tokens of one sample, just before a decoder layer.

    Attributes:
        layer: index of the decoder layer they are about to enter.
        num_initial: how many visual tokens of the sample entered the language model.
        attention: ``[heads, n]`` softmax weights that the last prompt token gave them in the layer before.
    """

    layer: int
    num_initial: int
    attention: Tensor
