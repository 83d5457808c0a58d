"""Times of the methods that reduce tokens, alone and beside other code that does the same where there is any."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from spatiotoken.benchmark import machine, ratio_of_medians
from spatiotoken.config import presets
from spatiotoken.layers.framefusion import (
    FrameFusionState,
    framefusion_merge,
    framefusion_plan,
    framefusion_similarity,
)
from spatiotoken.layers.sttm import sttm_merge
from spatiotoken.registry import METHODS
from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens import TokenReducer

TOWER_DEPTH = 26
"""Layers of the vision tower that the made-up saliency comes from."""
STTM = (0.85, 0.65)
FRAMEFUSION = {"cost": 0.3, "similarity_bound": 0.6, "ratio_bound": 0.1}
"""Settings of the papers, for two methods that have no presets; STTM's are its spatial and temporal threshold."""
_HIDDEN, _KEYS, _QUESTION = 1152, 72, 12
_SCENE = 8
"""Frames between two cuts."""
_MIN_ROUNDS = 3


@dataclass(frozen=True)
class Subject:
    """Something to be timed on a video.

    Attributes:
        run: the timed part; returns the survivors ``[M, D]``.
        inputs: what it takes, made of a copy of the video of its own, since some code writes into its arguments.
            Not timed.
    """

    run: Callable[..., Tensor]
    inputs: Callable[[VideoFeatures], tuple[Any, ...]] = lambda video: (video,)


