"""The ``frames`` and ``tokens`` stages, around a model's ``get_video_features`` and ``get_image_features``.

Whatever is left out, the features go on in their full length, survivors at their own places and the other rows marked
(``sequence.mark_dropped``): placeholders, grids and positions in the rest of the model stay right as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spatiotoken.config import PatchConfig
from spatiotoken.layout import ATTRIBUTE, Layout
from spatiotoken.patches.adapter import Item, ModelAdapter, Segment
from spatiotoken.report import Recorder
from spatiotoken.sequence import mark_dropped
from spatiotoken.structures import Frames, VideoFeatures
from spatiotoken.tokens.base import TokenReducer
from spatiotoken.tokens.merging import mean_by_assignment
from spatiotoken.tower import ItemExtras, TowerReader

Choice = list[tuple[int, ...]]
"""Chosen temporal units of each video."""


@dataclass(frozen=True)
class Prompt:
    """The text around the pictures.

    Attributes:
        input_ids: ``[B, L]``.
        valid: ``[B, L]`` False at padding; None if there is none.
    """

    input_ids: Tensor
    valid: Tensor | None


class FeatureStages:
    """Runs the two stages for one model.

    Raises:
        ValueError: the ``tokens`` method needs a part of the vision tower that the model lacks.
    """

    def __init__(self, adapter: ModelAdapter, core: Any, config: PatchConfig) -> None:
        self.adapter = adapter
        self.core = core
        self.config = config
        self.reader: TowerReader | None = None
        if config.tokens is not None and config.tokens.needs - {"question"}:
            self.reader = TowerReader(adapter, core, config.tokens)

    def run(
        self,
        kind: str,
        encoding: dict[str, Any],
        encode: Callable[..., Any],
        recorder: Recorder,
        prompt: Prompt | None = None,
    ) -> Any:
        """The output of ``encode`` (vision tower and projector), reduced.

        Args:
            kind: "video" or "image".
            encoding: arguments of ``encode``.

        Raises:
            ValueError: features that are not finite, or no prompt for a method that needs the question.
            RuntimeError: features that do not lie as the adapter says.
        """
        full = self.adapter.items(self.core, kind, encoding)
        chosen = self._choose_frames(encoding, full, recorder) if self.config.frames and kind == "video" else None
        items = full
        if chosen is not None:
            encoding = self.adapter.take_frames(self.core, encoding, chosen)
            items = self.adapter.items(self.core, kind, encoding)
        with self.reader.reading() if self.reader else nullcontext() as seen:
            output = encode(encoding)
        features = self.adapter.read(output)
        trailing = self._trailing(items, features[0].shape[0])
        coordinates = None
        if self.config.layers and "coordinates" in self.config.layers.needs:
            coordinates = _coordinates(full, trailing, features[0].device)
        keep = torch.ones(features[0].shape[0], dtype=torch.bool, device=features[0].device)
        bearers = torch.arange(features[0].shape[0], device=features[0].device)
        if self.config.tokens:
            if not torch.isfinite(features[0]).all():
                raise ValueError(f"the {kind} features contain NaN or infinity: nothing can be selected by them")
            with recorder.span("tokens"):
                extras = [ItemExtras()] * len(items)
                if self.reader and seen:
                    extras = self.reader.extras(kind, encoding, seen)
                questions: list[Tensor | None] = [None] * len(items)
                if "question" in self.config.tokens.needs:
                    questions = self._questions(kind, [item.size + trailing for item in full], prompt)
                described = list(zip(items, extras, questions, strict=True))
                features = reduce_tokens(self.config.tokens, features, keep, bearers, described, trailing, recorder)
        if chosen is not None:
            place = _full_rows(full, chosen, trailing, keep.device)
            total = sum(item.size + trailing for item in full)
            features = [x.new_zeros(total, x.shape[1]).index_copy_(0, place, x) for x in features]
            keep = keep.new_zeros(total).index_copy_(0, place, keep)
            bearers = torch.where(bearers < 0, -1, place[bearers])
            bearers = bearers.new_full((total,), -1).index_copy_(0, place, bearers)
        local = None
        if chosen is not None or self.config.tokens:
            features[0] = mark_dropped(features[0], keep)
            sizes = [item.size + trailing for item in full]
            self.adapter.write(output, features, sizes)
            starts = [sum(sizes[:index]) for index in range(len(sizes))]
            parts = zip(bearers.split(sizes), starts, strict=True)
            local = tuple(torch.where(part < 0, -1, part - start) for part, start in parts)
        layout = Layout(local, coordinates)
        recorder.layouts[kind] = layout
        setattr(output, ATTRIBUTE, layout)
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

    def _questions(self, kind: str, sizes: list[int], prompt: Prompt | None) -> list[Tensor | None]:
        """``[L, D]`` embeddings of the text after the last picture of each item's sample, of all its text if nothing
        follows."""
        assert self.config.tokens is not None
        if prompt is None:
            raise ValueError(
                f"tokens method {self.config.tokens.name!r} needs the question: call the model, or `generate`, with "
                "input_ids and pixels together"
            )
        ids, core = prompt.input_ids, self.core.config
        text = core.get_text_config()
        pictures = (ids == core.image_token_id) | (ids == core.video_token_id)
        others = [getattr(core, f"vision_{side}_token_id", None) for side in ("start", "end")]
        others += [text.pad_token_id, text.bos_token_id, text.eos_token_id]
        special = {token for token in others if isinstance(token, int)}
        words = ~pictures & ~torch.isin(ids, ids.new_tensor(sorted(special)))
        if prompt.valid is not None:
            words &= prompt.valid[:, -ids.shape[1] :].bool()
        after = words & (pictures.flip(1).cumsum(1).flip(1) == 0)
        asked = torch.where(after.any(1, keepdim=True), after, words)
        own = ids == (core.video_token_id if kind == "video" else core.image_token_id)
        counts = own.sum(1).tolist()
        # Placeholders and features differ by newlines that are added later; items of one sample stand together.
        extra = (sum(counts) - sum(sizes)) // len(sizes)
        embed = self.core.get_input_embeddings()
        questions: list[Tensor | None] = []
        for sample, count in enumerate(counts):
            question = embed(ids[sample][asked[sample]]) if count else None
            while count > 0 and len(questions) < len(sizes):
                count -= sizes[len(questions)] + extra
                questions.append(question)
        if len(questions) != len(sizes):
            raise ValueError(f"the prompt has placeholders for {len(questions)} {kind}s, not for {len(sizes)}")
        return questions

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
    items: list[tuple[Item, ItemExtras, Tensor | None]],
    trailing: int,
    recorder: Recorder,
) -> list[Tensor]:
    """Run a method on every grid of every item.

    Args:
        features: ``[rows, D]`` each; the method sees the first, the others are merged as it says.
        keep: ``[rows]``, set to False where a token is dropped.
        bearers: ``[rows]``, set to the row that absorbed a token, -1 where none did.
        items: with what else the method may want to know of each.

    Returns:
        ``features`` with each survivor's value at the row of its source.
    """
    reduced_features = list(features)
    start = 0
    for item, extras, question in items:
        local = [segment.rows(keep.device) for segment in item.segments]
        views = [
            _view(features[0][start + rows], segment, rows, extras, question)
            for segment, rows in zip(item.segments, local, strict=True)
        ]
        for view, rows, reduced in zip(views, local, method.reduce_views(views), strict=True):
            rows, count = start + rows, reduced.source.shape[0]
            recorder.stage("tokens", method.name, view.num_tokens, count)
            if count == view.num_tokens:
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


def _coordinates(items: list[Item], trailing: int, device: torch.device) -> tuple[Tensor, ...]:
    """``[size + trailing, 4]`` of each item: grid (each segment is one), frame, row and column; -1 at newlines."""
    found, grid = [], 0
    for item in items:
        rows = torch.full((item.size + trailing, 4), -1, device=device)
        for segment in item.segments:
            frames, height, width = segment.grid
            axes = [torch.arange(size, device=device) for size in (frames, height, width)]
            places = torch.cartesian_prod(*axes).view(-1, 3)
            rows[segment.rows(device)] = torch.nn.functional.pad(places, (1, 0), value=grid)
            grid += 1
        found.append(rows)
    return tuple(found)


def _view(
    embeddings: Tensor, segment: Segment, rows: Tensor, extras: ItemExtras, question: Tensor | None
) -> VideoFeatures:
    return VideoFeatures(
        embeddings,
        segment.grid,
        saliency=None if extras.saliency is None else extras.saliency[:, rows],
        hidden=None if extras.hidden is None else extras.hidden[rows],
        keys=None if extras.keys is None else extras.keys[rows],
        frame_features=extras.frame_features,
        question=question,
        tiles=segment.tiles,
    )


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
