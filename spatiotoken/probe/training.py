"""How the probe models are trained: what a batch is, what is learnt from it, and in which order.

One scene answers many questions. They are packed behind one copy of the video, each seeing the video and itself alone,
at the positions it would have if it were asked alone, so a step costs little more than a step with one question.

Trained end to end from random weights, a model this small does not find shapes and motion in hours. So its tower first
learns to name what each of its tokens shows (`warm_up`), and goes on doing so beside the questions.
"""

from __future__ import annotations

import math
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from spatiotoken.answer import prepare_inputs
from spatiotoken.patches.adapter import find_adapter
from spatiotoken.probe.dataset import clip_metadata
from spatiotoken.probe.draws import Draws
from spatiotoken.probe.models import PATCH, TEXT
from spatiotoken.probe.questions import DOT_BOX, LETTER_BOX, Question, all_questions, place_questions
from spatiotoken.probe.render import render
from spatiotoken.probe.scenes import (
    COLOURS,
    COUNTING,
    FAMILIES,
    LETTERS,
    MAX_OBJECTS,
    SHAPES,
    SIDE,
    Scenes,
    coverage,
    sample_scenes,
)

GRID = SIDE // (2 * PATCH)
_PAIRS = len(COLOURS) * len(SHAPES)
_LABELS = len(COLOURS) + len(SHAPES) + _PAIRS + len(LETTERS) + len(COLOURS)
_IGNORED = -100
_POSITIVE_WEIGHT = 4.0  # most labels of most tokens are negative
NAMING_SHARE = 0.1  # of the loss, beside the answers
_POINTING_LAYER = 3  # what is asked about has been read by then


@dataclass(frozen=True)
class Lesson:
    """A stretch of training on scenes of one kind.

    Attributes:
        batch: scenes of a step.
        places: easier questions beside those of a scene, about the places of single objects.
        pointing: weight of the loss by which two heads of one decoder layer learn to look at what is asked about. With
            1-D positions a model settles for reading all objects at once, and never finds one by its name.
    """

    steps: int
    batch: int
    num_frames: int
    max_objects: int = MAX_OBJECTS
    places: int = 0
    pointing: float = 0.0


@dataclass(frozen=True)
class Glimpses:
    """Frames and what they show.

    Attributes:
        frames: uint8 ``[B, T, 3, SIDE, SIDE]``.
        labels: bool ``[B, T, GRID, GRID, labels]``: what each cell shows.
    """

    frames: Tensor
    labels: Tensor

    @classmethod
    def of(cls, scenes: Scenes) -> Glimpses:
        return cls(render(scenes), cell_labels(scenes))


@dataclass(frozen=True)
class Batch(Glimpses):
    """Whole videos with packed questions.

    Attributes:
        tokens: ``[B, L]`` ids of the questions and their answers, all segments of a row one after another.
        segments: ``[B, L]`` number of the question that a token belongs to, from 1; 0 for padding.
        places: ``[B, L]`` position of a token within its question.
        targets: ``[B, L]`` id of the token to be predicted there, -100 where none is.
        families: ``[B, L]`` family of the question at the first token of an answer, -1 elsewhere and for places.
        begins: ``[B, Q]`` where each question's answer begins, -1 for those of no row.
        shown: bool ``[B, Q, 2, T, GRID, GRID]``: cells that the two heads which point should look at; none where all
            False.
        pointing: weight of their loss.
    """

    tokens: Tensor
    segments: Tensor
    places: Tensor
    targets: Tensor
    families: Tensor
    begins: Tensor
    shown: Tensor
    pointing: float


def glimpses(seed: int, samples: Tensor, lesson: Lesson) -> Glimpses:
    """Two frames of each scene, with its letter where it has one."""
    scenes = sample_scenes(seed, samples, num_frames=lesson.num_frames, max_objects=lesson.max_objects)
    draws = Draws(seed, samples)
    somewhere = draws.integers("glimpse", 0, lesson.num_frames - 1)
    before = (scenes.letter_frame - draws.integers("glimpse before", 0, 2)).clamp(0, lesson.num_frames - 2)
    return Glimpses.of(scenes.moments(torch.where(scenes.letter_frame >= 0, before, somewhere), 2))


