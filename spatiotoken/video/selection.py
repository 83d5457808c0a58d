"""Choosing frames while a file is read: a cheap look at candidates, of which only what the selector needs is kept."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .backends import open_reader
from .reader import VideoReader
from .types import VideoMetadata

if TYPE_CHECKING:
    from spatiotoken.frames.encoders import Described, FrameEncoder
    from spatiotoken.structures import FrameChoice, Frames

SHORT_SIDE = 224
"""Of candidates, in pixels; smaller frames stay as they are."""
_BATCH = 64
_MAX_FPS = 1000
"""More than any camera's rate; beyond it a typing error would fill the memory with times."""


class FrameSelector(Protocol):
    """Chooses frames; `spatiotoken.frames.FrameSelector` is one.

    One without `needs` is given the features of the pixels, and one without `num_frames` every candidate.
    """

    def select(self, frames: Frames) -> FrameChoice: ...


@dataclass(frozen=True)
class Selection:
    """Frames of a file chosen among candidates.

    Attributes:
        candidates: indices of the frames that the selector was shown.
        seconds: when each of these is presented.
        choice: what it chose, by position among the candidates.
        metadata: the stream they are from.
    """

    candidates: tuple[int, ...]
    seconds: tuple[float, ...]
    choice: FrameChoice
    metadata: VideoMetadata

    @property
    def indices(self) -> tuple[int, ...]:
        """Of the chosen frames in the file."""
        return tuple(self.candidates[position] for position in self.choice.indices)


def select_frames(
    path: str | os.PathLike[str],
    selector: FrameSelector,
    *,
    question: str | None = None,
    candidate_fps: float = 1.0,
    keyframes_only: bool = False,
    encoder: FrameEncoder | None = None,
    backend: str = "auto",
) -> Selection:
    """What `load_video` with the same arguments would read, without reading it. Raises as `load_video` does."""
    check_rate("candidate_fps", candidate_fps)
    with open_reader(path, backend) as reader:
        return select_from(reader, selector, question, None if keyframes_only else candidate_fps, encoder)


def select_from(
    reader: VideoReader,
    selector: FrameSelector,
    question: str | None,
    candidate_fps: float | None,
    encoder: FrameEncoder | None,
) -> Selection:
    """
    Args:
        candidate_fps: None for key frames only.

    Raises:
        ValueError: the selector needs a question or a scorer that is not there, or chooses wrongly.
    """
    from spatiotoken.structures import Frames

    needs: frozenset[str] = getattr(selector, "needs", frozenset({"features"}))
    if needs & {"relevance", "score"} and not question:
        raise ValueError(f"selector {type(selector).__name__} compares frames with the question: give one")
    if needs:
        candidates = _candidates(reader, selector, candidate_fps)
        source = _Source(reader, selector, encoder, candidates, question or "")
        frames = source.frames(needs)
    else:
        candidates = list(range(reader.metadata.num_frames))
        frames = Frames(torch.tensor(reader.times(), dtype=torch.float64))
    choice = selector.select(frames)
    if not choice.indices or choice.indices[0] < 0 or choice.indices[-1] >= len(candidates):
        raise ValueError(f"the selector chose {choice.indices}, not indices among {len(candidates)} frames")
    return Selection(tuple(candidates), tuple(frames.timestamps.tolist()), choice, reader.metadata)


def check_rate(name: str, rate: float) -> None:
    """
    Raises:
        ValueError: it is no number of frames per second.
    """
    if not 0 < rate <= _MAX_FPS:
        raise ValueError(f"{name} must be positive and at most {_MAX_FPS}, not {rate}")


def moments(duration: float, fps: float) -> list[float]:
    """0, 1/fps, 2/fps, ... seconds, before the end of the video and at least one."""
    # A time nearer the end than float arithmetic can tell is the end.
    return [step / fps for step in range(max(1, math.ceil((duration - 1e-6) * fps)))]