@dataclass(frozen=True)
class TokenTiming:
    """Times of one method.

    Attributes:
        milliseconds: of each round, in the order in which they ran.
        authors_kept, authors_milliseconds, authors_median_ms: of the authors' code, in the same rounds.
        ratio: median over the authors' median, below 1 where ours is quicker.
        ratio_interval: 95 % bootstrap interval of the ratio, over rounds.
        note: why the authors' code was not timed, or what to know of its time.
    """

    method: str
    kept: int
    milliseconds: tuple[float, ...]
    median_ms: float
    authors_kept: int | None = None
    authors_milliseconds: tuple[float, ...] = ()
    authors_median_ms: float | None = None
    ratio: float | None = None
    ratio_interval: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class TokenComparison:
    machine: dict[str, Any]
    grid: tuple[int, int, int]
    channels: int
    timings: tuple[TokenTiming, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def preset_reducers() -> dict[str, TokenReducer]:
    """Every registered method of the `tokens` stage as the preset of its name sets it, else with its defaults."""
    configs = presets()
    reducers = {}
    for name, method in sorted(METHODS["tokens"].items().items()):
        preset = configs[name].tokens if name in configs else None
        reducer = preset if preset is not None and preset.name == name else method()
        assert isinstance(reducer, TokenReducer)
        reducers[name] = reducer
    return reducers


def reducer_subject(reducer: TokenReducer) -> Subject:
    """The method's ``reduce`` on what it asks for."""
    return Subject(lambda video: reducer.reduce(video).embeddings, lambda video: (view_for(reducer, video),))


def layer_subjects() -> dict[str, Subject]:
    """Merging before the first layers of the language model: FrameFusion's before one layer, and STTM's."""

    def framefusion(tokens: Tensor, place: Tensor) -> Tensor:
        similarity = framefusion_similarity(tokens, place)
        merges, _ = framefusion_plan(similarity, FrameFusionState(), num_layers=28, **FRAMEFUSION)
        return framefusion_merge(tokens, place, merges)[0]

    def places(video: VideoFeatures) -> Tensor:
        return torch.arange(video.tokens_per_frame, device=video.embeddings.device).repeat(video.grid[0])

    return {
        "framefusion": Subject(framefusion, lambda video: (video.embeddings, places(video))),
        "sttm": Subject(
            lambda frames: sttm_merge(frames, *STTM)[0], lambda video: (video.embeddings.unflatten(0, video.grid),)
        ),
    }


def view_for(reducer: TokenReducer, video: VideoFeatures) -> VideoFeatures:
    """The video as the vision tower would hand it to the method: only what it needs, of the layers that it names."""
    dropped: dict[str, Any] = {
        field.name: None
        for field in fields(video)
        if isinstance(getattr(video, field.name), Tensor) and field.name not in {"embeddings", *reducer.needs}
    }
    if "saliency" in reducer.needs:
        dropped["saliency"] = video.needed("saliency")[list(reducer.saliency_layers(TOWER_DEPTH))]
    return replace(video, **dropped)


def compare_subjects(
    ours: Mapping[str, Subject],
    authors: Mapping[str, Subject | str],
    video: VideoFeatures,
    *,
    repeats: int = 21,
    warmup: int = 3,
    seconds: float = 20.0,
    notes: Mapping[str, str] | None = None,
) -> TokenComparison:
    """Time each of ours on the video, in turn with its authors' code.

    Args:
        ours: by method's name.
        authors: code to time beside a method of the same name, or a sentence that says why there is none.
        video: with every optional field, as ``synthetic_video`` makes it.
        repeats: timed rounds of a method; each runs both codes once.
        warmup: rounds before those.
        seconds: after these no further round of a method begins, but three are always timed.
        notes: what to know of the authors' times.

    Raises:
        ValueError: repeats, warm-up or seconds out of range.
    """
    if repeats < 1 or warmup < 0 or seconds <= 0:
        raise ValueError(
            f"repeats must be at least 1, warmup not negative and seconds positive, not {repeats}, {warmup}, {seconds}"
        )
    timings = []
    for name, subject in ours.items():
        theirs = authors.get(name, "")
        note = theirs if isinstance(theirs, str) else (notes or {}).get(name, "")
        if isinstance(theirs, Subject):
            try:
                _timed(theirs, video)  # outside the rounds, where its errors cannot be taken for ours
            except Exception as error:  # code of others, of whatever version: its failure is a result
                note, theirs = f"failed: {type(error).__name__}: {error}", ""
        subjects = [subject, theirs] if isinstance(theirs, Subject) else [subject]
        rows, kept = _rounds(subjects, video, repeats, warmup, seconds)
        timing = TokenTiming(name, kept[0], tuple(rows[0]), statistics.median(rows[0]), note=note)
        if len(rows) == 2:
            ratio, interval = ratio_of_medians(rows[0], rows[1])
            timing = replace(
                timing,
                authors_kept=kept[1],
                authors_milliseconds=tuple(rows[1]),
                authors_median_ms=statistics.median(rows[1]),
                ratio=ratio,
                ratio_interval=interval,
            )
        timings.append(timing)
    embeddings = video.embeddings
    return TokenComparison(
        machine(embeddings.device, embeddings.dtype), video.grid, embeddings.shape[1], tuple(timings)
    )


def _rounds(
    subjects: list[Subject], video: VideoFeatures, repeats: int, warmup: int, seconds: float
) -> tuple[list[list[float]], list[int]]:
    """Milliseconds of each subject in each timed round, and the tokens that it leaves."""
    rows: list[list[float]] = [[] for _ in subjects]
    kept = [0] * len(subjects)
    end = time.perf_counter() + seconds
    turn = 0
    while len(rows[0]) < repeats and (len(rows[0]) < _MIN_ROUNDS or time.perf_counter() < end):
        # A slow subject is warm after its first run.
        warm = turn >= warmup or (turn > 0 and time.perf_counter() > end)
        for place, subject in enumerate(subjects):
            elapsed, kept[place] = _timed(subject, video)
            if warm:
                rows[place].append(elapsed)
        turn += 1
    return rows, kept


def _timed(subject: Subject, video: VideoFeatures) -> tuple[float, int]:
    """Milliseconds of one run, and the number of survivors."""
    copy = {field.name: getattr(video, field.name) for field in fields(video)}
    copy |= {name: value.clone() for name, value in copy.items() if isinstance(value, Tensor)}
    # Only a GPU runs behind the host's clock.
    wait: Callable[[], None] = torch.cuda.synchronize if video.embeddings.is_cuda else lambda: None
    with torch.inference_mode():
        with video.embeddings.device:  # for what code of others expects beside the video
            inputs = subject.inputs(VideoFeatures(**copy))
        wait()
        start = time.perf_counter()
        survivors = subject.run(*inputs)
        wait()
        return (time.perf_counter() - start) * 1e3, survivors.shape[0]


def synthetic_video(
    grid: tuple[int, int, int] = (32, 14, 14),
    channels: int = 896,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> VideoFeatures:
    """Made-up features with something for every method to find, and every optional field.

    Each scene of eight frames has a smooth background that drifts slowly; noise on it grows from left to right, so
    that cosines of a place in consecutive frames run from 0.99 down to about 0.6. Two objects move across it.

    Raises:
        ValueError: a side or the number of channels is not positive.
    """
    if min(*grid, channels) < 1:
        raise ValueError(f"sides and channels must be at least 1, not {grid} and {channels}")
    frames, height, width = grid
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    objects = 2 * normal(2, channels)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    noise = 0.1 + 0.6 * (x / max(width - 1, 1)).unsqueeze(-1)
    picture = torch.empty(frames, height, width, channels)
    shown = torch.zeros(frames, height, width)
    for start in range(0, frames, _SCENE):
        length = min(_SCENE, frames - start)
        coarse = normal(2, channels, 3, 3)
        ends = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
        first, last = ends.permute(0, 2, 3, 1)
        for step in range(length):
            frame = first + 0.3 * step / _SCENE * last + noise * normal(height, width, channels)
            for index, pattern in enumerate(objects):
                top, left = (3 * index + step) % height, (5 * index + 2 * step) % width
                inside = (y - top).abs().le(1) & (x - left).abs().le(1)
                frame[inside] = pattern + 0.2 * normal(int(inside.sum()), channels)
                shown[start + step][inside] = 1.0
            picture[start + step] = frame
    # Tokens of real towers share a large common part.
    embeddings = (picture + 0.5 * normal(channels)).reshape(-1, channels)
    tokens = embeddings.shape[0]

    persistent = normal(TOWER_DEPTH, 1, height * width).expand(-1, frames, -1).reshape(TOWER_DEPTH, tokens)
    logits = persistent + 2 * shown.flatten() + 0.5 * normal(TOWER_DEPTH, tokens)
    saliency = logits.view(TOWER_DEPTH, frames, -1).softmax(dim=-1).view(TOWER_DEPTH, tokens)
    hidden = embeddings @ normal(channels, _HIDDEN) / channels**0.5 + 0.1 * normal(tokens, _HIDDEN)
    keys = hidden @ normal(_HIDDEN, _KEYS) / _HIDDEN**0.5
    frame_features = hidden.view(frames, -1, _HIDDEN).mean(dim=1) + 0.05 * normal(frames, _HIDDEN)
    question = objects[0] + normal(_QUESTION, channels)
    return VideoFeatures(
        embeddings.to(device, dtype),
        grid,
        saliency=saliency.to(device),
        hidden=hidden.to(device, dtype),
        keys=keys.to(device),
        frame_features=frame_features.to(device, dtype),
        question=question.to(device, dtype),
    )
