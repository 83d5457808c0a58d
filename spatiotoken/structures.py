"""The values that pass between stages: small, frozen, and free of any model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


class Asked:
    """Values of which some are there only if a method asks for them."""

    noun: ClassVar[str]

    def needed(self, name: str) -> Tensor:
        """A value that the method has asked for, made now where it is made only when called for.

        Raises:
            ValueError: it is not there.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"these {self.noun} come without {name}, which the method needs")
        return value() if callable(value) else value


@dataclass(frozen=True)
class VideoFeatures(Asked):
    """Projected visual tokens of one video (or of one image, as a video of one frame).

    All but the first two are there only if the method asks for them (``TokenReducer.needs``).

    Attributes:
        embeddings: ``[N, D]`` tokens after the projector, time-major and row-major within a frame.
        grid: ``(T, H, W)`` with ``N = T * H * W``.
        saliency: ``[S, N]`` float32 attention that each token receives in the vision tower, a row for each of the
            tower's layers that the method names (``TokenReducer.saliency_layers``), pooled as the projector pools.
        hidden: ``[N, Dv]`` features of the tower before the projector, pooled likewise.
        keys: ``[N, Dk]`` float32 head-mean keys of the tower layer whose output the projector reads, pooled likewise.
        frame_features: ``[T, Dv]`` the tower's summary of each frame: its pooling head's output or CLS token, where
            it has one, else the mean of ``hidden`` over the frame.
        question: ``[L, D]`` embeddings of the text that follows the pictures.
        tiles: ``(rows, columns)`` of the tiles that a picture was joined from.
    """

    noun: ClassVar[str] = "features"

    embeddings: Tensor
    grid: tuple[int, int, int]
    saliency: Tensor | None = None
    hidden: Tensor | None = None
    keys: Tensor | None = None
    frame_features: Tensor | None = None
    question: Tensor | None = None
    tiles: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        frames, height, width = self.grid
        if min(self.grid) < 1 or self.embeddings.ndim != 2 or self.embeddings.shape[0] != frames * height * width:
            raise ValueError(f"{tuple(self.embeddings.shape)} embeddings do not fill a {self.grid} (T, H, W) grid")
        rows = {"saliency": 1, "hidden": 0, "keys": 0}
        for name, dim in rows.items():
            value = getattr(self, name)
            if value is not None and (value.ndim != 2 or value.shape[dim] != self.num_tokens):
                raise ValueError(f"{name} {tuple(value.shape)} does not belong to {self.num_tokens} tokens")
        if self.frame_features is not None and self.frame_features.shape[0] != frames:
            raise ValueError(f"frame_features {tuple(self.frame_features.shape)} do not belong to {frames} frames")

    @property
    def num_tokens(self) -> int:
        return self.embeddings.shape[0]

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[1] * self.grid[2]

    @property
    def frames(self) -> Tensor:
        """``[T, H * W, D]`` view of the tokens, frame by frame."""
        return self.embeddings.unflatten(0, (self.grid[0], self.tokens_per_frame))


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
    def everything(cls, video: VideoFeatures) -> ReducedTokens:
        """All tokens, unchanged."""
        index = torch.arange(video.num_tokens, device=video.embeddings.device)
        return cls(video.embeddings, index, index)

    @classmethod
    def pruned(cls, video: VideoFeatures, source: Tensor) -> ReducedTokens:
        """Survivors are the tokens at ``source`` (strictly increasing), unchanged; the others are dropped."""
        assignment = source.new_full((video.num_tokens,), -1)
        assignment[source] = torch.arange(source.shape[0], device=source.device)
        # On a CPU several times as fast as indexing.
        return cls(video.embeddings.index_select(0, source), source, assignment)