class Packer:
    """Makes batches for one model's tokenizer and chat template."""

    def __init__(self, processor: Any, seed: int, questions: int = 8) -> None:
        marker = "@"
        content = [{"type": "video"}, {"type": "text", "text": marker}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        self._tokenizer = processor.tokenizer
        self._tail = prompt.partition(marker)[2]
        self._end = processor.tokenizer.eos_token
        self._seed = seed
        self._questions = questions
        self._encoded: dict[str, list[int]] = {}

    def batch(self, samples: Tensor, lesson: Lesson) -> Batch:
        """What those scenes show, and some of the questions that they answer."""
        scenes = sample_scenes(self._seed, samples, num_frames=lesson.num_frames, max_objects=lesson.max_objects)
        asked = [
            self._chosen(questions, sample)
            for questions, sample in zip(all_questions(scenes), samples.tolist(), strict=True)
        ]
        if lesson.places:
            for row, (easier, sample) in enumerate(zip(place_questions(scenes), samples.tolist(), strict=True)):
                asked[row] += _shuffled(easier, sample)[: lesson.places]
        rows = [self._pack(questions) for questions in asked]
        length = max(len(row[0]) for row in rows)
        fills = (0, 0, 0, _IGNORED, -1)
        tokens, segments, places, targets, families = (
            torch.tensor([row[part] + [fill] * (length - len(row[part])) for row in rows])
            for part, fill in enumerate(fills)
        )
        begins, shown = _pointed_at(asked, [row[3] for row in rows], coverage(scenes.boxes(), (GRID, GRID)))
        return Batch(
            frames=render(scenes),
            labels=cell_labels(scenes),
            tokens=tokens,
            segments=segments,
            places=places,
            targets=targets,
            families=families,
            begins=begins,
            shown=shown,
            pointing=lesson.pointing,
        )

    def _chosen(self, questions: Sequence[Question], sample: int) -> list[Question]:
        """Some of a scene's questions: the families take turns, beginning with the rare ones."""
        by_family: dict[str, list[Question]] = {}
        for question in _shuffled(questions, sample):
            by_family.setdefault(question.family, []).append(question)
        waiting = sorted(by_family.values(), key=len)
        turns = [family[turn] for turn in range(self._questions) for family in waiting if turn < len(family)]
        return turns[: self._questions]

    def _pack(self, questions: Sequence[Question]) -> tuple[list[int], ...]:
        tokens: list[int] = []
        segments: list[int] = []
        places: list[int] = []
        targets: list[int] = []
        families: list[int] = []
        for number, question in enumerate(questions, start=1):
            asked = self._encode(question.text + self._tail)
            answer = self._encode(question.answer + self._end)
            tokens += asked + answer[:-1]
            size = len(asked) + len(answer) - 1
            segments += [number] * size
            places += range(size)
            targets += [_IGNORED] * (len(asked) - 1) + answer
            family = FAMILIES.index(question.family) if question.family in FAMILIES else -1
            families += [-1] * (len(asked) - 1) + [family] + [-1] * (len(answer) - 1)
        return tokens, segments, places, targets, families

    def _encode(self, text: str) -> list[int]:
        if text not in self._encoded:
            self._encoded[text] = self._tokenizer(text)["input_ids"]
        return self._encoded[text]


def _pointed_at(
    asked: Sequence[Sequence[Question]], targets: Sequence[Sequence[int]], covered: Tensor
) -> tuple[Tensor, Tensor]:
    """``begins`` and ``shown`` of a ``Batch``.

    Args:
        targets: of each row.
        covered: bool ``[B, things, T, GRID, GRID]``.
    """
    most = max(len(questions) for questions in asked)
    begins = torch.full((len(asked), most), -1)
    shown = torch.zeros(len(asked), most, 2, *covered.shape[2:], dtype=torch.bool)
    for row, questions in enumerate(asked):
        answered = [index for index, target in enumerate(targets[row]) if target != _IGNORED]
        starts = [index for index in answered if index - 1 not in answered]
        begins[row, : len(questions)] = torch.tensor(starts)
        for number, question in enumerate(questions):
            for head, (thing, first, stop) in enumerate(_pointers(question)):
                shown[row, number, head, first:stop] = covered[row, thing, first:stop]
    return begins, shown


def _pointers(question: Question) -> list[tuple[int, int, int]]:
    """What two heads should look at: a thing and frames ``[start, end)`` each; nothing for questions about everything.

    The two things that are compared, or one thing at the beginning and at the end.
    """
    if question.family == COUNTING:
        return []
    first, stop = question.frames
    if len(question.things) == 2:
        return [(thing, first, stop) for thing in question.things]
    (thing,) = question.things
    part = max(1, (stop - first) // 4)
    return [(thing, first, first + part), (thing, stop - part, stop)]


def _shuffled(questions: Sequence[Question], sample: int) -> list[Question]:
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(sample))
    return [questions[index] for index in order.tolist()]


def cell_labels(scenes: Scenes) -> Tensor:
    """bool ``[B, T, GRID, GRID, labels]``: colours, shapes, pairs of these, letters and dot colours in each cell."""
    shown = coverage(scenes.boxes(), (GRID, GRID)).permute(0, 2, 3, 4, 1)  # [B, T, GRID, GRID, S + 2]
    objects = shown[..., :MAX_OBJECTS].float()

    def named(index: Tensor, size: int) -> Tensor:
        return torch.einsum("bthws,bsn->bthwn", objects, functional.one_hot(index, size).float())

    colours, shapes = scenes.colour[:, :MAX_OBJECTS], scenes.shape[:, :MAX_OBJECTS]
    letter = functional.one_hot(scenes.letter, len(LETTERS))[:, None, None, None] * shown[..., LETTER_BOX, None]
    dot = functional.one_hot(scenes.dot_colour, len(COLOURS))[:, None, None, None] * shown[..., DOT_BOX, None]
    parts = [
        named(colours, len(COLOURS)),
        named(shapes, len(SHAPES)),
        named(colours * len(SHAPES) + shapes, _PAIRS),
        letter,
        dot,
    ]
    return torch.cat([part > 0 for part in parts], dim=-1)


class Pupil(nn.Module):
    """A probe model and the heads that its tower is trained with, which are thrown away afterwards.

    Args:
        on_cpu: use attention that is quicker on a CPU; the model is not fit for anything else then.
    """

    def __init__(self, model: Any, processor: Any, on_cpu: bool) -> None:
        super().__init__()
        self.model = model
        if on_cpu:
            ALL_ATTENTION_FUNCTIONS.register(_CPU_ATTENTION, _cpu_attention)
            ALL_MASK_ATTENTION_FUNCTIONS.register(_CPU_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
            model.set_attn_implementation(_CPU_ATTENTION)
        self.names = nn.Linear(TEXT["hidden_size"], _LABELS)
        self.cells = nn.Linear(TEXT["hidden_size"], GRID * GRID)
        self._adapter = find_adapter(model)
        self._pointing: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
        self._is_qwen = model.config.model_type.startswith("qwen")
        if self._is_qwen:
            for block in model.model.visual.blocks:
                block.attn.forward = types.MethodType(_equal_chunks, block.attn)
        self._processor = processor
        self._prefixes: dict[int, tuple[Tensor, Tensor, int, int]] = {}

    def forward(self, batch: Glimpses) -> dict[str, Tensor]:
        """``loss`` and what it consists of; the tower's alone, if the batch has no questions."""
        frames = batch.frames.shape[1]
        units = frames // 2 if self._is_qwen else frames
        features = self._features(batch.frames)
        tokens = features[:, : units * GRID * GRID].view(-1, units, GRID, GRID, features.shape[-1])
        naming = self._naming_loss(tokens, batch.labels.view(len(tokens), units, -1, *batch.labels.shape[2:]).any(2))
        if not isinstance(batch, Batch):
            return {"loss": naming, "naming": naming.detach()}

        prefix, prefix_positions, begin, following = self._prefix(frames)
        size, length = prefix.shape[0], batch.tokens.shape[1]
        embed = self.model.get_input_embeddings()
        rows = embed(prefix).expand(len(features), -1, -1)
        embeds = torch.cat(
            [rows[:, :begin], features.to(rows.dtype), rows[:, begin + features.shape[1] :], embed(batch.tokens)], dim=1
        )
        places = (following + batch.places).expand(*prefix_positions.shape[:-1], *batch.places.shape)
        shared = prefix_positions.unsqueeze(-2).expand(*places.shape[:-1], -1)
        segments = functional.pad(batch.segments, (size, 0))
        prefix_columns = torch.arange(size + length, device=segments.device) < size
        seen = (segments[:, :, None] == segments[:, None, :]) | prefix_columns
        hook = self.model.model.language_model.layers[_POINTING_LAYER].register_forward_pre_hook(
            self._catch, with_kwargs=True
        )
        output = self.model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=seen.tril()[:, None],
            position_ids=torch.cat([shared, places], dim=-1),
            use_cache=False,
        )
        hook.remove()
        asked = batch.targets != _IGNORED
        logits = self.model.lm_head(output.last_hidden_state[:, size:][asked])
        targets, families = batch.targets[asked], batch.families[asked]
        answering = functional.cross_entropy(logits.float(), targets)
        right = (logits.argmax(dim=-1) == targets)[families >= 0].float()
        which = functional.one_hot(families[families >= 0], len(FAMILIES)).float()
        loss = answering + NAMING_SHARE * naming
        if batch.pointing:
            loss = loss + batch.pointing * self._pointing_loss(batch, size, begin, units)
        return {
            "loss": loss,
            "naming": naming.detach(),
            "answering": answering.detach(),
            "right": (right @ which).detach(),
            "asked": which.sum(dim=0).detach(),
        }

    def _catch(self, layer: nn.Module, args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        self._pointing = args[0] if args else arguments["hidden_states"], arguments["position_embeddings"]

    def _pointing_loss(self, batch: Batch, size: int, begin: int, units: int) -> Tensor:
        """How much the first two heads, asked at the beginning of an answer, look beside what is asked about."""
        assert self._pointing is not None
        hidden, position_embeddings = self._pointing
        layer = self.model.model.language_model.layers[_POINTING_LAYER]
        rows = size + batch.begins.clamp(min=0)
        weights = self._adapter.attention_rows(layer, hidden, rows, position_embeddings, None, None)
        video = weights[:, :2, :, begin : begin + units * GRID * GRID].transpose(1, 2)
        shown = batch.shown.unflatten(3, (units, -1)).any(dim=4).flatten(3)
        share = (video * shown).sum(dim=-1) / video.sum(dim=-1).clamp(min=1e-9)
        return -share[shown.any(dim=-1)].clamp(min=1e-6).log().mean()

    def _naming_loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        logits = self.names(tokens).float()
        weight = torch.full_like(logits[0, 0, 0, 0], _POSITIVE_WEIGHT)
        named = functional.binary_cross_entropy_with_logits(logits, labels.float(), pos_weight=weight, reduction="sum")
        cell = torch.arange(GRID * GRID, device=tokens.device).expand(tokens.shape[0] * tokens.shape[1], -1)
        placed = functional.cross_entropy(self.cells(tokens).float().view(-1, GRID * GRID), cell.flatten())
        return named / cell.numel() + placed

    def _features(self, frames: Tensor) -> Tensor:
        pixels = frames.float() / 255
        mean, std = (
            torch.tensor(values, device=pixels.device).view(3, 1, 1)
            for values in (self._processor.video_processor.image_mean, self._processor.video_processor.image_std)
        )
        pixels = (pixels - mean) / std
        if not self._is_qwen:
            output = self.model.model.get_video_features(pixel_values_videos=pixels, output_hidden_states=True)
            return output.pooler_output
        batch, count = frames.shape[:2]
        side = SIDE // (2 * PATCH)
        patches = pixels.view(batch, count // 2, 2, 3, side, 2, PATCH, side, 2, PATCH)
        patches = patches.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(-1, 3 * 2 * PATCH * PATCH)
        grid = torch.tensor([[count // 2, 2 * side, 2 * side]], device=frames.device).expand(batch, -1)
        output = self.model.model.visual(patches, grid_thw=grid)
        return output.pooler_output.view(batch, count // 2 * side * side, -1)

    def _prefix(self, frames: int) -> tuple[Tensor, Tensor, int, int]:
        """Ids of the prompt up to the question, their positions, where the video begins, and the next position."""
        if frames not in self._prefixes:
            device = self.model.device
            dummy = torch.zeros(frames, 3, SIDE, SIDE, dtype=torch.uint8)
            inputs = prepare_inputs(self._processor, dummy, "@", clip_metadata(frames)).to(device)
            ids = inputs["input_ids"][0]
            question = self._processor.tokenizer("@")["input_ids"][0]
            ids = ids[: ids.tolist().index(question)]
            begin = (ids == self.model.config.video_token_id).nonzero()[0].item()
            if self._is_qwen:
                wanted = ("mm_token_type_ids", "video_grid_thw", "second_per_grid_ts", "attention_mask")
                known = {name: inputs[name] for name in wanted if name in inputs}
                positions = self.model.model.get_rope_index(inputs["input_ids"], **known)[0][:, 0, : len(ids)]
            else:
                positions = torch.arange(len(ids), device=device)
            # Qwen's text goes on after its last token, though frames of the video may have later positions.
            self._prefixes[frames] = ids, positions, begin, int(positions[..., -1].max()) + 1
        return self._prefixes[frames]


_CPU_ATTENTION = "spatiotoken_probe_training"


def _cpu_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as two products of matrices: for short sequences the backward pass of torch's fused one on CPUs takes
    three times as long in bfloat16."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    with torch.autocast("cpu", enabled=False):
        weights = (query * scaling) @ key.to(query.dtype).transpose(-1, -2)
        if attention_mask is not None:
            weights = weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min)
        mixed = weights.softmax(dim=-1) @ value.to(query.dtype)
    return mixed.transpose(1, 2), None


def _equal_chunks(
    self: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
) -> Tensor:
    """Attention of a Qwen tower whose chunks are all of one size, in one call instead of one for each chunk."""
    size = int(cu_seqlens[1])
    states = self.qkv(hidden_states).view(-1, 3, self.num_heads, self.head_dim)
    query, key = apply_rotary_pos_emb_vision(states[:, 0], states[:, 1], *position_embeddings)
    chunks = [part.to(states.dtype).unflatten(0, (-1, size)).transpose(1, 2) for part in (query, key, states[:, 2])]
    attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    mixed, _ = attend(self, *chunks, attention_mask=None, scaling=self.scaling, is_causal=False)
    return self.proj(mixed.reshape(hidden_states.shape))


@dataclass(frozen=True)
class Course:
    """All that training does, in order. The numbers of its steps go on from one lesson to the next.

    Attributes:
        warm_up: learns to name what tokens show.
        lessons: learn to answer, each from other scenes.
        rehearsed: scenes of which each of their steps has glimpses too, for the tower forgets letters otherwise.
        waves: rises and falls of the learning rate in the lessons: of so many steps each, the first of a wave of so
            many. A wave may be cut short. By default there is one, of all lessons.
        rate, tower_rate: peak learning rates, of the tower's once it no longer learns alone.

    Raises:
        ValueError: the waves are not as long as the lessons.
    """

    warm_up: Lesson
    lessons: tuple[Lesson, ...]
    rehearsed: int = 32
    waves: tuple[tuple[int, int], ...] = ()
    rate: float = 1e-3
    tower_rate: float = 4e-4

    def __post_init__(self) -> None:
        if self.waves and sum(steps for steps, _ in self.waves) != self.steps - self.warm_up.steps:
            raise ValueError(
                f"waves {self.waves} do not end with the lessons, of {self.steps - self.warm_up.steps} steps"
            )

    @property
    def steps(self) -> int:
        return self.warm_up.steps + sum(lesson.steps for lesson in self.lessons)

    @property
    def scenes(self) -> int:
        return sum(lesson.steps * lesson.batch for lesson in (self.warm_up, *self.lessons))

    def lesson(self, step: int) -> Lesson:
        """
        Raises:
            IndexError: the course is over.
        """
        for lesson in (self.warm_up, *self.lessons):
            if step < lesson.steps:
                return lesson
            step -= lesson.steps
        raise IndexError(f"the course ends {step} steps before")

    def answers(self, step: int) -> bool:
        return step >= self.warm_up.steps

    def rates(self, step: int) -> tuple[float, float]:
        """Learning rates of the tower and of the rest: a short rise, then half a cosine, in each of the two parts."""
        if not self.answers(step):
            rate = self.rate * _wave(step, self.warm_up.steps, floor=0.2)
            return rate, rate
        step -= self.warm_up.steps
        length = self.steps - self.warm_up.steps
        for steps, full_length in self.waves:
            length = full_length
            if step < steps:
                break
            step -= steps
        wave = _wave(step, length, floor=0.0)
        return self.tower_rate * wave, self.rate * wave


def _wave(step: int, steps: int, floor: float) -> float:
    rise = min(1.0, (step + 1) / min(100, steps))
    return rise * (floor + (1 - floor) * (1 + math.cos(math.pi * step / steps)) / 2)


COURSES = {
    "qwen2_5_vl": Course(
        Lesson(1500, 96, 8),
        (
            Lesson(300, 16, 8, max_objects=2),
            Lesson(200, 16, 8),
            Lesson(500, 16, 8, places=3),
            Lesson(700, 16, 16, places=2),
            Lesson(500, 16, 16, places=2),
        ),
        waves=((1700, 1700), (500, 500)),
    ),
    "llava_onevision": Course(
        Lesson(1500, 64, 8),
        (
            Lesson(300, 16, 8, max_objects=2),
            Lesson(400, 16, 8, places=3),
            Lesson(200, 16, 8, places=6),
            Lesson(500, 16, 8, max_objects=2, places=8),
            Lesson(100, 16, 8, places=6),
            Lesson(300, 16, 16, places=2),
            Lesson(400, 16, 8, max_objects=2, places=8),
            Lesson(700, 16, 8, places=4),
            Lesson(400, 16, 8, places=6, pointing=0.3),
            Lesson(150, 16, 16, places=2, pointing=0.3),
            Lesson(900, 16, 8, places=2, pointing=1.0),
            Lesson(250, 16, 16, places=2, pointing=0.5),
            Lesson(400, 16, 16, pointing=0.5),
        ),
        waves=((700, 1350), (450, 850), (650, 650), (1100, 1800), (550, 650), (1150, 1150), (400, 400)),
    ),
}
