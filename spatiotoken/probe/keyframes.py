"""How much of the evidence frame selectors find: what of a letter that flashes among many frames is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import PreTrainedModel

from spatiotoken.answer import prepare_batch
from spatiotoken.config import PatchConfig, load_config
from spatiotoken.frames import FrameSelector, ScoredSelector
from spatiotoken.frames.encoders import FrameEncoder, PixelEncoder, TowerEncoder
from spatiotoken.probe.dataset import Example, clip_metadata, examples
from spatiotoken.probe.evaluate import among_options, bootstrap_interval, parse_answer
from spatiotoken.probe.scenes import FPS, NEEDLE
from spatiotoken.registry import METHODS
from spatiotoken.structures import FrameChoice, Frames

CANDIDATES = 64
KEPT = 8
_BATCH = 24


@dataclass(frozen=True)
class KeyframeRun:
    """One selector on needle questions.

    Attributes:
        scorer: by what it was told of the frames; empty if it looks at none.
        kept: frames per video.
        recall: share of the frames with the letter that were kept, and its 95 % bootstrap interval.
        accuracy: share of right answers of a model that sees only what was kept.
    """

    method: str
    scorer: str
    kept: float
    recall: float
    recall_interval: tuple[float, float]
    accuracy: float | None
    accuracy_interval: tuple[float, float] | None


def at_hand(config: PatchConfig) -> PatchConfig:
    """``config`` by a scorer that needs no download: ``pixels``, or ``tower`` if its method reads the question."""
    method = config.frames
    if not isinstance(method, ScoredSelector) or method.scorer.kind in ("pixels", "tower"):
        return config
    return load_config(config, **{"frames.scorer": "tower" if method.needs & {"relevance", "score"} else "pixels"})


def selectors() -> dict[str, FrameSelector]:
    """Every method at the budget, as its preset has it otherwise, by the scorers at hand."""
    found = {}
    for name in sorted(METHODS["frames"].items()):
        method = at_hand(load_config(name, **{"frames.num_frames": KEPT})).frames
        assert method is not None
        found[name] = method
    return found


def find_needles(
    methods: Mapping[str, FrameSelector],
    limit: int,
    model: PreTrainedModel | None = None,
    processor: Any = None,
) -> list[KeyframeRun]:
    """Let each method choose ``KEPT`` of ``CANDIDATES`` frames for ``limit`` questions of the test split.

    Args:
        model: answers from what was kept, and describes frames to the methods whose scorer is ``tower``.

    Raises:
        ValueError: a method needs the tower, and there is no model.
    """
    pixels = PixelEncoder()
    tower = None if model is None else TowerEncoder(model, processor)
    tellers: dict[str, FrameEncoder] = {"pixels": pixels} | ({} if tower is None else {"tower": tower})
    scorers = {name: method.scorer.kind for name, method in methods.items() if isinstance(method, ScoredSelector)}
    if missing := set(scorers.values()) - set(tellers):
        raise ValueError(f"there is no {', '.join(sorted(missing))} to describe frames: pass a model")
    asked = list(examples("test", limit, num_frames=CANDIDATES, families={NEEDLE}))
    recalls: dict[str, list[float]] = {name: [] for name in methods}
    kept: dict[str, int] = dict.fromkeys(methods, 0)
    seen: dict[str, list[Tensor]] = {name: [] for name in methods}
    for example in asked:
        shows = (example.evidence[..., 2] > example.evidence[..., 0]).any(dim=0)
        told = {kind: _told(encoder, example) for kind, encoder in tellers.items() if kind in scorers.values()}
        for name, method in methods.items():
            choice = method.select(told[scorers[name]] if name in scorers else _untold())
            rows = list(choice.indices)
            borne = torch.zeros(CANDIDATES, dtype=torch.bool)
            borne[rows] = True
            recalls[name].append((borne & shows).sum().item() / shows.sum().item())
            kept[name] += len(rows)
            if model is not None:
                seen[name].append(_seen(example.frames, choice))
    runs = []
    for name in methods:
        share = torch.tensor(recalls[name], dtype=torch.float64)
        right = None if model is None else _answers(model, processor, asked, seen[name])
        runs.append(
            KeyframeRun(
                name,
                scorers.get(name, ""),
                kept[name] / len(asked),
                share.mean().item(),
                bootstrap_interval(share),
                None if right is None else right.mean().item(),
                None if right is None else bootstrap_interval(right),
            )
        )
    return runs


def _untold() -> Frames:
    return Frames(torch.arange(CANDIDATES, dtype=torch.float64) / FPS)


def _told(encoder: FrameEncoder, example: Example) -> Frames:
    described = encoder.describe(example.frames, patches=True)
    relevance = None if isinstance(encoder, PixelEncoder) else encoder.relevance(described.features, example.question)
    return Frames(
        _untold().timestamps,
        features=described.features,
        patches=described.patches,
        relevance=relevance,
        score=None if relevance is None else lambda numbers: relevance[list(numbers)],
    )


def _seen(frames: Tensor, choice: FrameChoice) -> Tensor:
    """uint8 ``[K, 3, H, W]`` the chosen frames mixed and coarsened as the selector says."""
    if choice.mixing is None:
        chosen = frames[list(choice.indices)]
    else:
        chosen = torch.einsum("kt,tchw->kchw", choice.mixing, frames.float()).round().to(torch.uint8)
    for row, scale in enumerate(choice.scales or ()):
        if scale < 1:
            size = [max(1, int(side * scale)) for side in frames.shape[2:]]
            small = interpolate(chosen[row][None].float(), size, mode="area")
            chosen[row] = interpolate(small, frames.shape[2:], mode="bilinear")[0].round().to(torch.uint8)
    return chosen


def _answers(model: PreTrainedModel, processor: Any, asked: list[Example], videos: list[Tensor]) -> Tensor:
    """``[questions]`` whether each was answered rightly."""
    right: list[float] = [0.0] * len(asked)
    # Processors of some families stack videos, so those of one length go together.
    for length in sorted({len(video) for video in videos}):
        rows = [row for row, video in enumerate(videos) if len(video) == length]
        for first in range(0, len(rows), _BATCH):
            own = rows[first : first + _BATCH]
            batch = [asked[row] for row in own]
            metadata = [clip_metadata(length)] * len(own)
            inputs = prepare_batch(processor, [videos[row] for row in own], [e.question for e in batch], metadata)
            inputs = inputs.to(model.device, model.dtype)
            size = inputs["input_ids"].shape[1]
            limits = among_options(processor.tokenizer, [example.options for example in batch], size)
            output = model.generate(**inputs, **limits, do_sample=False)  # type: ignore[operator]
            texts = processor.batch_decode(output[:, size:], skip_special_tokens=True)
            for row, text, example in zip(own, texts, batch, strict=True):
                right[row] = float(parse_answer(text.strip(), example.options) == example.answer)
    return torch.tensor(right, dtype=torch.float64)