@dataclass(frozen=True)
class Frames(Asked):
    """Candidate frames as a selector sees them.

    All but the first are there only if the selector asks for them (``FrameSelector.needs``).

    Attributes:
        timestamps: ``[T]`` seconds, rising; frame numbers where the model is not told the time.
        features: ``[T, F]`` float32 what the scorer makes of each frame.
        patches: ``[T, P, F]`` float32 what it makes of the parts of each frame.
        relevance: ``[T]`` float32 how similar each frame is to the question.
        score: makes the ``relevance`` of frames of these numbers, for those who want to pay for a few only.
    """

    noun: ClassVar[str] = "frames"

    timestamps: Tensor
    features: Tensor | None = None
    patches: Tensor | None = None
    relevance: Tensor | None = None
    score: Callable[[Sequence[int]], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.timestamps.ndim != 1 or not self.timestamps.shape[0]:
            raise ValueError(f"timestamps {tuple(self.timestamps.shape)} must be [T] with T >= 1")
        for name, dims in (("features", 2), ("patches", 3), ("relevance", 1)):
            value = getattr(self, name)
            if value is None:
                continue
            if value.ndim != dims or value.shape[0] != self.num_frames:
                raise ValueError(f"{name} {tuple(value.shape)} do not belong to {self.num_frames} frames")
            if not torch.isfinite(value).all():
                raise ValueError(f"{name} of the frames contain NaN or infinity: nothing can be selected by them")

    @property
    def num_frames(self) -> int:
        return self.timestamps.shape[0]


@dataclass(frozen=True)
class FrameChoice:
    """Which frames are seen, and how.

    Attributes:
        indices: of the ``K`` chosen frames, strictly increasing.
        scales: of each of these its height and width as a share of the full size; all are full if there are none.
        mixing: ``[K, T]`` float32, rows of sum 1: shares of all candidates in the picture that is seen in the place of
            each chosen frame; by default each stands for itself.
        scores: ``[T]`` what the candidates were ranked by, for people to look at.
    """

    indices: tuple[int, ...]
    scales: tuple[float, ...] | None = None
    mixing: Tensor | None = None
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.indices or any(a >= b for a, b in zip(self.indices, self.indices[1:], strict=False)):
            raise ValueError(f"chosen frames must be at least one and strictly increasing, got {self.indices}")
        if self.scales is not None and (
            len(self.scales) != len(self.indices) or not all(0 < scale <= 1 for scale in self.scales)
        ):
            raise ValueError(f"scales must be one in (0, 1] for each of {len(self.indices)} frames, got {self.scales}")
        if self.mixing is not None and (self.mixing.ndim != 2 or self.mixing.shape[0] != len(self.indices)):
            raise ValueError(
                f"mixing {tuple(self.mixing.shape)} must have a row for each of {len(self.indices)} frames"
            )

    @classmethod
    def everything(cls, frames: Frames) -> FrameChoice:
        """All frames, as they are."""
        return cls(tuple(range(frames.num_frames)))


@dataclass(frozen=True)
class LayerTokens(Asked):
    """Visual tokens of one sample, just before a decoder layer.

    ``n`` visual tokens among the sample's ``L`` rows that are left (no padding). All from ``attention`` on are there
    only if the method asks for them (``LayerReducer.needs``).

    Attributes:
        layer: index of the decoder layer they are about to enter.
        num_initial: how many visual tokens of the sample entered the language model.
        depth: how many decoder layers there are.
        length: ``L``.
        attention: ``[heads, n]`` softmax weights that the last prompt token gave them in the layer before.
        received: makes ``[n]`` attention that they got in the layer before, the mean over heads and all queries; only
            computed when called, for it costs as much as the layer's attention does.
        hidden: ``[n, D]`` hidden states.
        coordinates: ``[n, 4]`` int64 of each the grid that it belongs to, and its frame, row and column there; -1 where
            it belongs to none, as newlines do.
        places: ``[n]`` int64, rising: their rows.
        text: ``[t]`` int64, rising: the rows of the words, special tokens included.
        asking: ``[t]`` bool: which of these come after the last visual token.
        rows: gives ``[R, D]`` hidden states of rows ``[R]``.
        weights: gives ``[heads, R, L]`` float32 softmax weights of query rows ``[R]``, of the layer before or, if its
            second argument is true, of the layer they are about to enter.
        observed: by layer what ``LayerReducer.observe`` said of them since the start, ``[parts, n]`` each.
    """

    noun: ClassVar[str] = "tokens"

    layer: int
    num_initial: int
    attention: Tensor | None = None
    received: Callable[[], Tensor] | None = None
    hidden: Tensor | None = None
    coordinates: Tensor | None = None
    depth: int = 0
    length: int = 0
    places: Tensor | None = None
    text: Tensor | None = None
    asking: Tensor | None = None
    rows: Callable[[Tensor], Tensor] | None = None
    weights: Callable[[Tensor, bool], Tensor] | None = None
    observed: Mapping[int, Tensor] | None = None


@dataclass(frozen=True)
class LayerReduction:
    """What a ``layers`` method leaves of a sample's ``n`` visual tokens.

    Attributes:
        kept: ``[k]`` int64, strictly increasing: the tokens whose places and position ids the survivors keep.
        hidden: ``[k, D]`` their hidden states, if these change.
        assignment: ``[n]`` int64: the survivor that absorbed each token, -1 where it was dropped; None if nothing was
            merged.
        memory: what the method wants to be told at its next layer.
    """

    kept: Tensor
    hidden: Tensor | None = None
    assignment: Tensor | None = None
    memory: Any = None
