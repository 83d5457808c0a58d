"""Sparse prefill measured without a model: its kernels, what the methods' estimates cost, and how much they see.

On a GPU, with no network and nothing but torch, triton, transformers, pydantic, PyYAML and rich::

    python scripts/benchmark.py --suite attention --device cuda

which takes bfloat16, 16k, 32k and 64k tokens for the kernels, and 32k for the estimates.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from spatiotoken.attention.base import Part, PrefillInputs, SparsePrefill
from spatiotoken.attention.blocks import causal_blocks, diagonal_blocks, num_blocks
from spatiotoken.attention.kernels import SparsePattern, block_sparse_attention, density, unavailable
from spatiotoken.attention.kernels.pattern import computed_pairs
from spatiotoken.attention.powerattention import PowerAttention
from spatiotoken.attention.recall import mass_recall, measure, oracle_pairs, structured_inputs
from spatiotoken.benchmark import markdown
from spatiotoken.config import build_method, presets
from spatiotoken.probe import PROBE_MODEL_TYPES
from spatiotoken.probe.short_prompts import PROBE_SETTINGS, Settings
from spatiotoken.registry import METHODS

FLASH = "flash"
PATTERNS_PER = ("key head", "query head")
RECALL_LENGTH = 2048
PROBE_FRAMES = 16
_LEAST_ROUNDS = 3
_MATH_BYTES = 2**30
_CALLS_MS, _MOST_CALLS = 20.0, 10
_ERROR_CHARACTERS = 120

RECALL_SETTINGS: Settings = {
    "anchorattention": {"theta": 10.5, "step": 4, "block": 32},
    "deltallm": {"threshold": 1.5, "window": 128, "block_q": 64, "block_k": 8},
    "dhsa": {
        "budget": 256,
        "global_tokens": 16,
        "local_tokens": 64,
        "instruction_tokens": 16,
        "block_q": 32,
        "block_k": 8,
    },
    "flexprefill": {"gamma": 0.65, "min_budget": 64, "block": 32},
    "hip": {"k": 104, "sink": 32, "window": 128, "block_q": 32, "block_k": 8},
    "minference": {"vertical": 128, "slash": 40, "sink": 16, "local": 8, "last_queries": 32, "block": 16},
    "mminference": {
        "density": 0.16,
        "vertical": 128,
        "slash": 32,
        "sink": 16,
        "local": 8,
        "last_queries": 32,
        "block": 32,
    },
    "pbs_attn": {"threshold": 0.4, "segment": 64, "block": 16},
    "powerattention": {"window": 14, "block": 16},
    "psa": {"shares": [0.02, 0.06, 0.12, 0.22], "stride": 8, "block": 32},
    "sampleattention": {"alpha": 0.63, "block": 32},
    "seerattention": {"sparsity_method": "nz_ratio", "nz_ratio": 0.225, "block": 32},
    "sliding_vertical": {"sink": 16, "window": 192, "columns": 192, "last_queries": 32, "block": 32},
    "spargeattn": {"share": 0.15, "block_q": 32, "block_k": 32},
    "token_sparse": {"coverage": 0.2, "min_tokens": 256, "window": 64, "start": 0.0},
    "xattention": {"threshold": 0.5, "stride": 8, "block": 32},
    "yopo_neighbours": {"radius": 3, "frames": 3, "block": 16},
    "zipvl": {"tau": 0.81, "recent": 32, "spread": 32, "block": 32},
}
"""By method, for about a quarter of the pairs of `RECALL_LENGTH` made-up tokens."""

K = TypeVar("K")


class Layout(NamedTuple):
    """Heads of a layer and their size."""

    heads: int = 28
    kv_heads: int = 4
    dim: int = 128


LAYOUT = Layout()
RECALL_LAYOUT = Layout(8, 2, 128)


@dataclass(frozen=True)
class Rounds:
    """How often things are timed: in turns, so that a busy moment of the machine hits all of them.

    Attributes:
        repeats: rounds at most, each of which runs everything once.
        warmup: rounds before those, at least one.
        seconds: after these no further round begins, but three are timed in any case (or ``repeats``).
    """

    repeats: int = 9
    warmup: int = 1
    seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.warmup < 1 or self.seconds <= 0:
            raise ValueError(
                "repeats and warmup must be at least 1 and seconds positive, "
                f"not {self.repeats}, {self.warmup} and {self.seconds}"
            )


ROUNDS = Rounds()


@dataclass(frozen=True)
class EngineTiming:
    """The backends on one random pattern.

    Attributes:
        per: what has a pattern of its own, a key head or a query head.
        density: true share of the causal pairs.
        dense_ms: dense causal attention, by the path that torch takes.
        sparse_ms: by backend.
        failed: why a backend has no time.
    """

    threads: int
    length: int
    per: str
    density: float
    dense_ms: dict[str, float]
    sparse_ms: dict[str, float]
    failed: dict[str, str]

    def ratio(self, backend: str, kernel: str = "") -> float | None:
        """Time over that of dense attention times the density, 1 where nothing is lost; None where there is no time.

        Args:
            kernel: of dense attention, the quickest by default.
        """
        dense = [ms for path, ms in self.dense_ms.items() if path.startswith(kernel)]
        return self.sparse_ms[backend] / (min(dense) * self.density) if dense and backend in self.sparse_ms else None


@dataclass(frozen=True)
class EstimateTiming:
    """One method on one layer.

    Attributes:
        density: that it chose; None where it knows without a look that it computes everything.
        estimate: time to choose, as a share of dense causal attention; None likewise.
        attend: time of the whole, dense attention included where the method leaves it to that.
        backend: what ran.
        failed: why there are no times.
    """

    method: str
    density: float | None = None
    estimate: float | None = None
    attend: float | None = None
    backend: str = ""
    failed: str = ""


@dataclass(frozen=True)
class Recall:
    """Mean over heads and layers of the share of the attention mass that is seen.

    Attributes:
        settings: of the method, where they differ from its defaults.
        density, recall: of the method.
        oracle: recall of the heaviest keys of each query, at the same density.
        static_density, static: of ``powerattention`` with the window that comes nearest to the density.
    """

    method: str
    settings: dict[str, Any]
    density: float
    recall: float
    oracle: float
    static_density: float
    static: float


def preset_methods() -> dict[str, SparsePrefill]:
    """Every registered method of the ``attention`` stage as the preset of its name sets it, else with its defaults."""
    configs = presets()
    methods = {}
    for name, method in sorted(METHODS["attention"].items().items()):
        preset = configs[name].attention if name in configs else None
        found = preset if preset is not None and preset.name == name else method()
        assert isinstance(found, SparsePrefill)
        methods[name] = found
    return methods


def methods_with(settings: Settings) -> dict[str, SparsePrefill]:
    """Every registered method: with its ``settings``, or as its preset sets it where these do not name it."""
    methods = preset_methods()
    for name in methods.keys() & settings.keys():
        found = build_method("attention", {"method": name, **settings[name]})
        assert isinstance(found, SparsePrefill)
        methods[name] = found
    return methods


def video_prompt(
    length: int, layout: Layout, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> PrefillInputs:
    """`structured_inputs` of a video of square frames and a little text, ``length`` tokens in all.

    Raises:
        ValueError: fewer than 64 tokens, or a layout that cannot be.
    """
    if length < 64:
        raise ValueError(f"lengths must be at least 64, not {length}")
    side = min(14, math.isqrt(length // 32))
    frames = (length - 32) // side**2
    inputs = structured_inputs((frames, side, side), length - frames * side**2, **layout._asdict())
    query, key, value = (x.to(device, dtype) for x in (inputs.query, inputs.key, inputs.value))
    return replace(inputs, query=query, key=key, value=value, coordinates=inputs.needed("coordinates").to(device))


def random_pattern(length: int, groups: int, share: float, blocks: tuple[int, int], *, seed: int = 0) -> SparsePattern:
    """The diagonal and random blocks, so that about ``share`` of the causal pairs is computed."""
    own = diagonal_blocks(length, *blocks, torch.device("cpu"))
    least = density(SparsePattern(own[None, None], None, *blocks), length, length)
    if not least <= share <= 1:
        raise ValueError(
            f"density {share} is not possible at {length} tokens: it must be from {least:.3f} (the diagonal) to 1"
        )
    draw = torch.rand(groups, *own.shape, generator=torch.Generator().manual_seed(seed))
    chosen = (draw * (1 - least) < share - least) & causal_blocks(length, *blocks, own.device)
    return SparsePattern((chosen | own)[None], None, *blocks)


def dense_paths(query: Tensor, key: Tensor, value: Tensor, scale: float) -> dict[str, Callable[[], Tensor]]:
    """Dense causal attention ``[1, heads, L, d]`` through each of torch's kernels; whether one is there, a call tells.

    With the key heads repeated beforehand and, on GPUs, also as they are.
    """
    backends = {FLASH: SDPBackend.FLASH_ATTENTION}
    if query.is_cuda:
        backends |= {"cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    elif 4 * query.shape[1] * query.shape[2] ** 2 <= _MATH_BYTES:
        backends["math"] = SDPBackend.MATH

    def attend(backend: SDPBackend, keys: Tensor, values: Tensor, grouped: bool) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale, enable_gqa=grouped)

    groups = query.shape[1] // key.shape[1]
    wide_key, wide_value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    paths: dict[str, Callable[[], Tensor]] = {}
    for name, backend in backends.items():
        paths[name] = partial(attend, backend, wide_key, wide_value, False)
        if query.is_cuda and groups > 1:
            paths[f"{name}, grouped"] = partial(attend, backend, key, value, True)
    return paths


def median_times(
    runs: Mapping[K, Callable[[], object]], device: torch.device, rounds: Rounds
) -> tuple[dict[K, float], dict[K, str]]:
    """Median milliseconds of each, and the errors of those that do not run; on a GPU of some calls in a row."""
    wait: Callable[[], None] = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None

    def timed(run: Callable[[], object], calls: int = 1) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        return (time.perf_counter() - start) * 1e3 / calls

    failed: dict[K, str] = {}
    calls: dict[K, int] = {}
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch gives its reasons for refusing a kernel as warnings
        for name, run in runs.items():
            try:
                timed(run)
                # Calls that are short beside their launch are timed in a row.
                calls[name] = 1 if device.type == "cpu" else max(1, min(_MOST_CALLS, int(_CALLS_MS / timed(run))))
            except Exception as error:  # one backend or method that fails must not take the others' times along
                failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:_ERROR_CHARACTERS]
        times: dict[K, list[float]] = {name: [] for name in calls}
        for _ in range(rounds.warmup - 1):
            for name in times:
                timed(runs[name])
        end = time.perf_counter() + rounds.seconds
        for turn in range(rounds.repeats):
            if turn >= _LEAST_ROUNDS and time.perf_counter() > end:
                break
            for name, row in times.items():
                row.append(timed(runs[name], calls[name]))
    return {name: statistics.median(row) for name, row in times.items()}, failed


def time_engine(
    threads: Sequence[int],
    lengths: Sequence[int],
    densities: Sequence[float],
    *,
    layout: Layout = LAYOUT,
    blocks: tuple[int, int] = (128, 64),
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    rounds: Rounds = ROUNDS,
) -> Iterator[EngineTiming]:
    """Each backend beside dense causal attention, on random patterns.

    Raises:
        ValueError: a density below that of the diagonal blocks.
        RuntimeError: dense attention does not run.
    """
    device = device or torch.device("cpu")
    candidates = ("triton", "flex", "flex_flash", "flashinfer") if device.type == "cuda" else ("gather", "flex")
    backends = [name for name in candidates if unavailable(name, device) is None]
    for count in threads:
        for length in lengths:
            with _threads(count):
                yield from _time_patterns(length, densities, backends, layout, blocks, dtype, device, rounds)


def _time_patterns(
    length: int,
    densities: Sequence[float],
    backends: Sequence[str],
    layout: Layout,
    blocks: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    rounds: Rounds,
) -> Iterator[EngineTiming]:
    draw = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, count, length, layout.dim, generator=draw, device=device, dtype=dtype)
        for count in (layout.heads, layout.kv_heads, layout.kv_heads)
    )
    scale = layout.dim**-0.5
    paths = dense_paths(query, key, value, scale)
    patterns = {
        (per, share): random_pattern(length, groups, share, blocks)
        for per, groups in zip(PATTERNS_PER, (layout.kv_heads, layout.heads), strict=True)
        for share in densities
    }
    runs: dict[tuple[str, str, float], Callable[[], Tensor]] = {("", path, 1.0): run for path, run in paths.items()}
    for (per, share), pattern in patterns.items():
        moved = replace(pattern, blocks=pattern.blocks.to(device))
        for backend in backends:
            runs[per, backend, share] = partial(
                block_sparse_attention, query, key, value, moved, scale=scale, backend=backend
            )
    times, failed = median_times(runs, device, rounds)
    dense = {path: times["", path, 1.0] for path in paths if ("", path, 1.0) in times}
    if not dense:
        raise RuntimeError(f"dense attention does not run: {', '.join(failed.values())}")
    for (per, share), pattern in patterns.items():
        yield EngineTiming(
            torch.get_num_threads(),
            length,
            per,
            density(pattern, length, length),
            dense,
            {backend: times[per, backend, share] for backend in backends if (per, backend, share) in times},
            {backend: failed[per, backend, share] for backend in backends if (per, backend, share) in failed},
        )


def time_estimates(
    methods: Mapping[str, SparsePrefill],
    inputs: PrefillInputs,
    *,
    threads: int,
    rounds: Rounds = ROUNDS,
) -> list[EstimateTiming]:
    """What choosing and attending cost each method, as shares of dense causal attention of the same layer.

    Raises:
        RuntimeError: dense attention does not run.
    """
    runs: dict[tuple[str, str], Callable[[], object]] = {
        ("", path): run
        for path, run in dense_paths(inputs.query[None], inputs.key[None], inputs.value[None], inputs.scale).items()
    }
    backends: dict[str, str] = {}

    def attend(name: str) -> None:
        backends[name] = methods[name].attend(inputs).backend

    for name, method in methods.items():
        if not method.is_dense(inputs.length, inputs.layer, inputs.depth):
            runs[name, "parts"] = partial(method.parts, inputs)
        runs[name, "attend"] = partial(attend, name)
    with _threads(threads):
        times, failed = median_times(runs, inputs.query.device, rounds)
    dense = min((ms for (name, _), ms in times.items() if not name), default=None)
    if dense is None:
        raise RuntimeError(f"dense attention does not run: {', '.join(failed.values())}")
    timings = []
    for name, method in methods.items():
        errors = [error for (of, _), error in failed.items() if of == name]
        if errors:
            timings.append(EstimateTiming(name, failed=errors[0]))
            continue
        whole = times[name, "attend"] + (dense if backends[name] == "dense" else 0.0)
        chosen = estimate = None
        if (name, "parts") in times:
            estimate = times[name, "parts"] / dense
            with torch.inference_mode():
                chosen = chosen_density(method.parts(inputs), inputs)
        timings.append(EstimateTiming(name, chosen, estimate, whole / dense, backends[name]))
    return timings


def chosen_density(parts: Sequence[Part], inputs: PrefillInputs) -> float:
    """Computed pairs by causal ones, whether or not computing them so would pay."""
    heads, length = inputs.query.shape[:2]
    pairs = 0
    for part in parts:
        each = int(computed_pairs(part.pattern, part.query.shape[1], part.key.shape[1]))
        pairs += each * (heads // part.pattern.blocks.shape[1])
    return pairs / (heads * length * (length + 1) // 2)


def recall_tables(names: Collection[str], *, probe: bool = False) -> Iterator[tuple[str, tuple[Recall, ...]]]:
    """What each of these methods sees of a made-up prompt and, if asked for, of what the probe models attend with.

    Yields:
        What it was measured on, and the rows.
    """
    layers = [video_prompt(RECALL_LENGTH, RECALL_LAYOUT)]
    yield f"{RECALL_LENGTH} made-up tokens, {_heads(RECALL_LAYOUT)}", _recalls_with(RECALL_SETTINGS, names, layers)
    for model_type in PROBE_MODEL_TYPES if probe else ():
        layers = probe_layers(model_type)
        source = f"the probe model {model_type}, {layers[0].length} tokens"
        yield source, _recalls_with(PROBE_SETTINGS, names, layers)


def _recalls_with(settings: Settings, names: Collection[str], layers: Sequence[PrefillInputs]) -> tuple[Recall, ...]:
    methods = {name: method for name, method in methods_with(settings).items() if name in names}
    return recalls(methods, layers, settings["powerattention"]["block"])


def recalls(methods: Mapping[str, SparsePrefill], layers: Sequence[PrefillInputs], block: int) -> tuple[Recall, ...]:
    """What each method sees of the layers of one prompt.

    Args:
        block: of ``powerattention`` where it is the yardstick.

    Raises:
        PromptTooLongError: the prompt is too long to be measured.
    """
    statics = static_densities(layers[0].length, block)

    @cache
    def static_recall(window: int) -> float:
        return statistics.mean(float(measure(static_method(window, block), one).recall.mean()) for one in layers)

    rows = []
    for name, method in methods.items():
        found = [measure(method, inputs) for inputs in layers]
        densities = [min(1.0, float(one.density.mean())) for one in found]
        seen = [float(one.recall.mean()) for one in found]
        oracle = [
            float(mass_recall(inputs, oracle_pairs(inputs, share)).mean())
            for inputs, share in zip(layers, densities, strict=True)
        ]
        average = statistics.mean(densities)
        window = min(statics, key=lambda window: abs(statics[window] - average))
        rows.append(
            Recall(
                name,
                method.model_dump(mode="json", exclude_defaults=True),
                average,
                statistics.mean(seen),
                statistics.mean(oracle),
                statics[window],
                static_recall(window),
            )
        )
    return tuple(rows)


def static_method(window: int, block: int) -> PowerAttention:
    return PowerAttention.model_validate({"window": window, "sink": 1, "block": block})


def static_densities(length: int, block: int) -> dict[int, float]:
    """Density of ``powerattention`` by its window in blocks."""
    nothing = torch.empty(1, length, 1)
    inputs = PrefillInputs(nothing, nothing, nothing, 1.0)
    patterns = {
        window: static_method(window, block).pattern(inputs) for window in range(1, num_blocks(length, block) + 1)
    }
    return {window: density(pattern, length, length) for window, pattern in patterns.items()}


def probe_layers(model_type: str) -> list[PrefillInputs]:
    """What each layer of a probe model attends with on a made video with its question; on the CPU in float32."""
    from spatiotoken.answer import prepare_inputs
    from spatiotoken.attention.observe import observed
    from spatiotoken.probe import examples
    from spatiotoken.probe.dataset import clip_metadata
    from spatiotoken.probe.evaluate import load_probe_model

    model, processor = load_probe_model(model_type)
    example = next(examples("test", 1, num_frames=PROBE_FRAMES))
    prompt = prepare_inputs(processor, example.frames, example.question, clip_metadata(PROBE_FRAMES))
    layers: list[PrefillInputs] = []

    def keep(one: PrefillInputs) -> None:
        layers.append(replace(one, query=one.query.clone(), key=one.key.clone(), value=one.value.clone()))

    observed(model, prompt, keep, processor=processor)
    return layers


def engine_tables(timings: Sequence[EngineTiming], layout: Layout, blocks: tuple[int, int]) -> str:
    """Markdown: the milliseconds of dense attention, then the backends beside it."""
    backends = list(dict.fromkeys(name for one in timings for name in (*one.sparse_ms, *one.failed)))
    paths = list(dict.fromkeys(path for one in timings for path in one.dense_ms))
    # On CPUs flash is all there is, but for short prompts.
    kernels = ["", FLASH] if any(path.startswith("cudnn") for path in paths) else [""]
    by_size = {(one.threads, one.length): one for one in timings}
    dense = markdown(
        ("threads", "tokens", *(f"{path}, ms" for path in paths), "best"),
        [
            (
                str(threads),
                str(length),
                *(f"{one.dense_ms[path]:.2f}" if path in one.dense_ms else "-" for path in paths),
                min(one.dense_ms, key=one.dense_ms.__getitem__),
            )
            for (threads, length), one in by_size.items()
        ],
    )
    ratios = [(backend, kernel) for backend in backends for kernel in kernels]
    sparse = markdown(
        (
            *("threads", "tokens", "a pattern per", "density"),
            *(f"{backend} / {kernel or 'dense'}" for backend, kernel in ratios),
        ),
        [
            (
                *(str(one.threads), str(one.length), one.per, _number(one.density)),
                *(one.failed.get(backend) or _number(one.ratio(backend, kernel)) for backend, kernel in ratios),
            )
            for one in timings
        ],
    )
    return (
        f"Dense causal attention, {_heads(layout)}.\n\n{dense}\n\n"
        f"Sparse attention on random blocks of {blocks[0]} queries by {blocks[1]} keys and the diagonal: time over "
        f"that of (dense attention x density), where dense is the best of the above.\n\n{sparse}"
    )


def estimate_table(timings: Sequence[EstimateTiming], layout: Layout, length: int) -> str:
    """Markdown."""
    rows = [
        (one.method, _number(one.density), _number(one.estimate), _number(one.attend), one.failed or one.backend)
        for one in timings
    ]
    return (
        f"Methods at their presets on {length} made-up tokens, {_heads(layout)}: times as shares of that of dense "
        "causal attention, which itself runs after the estimate where the backend is dense.\n\n"
        + markdown(("method", "density chosen", "estimate", "in all", "backend"), rows)
    )


def recall_table(rows: Sequence[Recall], source: str) -> str:
    """Markdown."""
    header = ("method", "setting", "density", "recall", "best keys at that density", "powerattention", "its density")
    cells = [
        (
            one.method,
            ", ".join(f"{key} {value}" for key, value in one.settings.items()),
            *map(_number, (one.density, one.recall, one.oracle, one.static, one.static_density)),
        )
        for one in rows
    ]
    return (
        f"Recall of the attention mass on {source}, mean over heads and layers. A key pooled with others is seen where "
        f"their pool is.\n\n{markdown(header, cells)}"
    )


def _heads(layout: Layout) -> str:
    return f"{layout.heads} query and {layout.kv_heads} key heads of {layout.dim}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