def _candidates(reader: VideoReader, selector: FrameSelector, candidate_fps: float | None) -> list[int]:
    """Frames on screen at that rate, or key frames; of a short video more, to have twice as many as may be chosen."""
    about = reader.metadata
    if candidate_fps is None:
        found = reader.keyframes()
    else:
        found = list(dict.fromkeys(reader.shown_at(moments(about.duration, candidate_fps))))
    wanted = min(2 * getattr(selector, "num_frames", 0), about.num_frames)
    if len(found) >= wanted:
        return found
    return [(2 * i + 1) * about.num_frames // (2 * wanted) for i in range(wanted)]


class _Source:
    """Shows a selector the candidates of one file."""

    def __init__(
        self,
        reader: VideoReader,
        selector: FrameSelector,
        encoder: FrameEncoder | None,
        candidates: list[int],
        question: str,
    ) -> None:
        from spatiotoken.frames.encoders import open_encoder
        from spatiotoken.frames.scorer import Scorer

        self.reader = reader
        self.candidates = candidates
        self.question = question
        self.scorer: Scorer = getattr(selector, "scorer", Scorer())
        self.encoder = encoder or open_encoder(self.scorer)

    def frames(self, needs: frozenset[str]) -> Frames:
        from spatiotoken.structures import Frames

        if needs == {"score"} and not self.encoder.compares_frames:
            times = self.reader.times()
            return Frames(self._tensor([times[index] for index in self.candidates]), score=self._score)
        described, seconds = self._described("patches" in needs)
        relevance = None
        if needs & {"relevance", "score"}:
            relevance = self.encoder.relevance(described.features, self.question)
        return Frames(
            self._tensor(seconds),
            features=described.features if "features" in needs else None,
            patches=described.patches if "patches" in needs else None,
            relevance=relevance if "relevance" in needs else None,
            score=None if relevance is None else lambda positions: relevance[list(positions)],
        )

    def _tensor(self, seconds: Sequence[float]) -> Tensor:
        return torch.tensor(seconds, dtype=torch.float64)

    def _score(self, positions: Sequence[int]) -> Tensor:
        """Relevance of some candidates, decoded for the purpose."""
        order = sorted(set(positions))
        pixels = [frame for frame, _ in self.reader.read_small([self.candidates[at] for at in order], SHORT_SIDE)]
        relevance = self.encoder.relevance(self.encoder.describe(torch.stack(pixels)).features, self.question)
        return relevance[torch.tensor([order.index(position) for position in positions])]

    def _described(self, patches: bool) -> tuple[Described, Sequence[float]]:
        """What the scorer makes of all candidates, from the disk if it has seen them before."""
        from spatiotoken.frames.cache import FeatureCache
        from spatiotoken.frames.encoders import describe_stream
        from spatiotoken.frames.keys import content_key, key

        seconds: list[float] = []

        def describe() -> Described:
            return describe_stream(self.encoder, self._batches(seconds), patches=patches)

        # Averaging colours costs less than finding out whether the file is the same.
        if self.scorer.kind == "pixels" or self.scorer.cache is None:
            return describe(), seconds
        about = self.reader.metadata
        seen = f"{about.stream_index} {SHORT_SIDE} {patches} {self.candidates}"
        name = key(self.encoder.identity, content_key(about.path), seen)
        described = FeatureCache(self.scorer.cache).get_or_put(name, describe)
        if not seconds:
            times = self.reader.times()
            seconds = [times[index] for index in self.candidates]
        return described, seconds

    def _batches(self, seconds: list[float]) -> Iterator[Tensor]:
        """Small frames, and their times into ``seconds``."""
        waiting: list[Tensor] = []
        for frame, time in self.reader.read_small(self.candidates, SHORT_SIDE):
            seconds.append(time)
            waiting.append(frame)
            if len(waiting) == _BATCH:
                yield torch.stack(waiting)
                waiting = []
        if waiting:
            yield torch.stack(waiting)
