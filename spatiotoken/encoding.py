"""The ``frames``, ``vision`` and ``tokens`` stages, around a model's ``get_video_features`` and ``get_image_features``.

Whatever is left out, the features go on in their full length, survivors at their own places and the other rows marked
(``sequence.mark_dropped``): placeholders, grids and positions in the rest of the model stay right as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from spatiotoken.candidates import Candidates
from spatiotoken.config import PatchConfig
from spatiotoken.layout import ATTRIBUTE, Layout
from spatiotoken.patches.adapter import Item, ModelAdapter, Segment
from spatiotoken.placement import Choice, parts_of, placement, pooled, reduced_item
from spatiotoken.report import Recorder
from spatiotoken.sequence import mark_dropped
from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens.base import TokenReducer
from spatiotoken.tokens.merging import mean_by_assignment
from spatiotoken.tower import ItemExtras, TowerReader, joined
from spatiotoken.tower_stage import TowerStage


@dataclass(frozen=True)
class Prompt:
    """The text around the pictures.

    Attributes:
        input_ids: ``[B, L]``.
        valid: ``[B, L]`` False at padding; None if there is none.
        seconds: ``[videos]`` the length of a temporal unit; None where the model is not told.
    """

    input_ids: Tensor
    valid: Tensor | None
    seconds: Tensor | Sequence[float] | None = None


@dataclass
class _Encoded:
    """What the tower and the projector made of all videos or images.

    Attributes:
        output: of the (first) call, in which the features go on.
        items: what of it belongs to each.
        features: ``[rows, D]`` as ``ModelAdapter.read`` gives them.
        extras: what the tower was asked for, item by item.
        trailing: rows that follow each item's grids.
    """

    output: Any
    items: list[Item]
    features: list[Tensor]
    extras: list[ItemExtras]
    trailing: int


class FeatureStages:
    """Runs the stages before the language model for one model.

    Args:
        processor: the model's, for frame selectors that read the question, and for how pixels were normalised.

    Raises:
        ValueError: a method needs a part of the vision tower that the model lacks, or the processor.
    """

    def __init__(self, adapter: ModelAdapter, core: Any, config: PatchConfig, processor: Any = None) -> None:
        self.adapter = adapter
        self.core = core
        self.config = config
        pictures = getattr(processor, "video_processor", getattr(processor, "image_processor", None))
        if pictures is not None:
            adapter.pixel_mean, adapter.pixel_std = tuple(pictures.image_mean), tuple(pictures.image_std)
        self.tower = TowerStage(adapter, core, config.vision) if config.vision else None
        self.reader: TowerReader | None = None
        if config.tokens is not None and config.tokens.needs - {"question"}:
            self.reader = TowerReader(adapter, core, config.tokens, self.tower)
        self.candidates = Candidates(adapter, core, config.frames, processor) if config.frames else None

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
        own, joined_from = full, [1] * len(full)
        if kind == "image" and self.config.images == "frames":
            full, joined_from = self._as_videos(full, prompt)
        tokens = self.config.tokens if kind == "video" or self.config.images else None
        chosen = None
        if self.candidates is not None and kind == "video":
            chosen = self._choose_frames(encoding, full, encode, recorder, prompt)
        encoded = self._encode(kind, encoding, full, joined_from, chosen, encode, recorder)
        features, trailing = encoded.features, encoded.trailing
        device = features[0].device
        sizes = [item.size + trailing for item in full]
        coordinates = None
        if self.config.places_tokens:
            coordinates = _coordinates(full, trailing, device)
        keep = torch.ones(features[0].shape[0], dtype=torch.bool, device=device)
        bearers = torch.arange(features[0].shape[0], device=device)
        if tokens:
            if not torch.stack(features[0].aminmax()).isfinite().all():
                raise ValueError(f"the {kind} features contain NaN or infinity: nothing can be selected by them")
            with recorder.span("tokens"):
                questions: list[Tensor | None] = [None] * len(full)
                if "question" in tokens.needs:
                    questions = list(self._questions(f"tokens method {tokens.name!r}", kind, sizes, prompt))
                described = list(zip(encoded.items, encoded.extras, questions, strict=True))
                joint = all(len(item.segments) == 1 for item in encoded.items) or kind == "image"
                features = reduce_tokens(tokens, features, keep, bearers, described, trailing, recorder, joint=joint)
        if chosen is not None:
            lying = placement(full, chosen, trailing, device)
            total = sum(sizes)
            features = [x.new_zeros(total, x.shape[1]).index_copy_(0, lying.place, x) for x in features]
            keep = keep.new_zeros(total).index_copy_(0, lying.place, keep)
            # Who stands for a row, if anything does, and who stands for that after the `tokens` method.
            borne = torch.where(lying.bearers < 0, -1, bearers[lying.bearers])
            bearers = torch.where(borne < 0, -1, lying.place[borne])
        local = None
        if chosen is not None or tokens:
            features[0] = mark_dropped(features[0], keep)
            self.adapter.write(encoded.output, features, [item.size + trailing for item in own])
            starts = [sum(sizes[:index]) for index in range(len(sizes))]
            parts = zip(bearers.split(sizes), starts, strict=True)
            local = tuple(torch.where(part < 0, -1, part - start) for part, start in parts)
        layout = Layout(local, coordinates)
        recorder.layouts[kind] = layout
        setattr(encoded.output, ATTRIBUTE, layout)
        return encoded.output

    def _encode(
        self,
        kind: str,
        encoding: dict[str, Any],
        full: list[Item],
        joined_from: list[int],
        chosen: Choice | None,
        encode: Callable[..., Any],
        recorder: Recorder,
    ) -> _Encoded:
        """Run the tower on what was chosen.

        Args:
            joined_from: how many of the tower's own items make up each of ``full``.
        """
        if chosen is None:
            return self._encode_once(kind, encoding, full, joined_from, encode, recorder)
        calls, first = [], 0
        for taken, count in self.adapter.take_frames(self.core, encoding, chosen):
            own = chosen[first : first + count]
            sizes = [len(parts) if self.adapter.parts_apart else 1 for parts in own]
            items = [reduced_item(item, parts) for item, parts in zip(full[first : first + count], own, strict=True)]
            if not self.adapter.parts_apart:
                whole = self.adapter.items(self.core, kind, taken)
                call = self._encode_once(kind, taken, whole, sizes, encode, recorder)
                call = _pooled(call, full[first : first + count], own, items)
            else:
                call = self._encode_once(kind, taken, items, sizes, encode, recorder)
            calls.append(call)
            first += count
        features = [torch.cat(values) for values in zip(*(call.features for call in calls), strict=True)]
        items = [item for call in calls for item in call.items]
        extras = [item for call in calls for item in call.extras]
        return _Encoded(calls[0].output, items, features, extras, calls[0].trailing)

    def _encode_once(
        self,
        kind: str,
        encoding: dict[str, Any],
        items: list[Item],
        sizes: list[int],
        encode: Callable[..., Any],
        recorder: Recorder,
    ) -> _Encoded:
        """
        Args:
            sizes: how many of the tower's own items make up each of ``items``.
        """
        reduced = self.tower if kind == "video" or self.config.images else None
        with (
            reduced.running(kind, encoding, sizes, recorder) if reduced else nullcontext(),
            self.reader.reading() if self.reader else nullcontext() as seen,
        ):
            output = encode(encoding)
        features = self.adapter.read(output)
        extras = [ItemExtras()] * len(items)
        if self.reader and seen:
            own = iter(self.reader.extras(kind, encoding, seen))
            extras = [joined([next(own) for _ in range(size)]) for size in sizes]
        return _Encoded(output, items, features, extras, self._trailing(items, features[0].shape[0]))

    def _choose_frames(
        self,
        encoding: dict[str, Any],
        items: list[Item],
        encode: Callable[..., Any],
        recorder: Recorder,
        prompt: Prompt | None,
    ) -> Choice | None:
        """The parts of each video that are seen; None where every video keeps all as they are."""
        assert self.candidates is not None
        method = self.candidates.method
        with recorder.span("frames"):
            questions: Sequence[Tensor | None] = [None] * len(items)
            if method.needs & {"relevance", "score"}:
                asked = f"frames method {method.name!r}"
                sizes = [item.size for item in items]
                questions = self._question_ids(asked, "video", sizes, prompt)
            seconds = prompt.seconds if prompt is not None else None
            candidates = self.candidates.of(encoding, encode, questions, seconds)
            choices = [method.select(frames) for frames in candidates]
        chosen = [parts_of(choice) for choice in choices]
        for parts, item in zip(chosen, items, strict=True):
            recorder.stage("frames", method.name, item.size, reduced_item(item, parts).size)
        if all(
            choice.mixing is None
            and set(choice.scales or (1,)) == {1}
            and len(choice.indices) == item.segments[0].grid[0]
            for choice, item in zip(choices, items, strict=True)
        ):
            return None
        recorder.frames = tuple(choice.indices for choice in choices)
        return chosen

    def _questions(self, asked: str, kind: str, sizes: list[int], prompt: Prompt | None) -> list[Tensor]:
        """``[L, D]`` embeddings of ``_question_ids``."""
        embed = self.core.get_input_embeddings()
        return [embed(ids) for ids in self._question_ids(asked, kind, sizes, prompt)]

    def _question_ids(self, asked: str, kind: str, sizes: list[int], prompt: Prompt | None) -> list[Tensor]:
        """``[L]`` ids of the text after the last picture of each item's sample, of all its text if nothing follows.

        Args:
            asked: who needs them.
        """
        owners = self._owners(f"{asked} needs the question", kind, sizes, prompt)
        assert prompt is not None
        ids, core = prompt.input_ids, self.core.config
        text = core.get_text_config()
        pictures = torch.stack(list(self.adapter.placeholders(self.core, ids, None).values())).any(0)
        others = [getattr(core, f"vision_{side}_token_id", None) for side in ("start", "end")]
        others += [text.pad_token_id, text.bos_token_id, text.eos_token_id]
        special = {token for token in others if isinstance(token, int)}
        words = ~pictures & ~torch.isin(ids, ids.new_tensor(sorted(special)))
        if prompt.valid is not None:
            words &= prompt.valid[:, -ids.shape[1] :].bool()
        after = words & (pictures.flip(1).cumsum(1).flip(1) == 0)
        asking = torch.where(after.any(1, keepdim=True), after, words)
        return [ids[sample][asking[sample]] for sample in owners]

    def _owners(self, needing: str, kind: str, sizes: list[int], prompt: Prompt | None) -> list[int]:
        """The sample of each item.

        Args:
            needing: who needs what of the prompt, for the message.
        """
        if prompt is None:
            raise ValueError(f"{needing}: call the model, or `generate`, with input_ids and pixels together")
        counts = self.adapter.placeholders(self.core, prompt.input_ids, None)[kind].sum(1).tolist()
        # Placeholders and features differ by newlines that are added later; items of one sample stand together.
        extra = (sum(counts) - sum(sizes)) // len(sizes)
        owners: list[int] = []
        for sample, count in enumerate(counts):
            while count > 0 and len(owners) < len(sizes):
                count -= sizes[len(owners)] + extra
                owners.append(sample)
        if len(owners) != len(sizes):
            raise ValueError(f"the prompt has placeholders for {len(owners)} {kind}s, not for {len(sizes)}")
        return owners

    def _as_videos(self, images: list[Item], prompt: Prompt | None) -> tuple[list[Item], list[int]]:
        """The images of each sample as one video, and how many these are.

        Raises:
            ValueError: they differ in size, or are no single grids.
        """
        needing = "`images: frames` needs to know which images are in one prompt"
        owners = self._owners(needing, "image", [item.size for item in images], prompt)
        videos, counts = [], [owners.count(sample) for sample in sorted(set(owners))]
        for first, count in zip(accumulate([0, *counts]), counts, strict=False):
            _, height, width = images[first].segments[0].grid
            if any(item != Item.of_grid((1, height, width)) for item in images[first : first + count]):
                raise ValueError(
                    "`images: frames` needs the images of one prompt in one size, without tiles or newline tokens"
                )
            videos.append(Item.of_grid((count, height, width)))
        return videos, counts

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
    *,
    joint: bool = True,
) -> list[Tensor]:
    """Run a method on every grid of every item.

    Args:
        features: ``[rows, D]`` each; the method sees the first, the others are merged as it says.
        keep: ``[rows]``, set to False where a token is dropped.
        bearers: ``[rows]``, set to the row that absorbed a token, -1 where none did.
        items: with what else the method may want to know of each.
        joint: an item's grids are views of one picture.

    Returns:
        ``features`` with each survivor's value at the row of its source.
    """
    reduced_features = list(features)
    start = 0
    for item, extras, question in items:
        # The tower may be on another device than the projector, and the question's embeddings on a third.
        extras = extras.to(keep.device)
        question = None if question is None else question.to(keep.device)
        local = [segment.rows(keep.device) for segment in item.segments]
        views = [
            _view(features[0][start + rows], segment, rows, of_segment, question)
            for segment, rows, of_segment in zip(item.segments, local, _by_segment(item, extras), strict=True)
        ]
        # It ranks and groups tokens, in float32 where it says so, also under a caller's autocast.
        with torch.autocast(keep.device.type, enabled=False):
            # Views of one picture show the same in several sizes; parts of a video are different frames.
            found = method.reduce_views(views) if joint else [method.reduce(view) for view in views]
        for view, rows, reduced in zip(views, local, found, strict=True):
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


def _by_segment(item: Item, extras: ItemExtras) -> list[ItemExtras]:
    """``extras`` with the summaries of the frames of each of an item's grids, where each has frames of its own."""
    frames = [segment.grid[0] for segment in item.segments]
    if extras.frame_features is None or len(extras.frame_features) != sum(frames):
        return [extras] * len(frames)
    return [replace(extras, frame_features=own) for own in extras.frame_features.split(frames)]


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


def _pooled(call: _Encoded, full: list[Item], chosen: Choice, items: list[Item]) -> _Encoded:
    """``call``, in which all parts were encoded at full size, with each part at its own."""
    if all(part.scale == 1 for parts in chosen for part in parts):
        return call
    bounds = [item.size + call.trailing for item in call.items]
    features = [
        torch.cat([pooled(rows, item, parts) for rows, item, parts in zip(x.split(bounds), full, chosen, strict=True)])
        for x in call.features
    ]
    extras = [
        extra.mapped(partial(pooled, item=item, parts=parts))
        for extra, item, parts in zip(call.extras, full, chosen, strict=True)
    ]
    return _Encoded(call.output, items, features, extras, call.trailing)
