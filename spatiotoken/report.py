"""What one forward did: tokens in and out of each stage, time, memory and arithmetic.

Nothing here waits for the device while the model runs: counts stay tensors and times stay CUDA events until a report
is asked for.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spatiotoken.layout import Layout, bearers_at
from spatiotoken.registry import STAGES


@dataclass(frozen=True)
class StageReport:
    """One stage of the last prefill. ``milliseconds`` is what the method itself took.

    For the stage ``vision`` tokens are rows of the tower, CLS tokens included: all, and those behind its last layer.
    """

    method: str
    tokens_in: int
    tokens_out: int
    milliseconds: float


@dataclass(frozen=True)
class AttentionReport:
    """Attention of one decoder layer in the last prefill.

    Attributes:
        layer: its index.
        density: share of the causal (query, key) pairs that was computed, over the batch.
        backends: what ran, by name; "dense" is the model's own attention, where next to nothing would have been saved.
    """

    layer: int
    density: float
    backends: tuple[str, ...]


@dataclass(frozen=True)
class ForwardReport:
    """The last prefill of a patched model and the decoding since, summed over the batch.

    Where a model is spread over several GPUs, times and memory are those of ``model.device``, its first: that of a
    stage on another GPU is not seen.

    Attributes:
        prompt_tokens: tokens of the prompts, without padding, before any reduction.
        visual_tokens: those of them that stand for pictures.
        visual_kept: visual tokens that entered the language model.
        text_tokens: the others.
        stages: by stage, in the order in which the data passes them.
        prefill_ms: vision tower, projector, reductions and language model.
        decode_ms: all later steps together, and ``decode_steps`` how many they were.
        prefill_flops: estimate for the decoder layers, with ``prefill_flops_dense`` what they would need unreduced.
        peak_memory_bytes: of the process on a CPU, of torch's allocator on a GPU, since the process began (or since
            ``torch.cuda.reset_peak_memory_stats``).
        tower_rows: rows that entered each layer of the vision tower, CLS tokens included; none without a method of the
            stage ``vision``, or if the tower did not run because a ``VideoCache`` had what it makes.
        frames: for each video of the prefill the kept temporal units, None where all were.
        layer_tokens: how many tokens entered each decoder layer.
        seen: for each sample and each of its video tokens (newlines included), whether the last decoder layer still had
            it, itself or merged into another; None if nothing was reduced, or if the prompt came in chunks.
        attention: of the decoder layers that a method of the stage ``attention`` was asked for; none without one, and
            where prompts come in ways that it leaves to the model.
    """

    prompt_tokens: int
    visual_tokens: int
    visual_kept: int
    text_tokens: int
    stages: dict[str, StageReport]
    prefill_ms: float
    decode_ms: float
    decode_steps: int
    prefill_flops: float
    prefill_flops_dense: float
    peak_memory_bytes: int
    tower_rows: tuple[int, ...]
    frames: tuple[tuple[int, ...], ...] | None
    layer_tokens: tuple[int, ...]
    seen: tuple[tuple[bool, ...], ...] | None
    attention: tuple[AttentionReport, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Recorder:
    """Collects what a ``ForwardReport`` is made of, from one prefill to the next."""

    def __init__(self, device: torch.device, depth: int) -> None:
        self.device = device
        self.prompt: Tensor | int = 0
        self.visual: Tensor | int = 0
        self.visual_kept: Tensor | int = 0
        self.frames: tuple[tuple[int, ...], ...] | None = None
        # By kind ("video", "image"): what became of the features, and ``[B, L]`` which tokens stand for them.
        self.layouts: dict[str, Layout] = {}
        self.places: dict[str, Tensor] = {}
        # ``[B, L]``: which tokens of the prompt left the last decoder layer.
        self.at_the_end: Tensor | None = None
        self.decode_steps = 0
        self._tower_rows: list[int] = []
        # Sequence lengths of each decoder layer, one entry per sample: what the arithmetic is estimated from.
        self.layer_lengths: list[list[int] | Tensor] = [[] for _ in range(depth)]
        self.dense_lengths: list[int] | Tensor = []
        # By decoder layer: causal pairs of each row, with the share that was computed and the kernel that ran.
        self._attended: dict[int, list[tuple[int, float, str]]] = {}
        self._stages: dict[str, _Stage] = {}
        self._spans: dict[str, list[_Span]] = {}

    def stage(self, stage: str, method: str, tokens_in: Tensor | int, tokens_out: Tensor | int) -> None:
        """Add what a stage was given and left; calls for the same stage add up."""
        entry = self._stages.setdefault(stage, _Stage(method))
        entry.tokens_in = entry.tokens_in + tokens_in
        entry.tokens_out = entry.tokens_out + tokens_out

    def tower(self, method: str, total: int, rows: list[int], left: int) -> None:
        """Note a run of the vision tower.

        Args:
            total: rows that it would have without the method.
            rows: that entered each of its layers.
            left: behind the last one.
        """
        self.stage("vision", method, total, left)
        self._tower_rows = [a + b for a, b in zip(self._tower_rows or [0] * len(rows), rows, strict=True)]

    def attended(self, layer: int, length: int, density: float, backend: str) -> None:
        """Note how one row of ``length`` tokens attended in a decoder layer."""
        self._attended.setdefault(layer, []).append((length * (length + 1) // 2, density, backend))

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time a block under ``name``; blocks of one name add up."""
        span = _Span(self.device)
        try:
            yield
        finally:
            span.stop()
            self._spans.setdefault(name, []).append(span)

    def milliseconds(self, name: str) -> float:
        return sum((span.milliseconds() for span in self._spans.get(name, [])), 0.0)

    def report(self, layers: nn.ModuleList) -> ForwardReport:
        prompt, visual = int(self.prompt), int(self.visual)
        layer_lengths = [[int(n) for n in lengths] for lengths in self.layer_lengths]
        dense_lengths = [[int(n) for n in self.dense_lengths]] * len(layers)
        stages = {
            name: StageReport(entry.method, int(entry.tokens_in), int(entry.tokens_out), self.milliseconds(name))
            for name in STAGES
            if (entry := self._stages.get(name))
        }
        attention = self._attention()
        return ForwardReport(
            prompt_tokens=prompt,
            visual_tokens=visual,
            visual_kept=int(self.visual_kept),
            text_tokens=prompt - visual,
            stages=stages,
            prefill_ms=self.milliseconds("encode") + self.milliseconds("prefill"),
            decode_ms=self.milliseconds("decode"),
            decode_steps=self.decode_steps,
            prefill_flops=_flops(layers, layer_lengths, {entry.layer: entry.density for entry in attention}),
            prefill_flops_dense=_flops(layers, dense_lengths, {}),
            peak_memory_bytes=peak_memory_bytes(self.device),
            tower_rows=tuple(self._tower_rows),
            frames=self.frames,
            layer_tokens=tuple(sum(lengths) for lengths in layer_lengths),
            seen=self._seen(),
            attention=attention,
        )

    def _attention(self) -> tuple[AttentionReport, ...]:
        reports = []
        for layer, rows in sorted(self._attended.items()):
            computed = sum(pairs * density for pairs, density, _ in rows)
            backends = tuple(sorted({backend for *_, backend in rows}))
            reports.append(AttentionReport(layer, computed / sum(pairs for pairs, *_ in rows), backends))
        return tuple(reports)

    def _seen(self) -> tuple[tuple[bool, ...], ...] | None:
        places, layout = self.places.get("video"), self.layouts.get("video")
        bearers = None if layout is None else layout.bearers
        if places is None or (bearers is None and self.at_the_end is None):
            return None
        alive = torch.ones_like(places) if self.at_the_end is None else self.at_the_end.to(places.device)
        seen = alive[places]
        if bearers is not None:
            try:
                bearer = bearers_at(bearers, places)
            except ValueError:  # the prompt came in chunks
                return None
            seen = seen[bearer.clamp(min=0)] & (bearer >= 0)
        return tuple(tuple(part.tolist()) for part in seen.split(places.sum(1).tolist()))


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: by torch's allocator on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # absent on Windows, and needed only here

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class _Stage:
    method: str
    tokens_in: Tensor | int = field(default=0)
    tokens_out: Tensor | int = field(default=0)


class _Span:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._mark()
        self._stop = self._start

    def stop(self) -> None:
        self._stop = self._mark()

    def milliseconds(self) -> float:
        if self._device.type == "cuda":
            self._stop.synchronize()
            return self._start.elapsed_time(self._stop)
        return (self._stop - self._start) * 1e3

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _flops(layers: nn.ModuleList, lengths: list[list[int]], densities: dict[int, float]) -> float:
    """Multiply-adds counted as two, of the weights and of causal attention; embeddings and norms left out.

    Args:
        densities: share of the pairs that attention computes, by layer; all of them where it is not told.
    """
    total = 0.0
    for index, (layer, samples) in enumerate(zip(layers, lengths, strict=True)):
        weights = sum(weight.numel() for weight in layer.parameters() if weight.ndim == 2)
        width: int = layer.get_submodule("self_attn.o_proj").in_features  # type: ignore[assignment]
        for n in samples:
            # Scores and weighted values, half of the square each: 2 products x 2 x n^2 / 2 x width.
            total += 2.0 * weights * n + 2.0 * n * n * width * densities.get(index, 1.0)
    return total
