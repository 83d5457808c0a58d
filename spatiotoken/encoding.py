"""The ``frames`` and ``tokens`` stages, around a model's ``get_video_features`` and ``get_image_features``.

Whatever is left out, the features go on in their full length, survivors at their own places and the other rows marked
(``sequence.mark_dropped``): placeholders, grids and positions in the rest of the model stay right as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spatiotoken.config import PatchConfig
from spatiotoken.patches.adapter import Item, ModelAdapter
from spatiotoken.report import Recorder
from spatiotoken.sequence import mark_dropped
from spatiotoken.structures import Frames, VideoFeatures
from spatiotoken.tokens.base import TokenReducer
from spatiotoken.tokens.merging import mean_by_assignment

Choice = list[tuple[int, ...]]
"""Chosen temporal units of each video."""


class FeatureStages:
    """Runs the two stages for one model."""

    def __init__(self, adapter: ModelAdapter, core: Any, config: PatchConfig) -> None:
        self.adapter = adapter
        self.core = core
        self.config = config

    def run(self, kind: str, encoding: dict[str, Any], encode: Callable[..., Any], recorder: Recorder) -> Any:
        """The output of ``encode`` (vision tower and projector), reduced.

        Args:
            kind: "video" or "image".
            encoding: arguments of ``encode``.

        Raises:
            ValueError: features that are not finite.
            RuntimeError: features that do not lie as the adapter says.
        """
        full = self.adapter.items(self.core, kind, encoding)
        chosen = self._choose_frames(encoding, full, recorder) if self.config.frames and kind == "video" else None
        items = full
        if chosen is not None:
            encoding = self.adapter.take_frames(self.core, encoding, chosen)
            items = self.adapter.items(self.core, kind, encoding)
        output = encode(encoding)
        features = self.adapter.read(output)
        trailing = self._trailing(items, features[0].shape[0])
        keep = torch.ones(features[0].shape[0], dtype=torch.bool, device=features[0].device)
        bearers = torch.arange(features[0].shape[0], device=features[0].device)
        if self.config.tokens:
            if not torch.isfinite(features[0]).all():
                raise ValueError(f"the {kind} features contain NaN or infinity: nothing can be selected by them")
            with recorder.span("tokens"):
                features = reduce_tokens(self.config.tokens, features, keep, bearers, items, trailing, recorder)
        if chosen is not None:
            place = _full_rows(full, chosen, trailing, keep.device)
            total = sum(item.size + trailing for item in full)
            features = [x.new_zeros(total, x.shape[1]).index_copy_(0, place, x) for x in features]
            keep = keep.new_zeros(total).index_copy_(0, place, keep)
            bearers = torch.where(bearers < 0, -1, place[bearers])
            bearers = bearers.new_full((total,), -1).index_copy_(0, place, bearers)
        if chosen is not None or self.config.tokens:
            features[0] = mark_dropped(features[0], keep)
            self.adapter.write(output, features, [item.size + trailing for item in full])
            if kind == "video":
                sizes = [item.size + trailing for item in full]
                starts = [sum(sizes[:index]) for index in range(len(sizes))]
                parts = zip(bearers.split(sizes), starts, strict=True)
                recorder.bearers = [torch.where(part < 0, -1, part - start) for part, start in parts]
        return output

    def _choose_frames(self, encoding: dict[str, Any], items: list[Item], recorder: Recorder) -> Choice | None:
        """Chosen temporal units of each video; None where every video keeps all."""
        assert self.config.frames is not None
        with recorder.span("frames"):
            chosen = []
            for features in self.adapter.frame_features(self.core, encoding):
                timestamps = torch.arange(features.shape[0], device=features.device, dtype=torch.float64)
                chosen.append(self.config.frames.select(Frames(features, timestamps)).indices)
        for units, item in zip(chosen, items, strict=True):
            frames = item.segments[0].grid[0]
            recorder.stage("frames", self.config.frames.name, item.size, item.size // frames * len(units))
        if all(len(units) == item.segments[0].grid[0] for units, item in zip(chosen, items, strict=True)):
            return None
        recorder.frames = tuple(chosen)
        return chosen

    def _trailing(self, items: list[Item], rows: int) -> int:
        """How many tokens follow the grids of each item, from what the model returned."""
        expected = sum(item.size for item in items)
        trailing, rest = divmod(rows - expected, len(items))
        if rest or trailing not in self.adapter.trailing:
            raise RuntimeError(
                f"{type(self.core).__name__} returned {rows} visual features where {type(self.adapter).__name__} "
                f"expects {expected}: this checkpoint's configuration is not supported"
            )
        return trailing


def reduce_tokens(
    method: TokenReducer,
    features: list[Tensor],
    keep: Tensor,
    bearers: Tensor,
    items: list[Item],
    trailing: int,
    recorder: Recorder,
) -> list[Tensor]:
    """Run a method on every grid of every item.

    Args:
        features: ``[rows, D]`` each; the method sees the first, the others are merged as it says.
        keep: ``[rows]``, set to False where a token is dropped.
        bearers: ``[rows]``, set to the row that absorbed a token, -1 where none did.

    Returns:
        ``features`` with each survivor's value at the row of its source.
    """
    reduced_features = list(features)
    start = 0
    for item in items:
        for segment in item.segments:
            rows = start + segment.rows(keep.device)
            video = VideoFeatures(features[0][rows], segment.grid)
            reduced = method.reduce(video)
            count = reduced.source.shape[0]
            recorder.stage("tokens", method.name, video.num_tokens, count)
            if count == video.num_tokens:
                continue
            survivors = rows[reduced.source]
            keep[rows] = False
            keep[survivors] = True
            bearers[rows] = torch.where(reduced.assignment < 0, -1, survivors[reduced.assignment])
            values = [reduced.embeddings.to(features[0].dtype)]
            values += [mean_by_assignment(x[rows], reduced.assignment, count) for x in features[1:]]
            reduced_features = [
                x.index_copy(0, survivors, value) for x, value in zip(reduced_features, values, strict=True)
            ]
        start += item.size + trailing
    return reduced_features


def _full_rows(full: list[Item], chosen: Choice, trailing: int, device: torch.device) -> Tensor:
    """The rows of the full layout at which the features of the chosen frames stand."""
    places, start = [], 0
    for item, units in zip(full, chosen, strict=True):
        segment = item.segments[0]
        grid = start + segment.rows(device).view(segment.grid[0], -1)
        places.append(grid[list(units)].flatten())
        places.append(torch.arange(start + item.size, start + item.size + trailing, device=device))
        start += item.size + trailing
    return torch.cat(places)
