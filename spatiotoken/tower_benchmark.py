"""What the key ``fast_tower`` saves of a vision tower: random weights in the shapes of released towers.

``get_video_features`` is timed, so tower and projector, beside a language model that never runs.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from spatiotoken.benchmark import (
    UNPATCHED,
    call_ms,
    check_rounds,
    in_process,
    markdown,
    peak_growth,
    ratio_of_medians,
)
from spatiotoken.config import load_config
from spatiotoken.patches.adapter import find_adapter
from spatiotoken.patching import patched

TOWER_CONFIGS: Mapping[str, Mapping[str, Any] | None] = {
    UNPATCHED: None,
    "dense": {},
    "dense, fast_tower": {"fast_tower": True},
}
"""The same but for how the tower runs."""
Size = Literal["cpu", "7b"]
Video = tuple[Tensor, ...]
"""Arguments of ``get_video_features``: pixels, and in the Qwen-VL families the grid."""

_WIDTH = 3584
"""Hidden size of the language model, which the projectors lead to."""
_TEXT = {
    "hidden_size": _WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "tie_word_embeddings": False,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
}
_VIDEO_SEED, _WEIGHTS_SEED = 0, 1


@dataclass(frozen=True)
class Tower:
    """The shape of a released tower.

    Attributes:
        layers: of the released one; at ``cpu`` size it has ``cpu_layers``.
        vision: its config but for the number of layers.
        top: what the model around it says of it.
    """

    layers: int
    cpu_layers: int
    vision: Mapping[str, Any]
    top: Mapping[str, Any]


_QWEN = {"num_heads": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}
_CLIP = {"num_attention_heads": 16, "patch_size": 14}
TOWERS: Mapping[str, Tower] = {
    "qwen2_vl": Tower(32, 4, {**_QWEN, "embed_dim": 1280, "hidden_size": _WIDTH, "patch_size": 14}, {}),
    "qwen2_5_vl": Tower(
        32,
        8,  # the fewest with a block that attends to whole frames
        {
            **_QWEN,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "out_hidden_size": _WIDTH,
            "patch_size": 14,
            "window_size": 112,
        },
        {},
    ),
    "qwen3_vl": Tower(
        27,
        4,
        {**_QWEN, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": _WIDTH, "patch_size": 16},
        {},
    ),
    "llava_onevision": Tower(
        26,
        4,
        {
            **_CLIP,
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "image_size": 384,
            "vision_use_head": False,
        },
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    ),
    "llava_next_video": Tower(
        24,
        12,  # so one of them is left out, where really it is one of 24
        {
            **_CLIP,
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "image_size": 336,
            "projection_dim": 768,
        },
        {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
    ),
}
"""By model type: towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL-8B, SigLIP so400m and CLIP-L."""


@dataclass(frozen=True)
class TowerTiming:
    """One config.

    Attributes:
        milliseconds: of each round, in the order in which they ran.
        ratio: median over the unpatched median, below 1 where the config is quicker.
        ratio_interval: 95 % bootstrap interval of the ratio, over rounds.
        difference: greatest one of the features to the unpatched ones, as a share of the greatest feature.
        peak_memory_bytes: most that a process held during a call, beyond what it held before it; None if not measured.
    """

    config: str
    milliseconds: tuple[float, ...]
    median_ms: float
    ratio: float
    ratio_interval: tuple[float, float]
    difference: float
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class TowerComparison:
    """Timings of one tower, the unpatched model first.

    Attributes:
        layers: that it has, of ``released_layers``.
        patches: of the whole video that go through the tower, CLS tokens included.
        tokens: that come out of the projector.
    """

    model_type: str
    layers: int
    released_layers: int
    frames: int
    patches: int
    tokens: int
    timings: tuple[TowerTiming, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Setting:
    """What a process needs to run a tower.

    Attributes:
        side: rows and columns of tokens of a frame, in the Qwen-VL families; the others take one size.
    """

    model_type: str
    layers: int
    frames: int
    side: int
    dtype: torch.dtype
    device: str
    threads: int


def vision_settings(model_type: str, layers: int) -> dict[str, Any]:
    """Of a tower of the released shape, but with ``layers`` layers."""
    tower = TOWERS[model_type]
    vision = {**tower.vision, "num_hidden_layers" if "model_type" in tower.vision else "depth": layers}
    if model_type == "qwen2_5_vl":
        vision["fullatt_block_indexes"] = list(range(7, layers, 8)) or [layers - 1]
    if model_type == "qwen3_vl":
        # At 8, 16 and 24 of 27.
        vision["deepstack_visual_indexes"] = sorted({layers * index // tower.layers for index in (8, 16, 24)})
    return vision


def tower_config(model_type: str, layers: int) -> PreTrainedConfig:
    """Config of a model whose tower has the released shape, but ``layers`` layers."""
    vision = vision_settings(model_type, layers)
    text: dict[str, Any] = dict(_TEXT)
    if "model_type" in vision:
        text["model_type"] = "qwen2" if model_type == "llava_onevision" else "llama"
    return AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **TOWERS[model_type].top)


def compare_towers(
    model_types: Sequence[str] = tuple(TOWERS),
    *,
    size: Size = "cpu",
    frames: int | None = None,
    side: int = 20,
    num_layers: int | None = None,
    repeats: int = 5,
    warmup: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    memory: bool = False,
) -> Iterator[TowerComparison]:
    """Time the vision tower and projector of random models: unpatched and with each of the ``TOWER_CONFIGS``, in turn.

    Attaching a patch is not in a time. Each tower's comparison comes as soon as it is there.

    Args:
        model_types: keys of ``TOWERS``.
        size: ``cpu`` leaves layers out, ``7b`` has all.
        frames: of the one video; by default 8, at size ``7b`` 32.
        side: rows and columns of tokens of a frame, in the Qwen-VL families.
        num_layers: of every tower, in place of the size's own.
        repeats: timed rounds; each runs every config once.
        warmup: rounds before those, beside the one that compares the features.
        dtype: by default float32, at size ``7b`` bfloat16.
        memory: measure the peak memory too, in a process for each config.

    Raises:
        ValueError: an unknown model type, or a number out of range.
    """
    if unknown := set(model_types) - set(TOWERS):
        raise ValueError(f"unknown model types {', '.join(sorted(unknown))}; there are {', '.join(TOWERS)}")
    check_rounds(repeats, warmup)
    frames = frames if frames is not None else 32 if size == "7b" else 8
    if frames < 2 or frames % 2:
        raise ValueError(f"frames must be even, at least 2, not {frames}")
    if side < 1 or (num_layers is not None and num_layers < 2):
        raise ValueError(f"side must be at least 1 and num_layers at least 2, not {side} and {num_layers}")
    dtype = dtype or (torch.bfloat16 if size == "7b" else torch.float32)
    threads = torch.get_num_threads()
    for model_type in model_types:
        tower = TOWERS[model_type]
        layers = num_layers or (tower.layers if size == "7b" else tower.cpu_layers)
        setting = _Setting(model_type, layers, frames, side, dtype, str(device or "cpu"), threads)
        yield _compare(setting, repeats, warmup, memory)
        gc.collect()  # two towers at once may be too much


def _compare(setting: _Setting, repeats: int, warmup: int, memory: bool) -> TowerComparison:
    # First, while this process holds no model beside it.
    peaks = {name: in_process(_peak_memory, setting, name) for name in TOWER_CONFIGS} if memory else {}
    model, video = _model_and_video(setting)
    features = {name: _features(model, video, name) for name in TOWER_CONFIGS}
    times: dict[str, list[float]] = {name: [] for name in TOWER_CONFIGS}
    for turn in range(warmup + repeats):
        for name, row in times.items():
            with _config(model, name):
                elapsed = call_ms(lambda: _encode(model, video), model.device)
            if turn >= warmup:
                row.append(elapsed)
    plain = features[UNPATCHED]
    timings = []
    for name, row in times.items():
        ratio, interval = ratio_of_medians(row, times[UNPATCHED])
        off = float((features[name] - plain).abs().max() / plain.abs().max())
        median = statistics.median(row)
        timings.append(TowerTiming(name, tuple(row), median, ratio, interval, off, peaks.get(name)))
    return TowerComparison(
        model_type=setting.model_type,
        layers=setting.layers,
        released_layers=TOWERS[setting.model_type].layers,
        frames=setting.frames,
        patches=_patches(model, video),
        tokens=len(plain),
        timings=tuple(timings),
    )


def tower_table(comparisons: Sequence[TowerComparison]) -> str:
    """Markdown."""
    memory = any(timing.peak_memory_bytes is not None for one in comparisons for timing in one.timings)
    header = ["tower", "layers", "patches", "config", "ms", "ratio to unpatched", "95 %", "greatest difference"]
    rows = []
    for one in comparisons:
        for timing in one.timings:
            low, high = timing.ratio_interval
            row = [one.model_type, f"{one.layers} of {one.released_layers}", str(one.patches), timing.config]
            row += [f"{timing.median_ms:.1f}", f"{timing.ratio:.3f}", f"{low:.3f} to {high:.3f}"]
            row.append(f"{timing.difference:.1e}" if timing.difference else "0")
            if memory:
                peak = timing.peak_memory_bytes
                row.append("" if peak is None else f"{peak / 2**20:.0f}")
            rows.append(row)
    return markdown(header + ["peak, MiB"] * memory, rows)


def _config(model: PreTrainedModel, name: str) -> AbstractContextManager[Any]:
    found = TOWER_CONFIGS[name]
    return nullcontext() if found is None else patched(model, load_config("dense", **found))


def _features(model: PreTrainedModel, video: Video, name: str) -> Tensor:
    """float32 ``[tokens, D]``, deepstack features beside the projected ones."""
    with _config(model, name), torch.inference_mode():
        output = _encode(model, video)
        return torch.cat([rows.float() for rows in find_adapter(model).read(output)], dim=-1)


def _encode(model: PreTrainedModel, video: Video) -> Any:
    # What is within: around it, families give the pixels different names.
    return find_adapter(model).core(model).get_video_features(*video)


def _peak_memory(setting: _Setting, name: str) -> int:
    torch.set_num_threads(setting.threads)
    model, video = _model_and_video(setting)
    with _config(model, name), torch.inference_mode():
        return peak_growth(lambda: _encode(model, video), model.device)


def _model_and_video(setting: _Setting) -> tuple[PreTrainedModel, Video]:
    """The same of both for the same setting, whatever was drawn before."""
    device = torch.device(setting.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_WEIGHTS_SEED)
        model = AutoModelForImageTextToText.from_config(
            tower_config(setting.model_type, setting.layers), dtype=setting.dtype
        )
    model = model.eval().to(device)
    generator = torch.Generator().manual_seed(_VIDEO_SEED)
    vision = model.config.vision_config
    if not hasattr(vision, "temporal_patch_size"):
        pixels = torch.randn(1, setting.frames, 3, vision.image_size, vision.image_size, generator=generator)
        return model, (pixels.to(device, model.dtype),)
    rows = setting.side * vision.spatial_merge_size
    grid = (setting.frames // vision.temporal_patch_size, rows, rows)
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(grid[0] * rows * rows, width, generator=generator)
    return model, (pixels.to(device, model.dtype), torch.tensor([grid], device=device))


def _patches(model: PreTrainedModel, video: Video) -> int:
    if len(video) == 2:
        return len(video[0])
    embeddings: Any = find_adapter(model).core(model).vision_tower.embeddings
    return video[0].shape[1] * int(embeddings.position_embedding.num_embeddings)
