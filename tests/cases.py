"""The method table: every registered method, with settings that change nothing and settings that do.

``tests/test_meta.py`` checks that no method is missing here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from spatiotoken.attention import Attended, PrefillInputs, SparsePrefill
from spatiotoken.config import PatchConfig, load_config
from spatiotoken.frames import FrameSelector
from spatiotoken.layers.base import LayerReducer
from spatiotoken.registry import METHODS
from spatiotoken.structures import FrameChoice, Frames, LayerReduction, LayerTokens, ReducedTokens, VideoFeatures
from spatiotoken.tokens import TokenReducer

KEEP_ALL: dict[tuple[str, str], dict[str, Any]] = {
    ("frames", "uniform"): {"num_frames": 1000},
    ("frames", "kmeans"): {"num_frames": 1000},
    ("frames", "aks"): {"num_frames": 1000, "scorer": "tower"},
    ("frames", "date_tass"): {"num_frames": 1000, "scorer": "tower"},
    ("frames", "dcode"): {"num_frames": 1000, "scorer": "pixels"},
    ("frames", "dpp"): {"num_frames": 1000},
    ("frames", "f2c"): {"num_frames": 1000, "full_frames": 1000, "scorer": "tower"},
    ("frames", "fps"): {"num_frames": 1000, "rate": 1000.0},
    ("frames", "kffocus"): {"num_frames": 1000},
    ("frames", "ktv"): {"num_frames": 1000, "scorer": "tower"},
    ("frames", "longvu"): {"num_frames": 1000, "scorer": "tower"},
    ("frames", "mdp3"): {"num_frames": 1000, "scorer": "tower"},
    ("frames", "slow_fast"): {"num_frames": 1000, "fast_share": 1.0},
    ("frames", "tifre"): {"num_frames": 1000, "scorer": "tower"},
    ("frames", "ts_llava"): {"num_frames": 1000},
    ("frames", "tstar"): {"num_frames": 1000, "scorer": "tower"},
    ("vision", "ats"): {"retention": 1.0},
    ("vision", "early_merge"): {"similarity": 1.0},
    ("vision", "sta"): {"retention": 1.0},
    ("vision", "static_patches"): {"retention": 1.0},
    ("vision", "testa"): {"retention": 1.0},
    ("vision", "tome"): {"retention": 1.0},
    ("vision", "zero_tprune"): {"retention": 1.0},
    ("tokens", "random"): {"retention": 1.0},
    ("tokens", "dcode_tokens"): {"retention": 1.0, "threshold": 1.0},
    ("tokens", "ts_llava_tokens"): {"retention": 1.0},
    ("tokens", "downsample"): {"retention": 1.0},
    ("tokens", "divprune"): {"retention": 1.0},
    ("tokens", "evs"): {"retention": 1.0},
    ("tokens", "dtd"): {"retention": 1.0},
    ("tokens", "dycoke"): {"merging_ratio": 0.0},
    ("tokens", "fastvid"): {"retention": 1.0},
    ("tokens", "flashvid"): {"retention": 1.0},
    ("tokens", "holitom"): {"retention": 1.0},
    ("tokens", "prunevid"): {"similarity": 1.0, "cluster_ratio": 1.0},
    ("tokens", "learning_free"): {"retention": 1.0},
    ("tokens", "visionzip"): {"retention": 1.0},
    ("tokens", "vidcom2"): {"retention": 1.0},
    ("tokens", "vtc_cls"): {"retention": 1.0},
    ("tokens", "fopru"): {"retention": 1.0},
    ("tokens", "long_tail"): {"min_retention": 1.0},
    ("tokens", "correlation_guided"): {"repeats": 1.0},
    ("tokens", "llava_scissor"): {"threshold": 1},
    ("tokens", "aim"): {"retention": 1.0},
    ("tokens", "aot"): {"retention": 1.0},
    ("tokens", "vqtoken_free"): {"retention": 1.0},
    ("tokens", "cdpruner"): {"retention": 1.0},
    ("tokens", "todre"): {"retention": 1.0},
    ("tokens", "ktv_tokens"): {"retention": 1.0},
    ("tokens", "catp"): {"retention": 1.0},
    ("tokens", "hired"): {"retention": 1.0},
    ("tokens", "globalcom2"): {"retention": 1.0},
    ("layers", "fastv"): {"layer": 2, "retention": 1.0},
    ("layers", "sparsevlm"): {"layers": [1], "keep": [1.0], "scale": None},
    ("layers", "mustdrop"): {"layers": [1], "individual": 0.0},
    ("layers", "aim_prune"): {"start": 1, "end": 2, "least": 1.0},
    ("layers", "holitom_merge"): {"layer": 2, "retention": 1.0},
    ("layers", "pyramiddrop"): {"keep": [1.0, 1.0, 1.0]},
    ("layers", "transprune"): {"keep": [1.0, 1.0, 1.0]},
    ("layers", "corematching"): {"min_retention": 1.0},
    ("layers", "todre_drop"): {"layer": 2, "threshold": 0},
    ("layers", "dyvte"): {"layer": 2, "threshold": 0},
    ("layers", "yopo"): {"retention": 1.0},
    ("layers", "lazyllm"): {"layers": [1, 2, 3], "shares": [1, 1, 1]},
    ("layers", "spatten"): {"shares": [1, 1]},
    ("layers", "zipvl_tokens"): {"tau": 1},
    ("layers", "framefusion"): {"cost": 1.0},
    ("layers", "sttm"): {"layer": 2, "spatial": 1.1, "temporal": 1.1},
    ("attention", "sliding_vertical"): {"window": 100_000},
    ("attention", "anchorattention"): {"theta": 1e6, "step": 2, "block": 4},
    ("attention", "deltallm"): {"window": 100_000},
    ("attention", "dhsa"): {"budget": 100_000},
    ("attention", "flexprefill"): {"gamma": 1.0},
    ("attention", "hip"): {"window": 100_000, "block_q": 4, "block_k": 4},
    ("attention", "minference"): {"vertical": 100_000},
    ("attention", "mminference"): {"density": 1.0},
    ("attention", "pbs_attn"): {"threshold": 1},
    ("attention", "powerattention"): {"window": 1000, "block": 4},
    ("attention", "psa"): {"shares": [1, 1, 1, 1]},
    ("attention", "sampleattention"): {"alpha": 1},
    ("attention", "seerattention"): {"sparsity_method": "nz_ratio", "nz_ratio": 1.0},
    ("attention", "spargeattn"): {"share": 1.0},
    ("attention", "token_sparse"): {"coverage": 0},
    ("attention", "xattention"): {"threshold": 1.0},
    ("attention", "yopo_neighbours"): {"radius": 1000, "frames": 1000, "block": 4},
    ("attention", "zipvl"): {"tau": 1},
}

REDUCED: dict[tuple[str, str], dict[str, Any]] = {
    ("frames", "uniform"): {"num_frames": 2},
    ("frames", "kmeans"): {"num_frames": 2},
    ("frames", "aks"): {"num_frames": 2, "scorer": "tower"},
    ("frames", "date_tass"): {"num_frames": 2, "scorer": "tower"},
    ("frames", "dcode"): {"num_frames": 2, "scorer": "pixels"},
    ("frames", "dpp"): {"num_frames": 2},
    ("frames", "f2c"): {"num_frames": 3, "full_frames": 1, "scorer": "tower"},
    ("frames", "fps"): {"num_frames": 2, "rate": 1000.0},
    ("frames", "kffocus"): {"num_frames": 2},
    ("frames", "ktv"): {"num_frames": 2, "scorer": "tower"},
    ("frames", "longvu"): {"num_frames": 2, "scorer": "tower"},
    ("frames", "mdp3"): {"num_frames": 2, "scorer": "tower"},
    ("frames", "slow_fast"): {"num_frames": 3, "threshold": 0.5},
    ("frames", "tifre"): {"num_frames": 2, "scorer": "tower"},
    ("frames", "ts_llava"): {"num_frames": 2},
    ("frames", "tstar"): {"num_frames": 2, "scorer": "tower"},
    ("vision", "ats"): {"retention": 0.5},
    ("vision", "early_merge"): {"similarity": 0.0, "behind": [0.0]},
    ("vision", "sta"): {"retention": 0.4},
    ("vision", "static_patches"): {"retention": 0.5},
    ("vision", "testa"): {"retention": 0.25},
    ("vision", "tome"): {"retention": 0.25},
    ("vision", "zero_tprune"): {"retention": 0.4},
    ("tokens", "random"): {"retention": 0.3},
    ("tokens", "dcode_tokens"): {"retention": 0.4},
    ("tokens", "ts_llava_tokens"): {"retention": 0.3},
    ("tokens", "downsample"): {"retention": 0.3},
    ("tokens", "divprune"): {"retention": 0.3},
    ("tokens", "evs"): {"retention": 0.4},
    ("tokens", "dtd"): {"retention": 0.25},
    ("tokens", "dycoke"): {"merging_ratio": 0.7},
    ("tokens", "fastvid"): {"retention": 0.5, "segments": 2},
    ("tokens", "flashvid"): {"retention": 0.5, "segments": 2},
    ("tokens", "holitom"): {"retention": 0.25},
    ("tokens", "prunevid"): {"unclustered": 1, "cluster_ratio": 0.5},
    ("tokens", "learning_free"): {"retention": 0.25},
    ("tokens", "visionzip"): {"retention": 0.3},
    ("tokens", "vidcom2"): {"retention": 0.3},
    ("tokens", "vtc_cls"): {"retention": 0.3},
    ("tokens", "fopru"): {"retention": 0.3, "granularity": "row"},
    ("tokens", "long_tail"): {},
    ("tokens", "correlation_guided"): {"similarity": 0.0, "repeats": 0.3},
    ("tokens", "llava_scissor"): {"threshold": 0.4},
    ("tokens", "aim"): {"retention": 0.25},
    ("tokens", "aot"): {"retention": 0.25, "clips": 2},
    ("tokens", "vqtoken_free"): {"retention": 0.25},
    ("tokens", "cdpruner"): {"retention": 0.3},
    ("tokens", "todre"): {"retention": 0.3},
    ("tokens", "ktv_tokens"): {"retention": 0.3},
    ("tokens", "catp"): {"retention": 0.3},
    ("tokens", "hired"): {"retention": 0.3},
    ("tokens", "globalcom2"): {"retention": 0.3},
    ("layers", "fastv"): {"layer": 2, "retention": 0.5},
    ("layers", "sparsevlm"): {"layers": [1, 2], "keep": [0.5, 0.4]},
    ("layers", "mustdrop"): {"layers": [1], "overall": 1.1, "individual": 1000.0, "trim": False},
    ("layers", "aim_prune"): {"start": 1, "end": 3},
    ("layers", "holitom_merge"): {"layer": 2, "retention": 0.5},
    ("layers", "pyramiddrop"): {"layers": [1, 2, 3], "keep": [0.6, 0.5, 0.25]},
    ("layers", "transprune"): {"layers": [1, 2, 3], "keep": [0.6, 0.5, 0.25]},
    ("layers", "corematching"): {"layer": 1, "min_retention": 0.5},
    ("layers", "todre_drop"): {"layer": 2, "threshold": 1.0},
    ("layers", "dyvte"): {"layer": 2, "threshold": 1.0},
    ("layers", "yopo"): {"retention": 0.5},
    ("layers", "lazyllm"): {"layers": [1, 3], "shares": [0.6, 0.5]},
    ("layers", "spatten"): {"layer": 1, "shares": [0.7, 0.3]},
    ("layers", "zipvl_tokens"): {"tau": 0.8, "recent": 8, "spread": 8, "layer": 1},
    ("layers", "framefusion"): {"cost": 0.5, "similarity": 0.9},
    ("layers", "sttm"): {"layer": 2, "spatial": 0.5, "temporal": 0.6, "root_level": 0},
    ("attention", "sliding_vertical"): {"sink": 2, "window": 6, "columns": 8, "last_queries": 4, "block": 4},
    ("attention", "anchorattention"): {"theta": 0, "step": 2, "block": 6},
    ("attention", "deltallm"): {"threshold": 4.0, "window": 2, "block_q": 8, "block_k": 2},
    ("attention", "dhsa"): {
        "budget": 12,
        "nms_window": 2,
        "global_tokens": 4,
        "local_tokens": 4,
        "instruction_tokens": 2,
        "block_q": 4,
        "block_k": 4,
    },
    ("attention", "flexprefill"): {"gamma": 0.3, "min_budget": 4, "block": 4},
    ("attention", "hip"): {"k": 4, "sink": 4, "window": 1, "block_q": 4, "block_k": 4},
    ("attention", "minference"): {
        "vertical": 4,
        "slash": 4,
        "sink": 1,
        "local": 2,
        "last_queries": 8,
        "block": 4,
    },
    ("attention", "mminference"): {
        "vertical": 4,
        "slash": 4,
        "sink": 1,
        "local": 2,
        "last_queries": 8,
        "block": 4,
        "density": 0.1,
    },
    ("attention", "pbs_attn"): {"block": 2, "segment": 8, "threshold": 0.4},
    ("attention", "powerattention"): {"window": 1, "sink": 1, "block": 2},
    ("attention", "psa"): {
        "levels": [1, 2, 4],
        "shares": [0.1, 0.3, 0.5],
        "similarity": [-1, -1],
        "stride": 2,
        "block": 4,
        "backend": "gather",
    },
    ("attention", "sampleattention"): {"alpha": 0.3, "rows": 0.2, "window": 0.1, "sink": 1, "block": 4},
    ("attention", "seerattention"): {"sparsity_method": "nz_ratio", "nz_ratio": 0.3, "block": 4},
    ("attention", "spargeattn"): {"share": 0.2, "block_q": 4, "block_k": 4},
    ("attention", "token_sparse"): {"coverage": 0.4, "min_tokens": 4, "window": 4, "kernel": 3, "start": 0},
    ("attention", "xattention"): {"threshold": 0.3, "stride": 2, "block": 4},
    ("attention", "yopo_neighbours"): {"radius": 1, "frames": 0, "block": 4},
    ("attention", "zipvl"): {"tau": 0.3, "recent": 8, "spread": 8, "block": 4},
}

REPRESENTATIVE = (
    *("kmeans", "slow_fast", "tifre"),
    *("static_patches",),
    *("random", "downsample", "visionzip", "cdpruner"),
    *("fastv", "sttm", "transprune", "dyvte"),
    *("sliding_vertical", "mminference", "token_sparse", "psa"),
)

COMBINED: dict[str, dict[str, Any]] = {
    "light": load_config("light").to_dict(),
    "balanced": load_config("balanced", **{"frames.num_frames": 3}).to_dict(),
    "fastest": load_config("fastest", **{"frames.num_frames": 2, "tokens.retention": 0.5}).to_dict(),
    "aggressive": load_config(
        "aggressive",
        **{"frames.num_frames": 2, "tokens.retention": 0.5}
        | {f"attention.{key}": value for key, value in REDUCED["attention", "sliding_vertical"].items()},
    ).to_dict(),
}


def config_of(key: tuple[str, str], settings: dict[str, Any], **more: Any) -> PatchConfig:
    stage, method = key
    return load_config({stage: {"method": method, **settings}, **more})


def keep_all_cases() -> list[Any]:
    return [pytest.param(config_of(key, settings), id="-".join(key)) for key, settings in KEEP_ALL.items()]


def _quick(key: tuple[str, str], settings: dict[str, Any]) -> dict[str, Any]:
    """Settings on the kernel that is quickest on tiny prompts, for what does not stand for the others of its kind."""
    if key[0] != "attention" or key[1] in REPRESENTATIVE:
        return settings
    return {"backend": "reference", **settings}


def reduced_cases(*, every: bool = True) -> list[Any]:
    """All rows of the table.

    Args:
        every: False for what the method itself has little to do with: of each stage only some run by default then, of
            each kind one: that drops, that has several sizes, that merges, that reads the tower, the question or the
            places of tokens, that observes layers, that leaves out queries and that pools keys.
    """
    slow = () if every else [key for key in REDUCED if key[1] not in REPRESENTATIVE]
    single = [
        pytest.param(
            config_of(key, _quick(key, settings)), id="-".join(key), marks=[pytest.mark.slow] if key in slow else []
        )
        for key, settings in REDUCED.items()
    ]
    return single + [pytest.param(load_config(config), id=name) for name, config in COMBINED.items()]


@contextmanager
def replayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make question-aware choices once, at the first prefill, and repeat them afterwards.

    "The same kept tokens" cannot be had otherwise when a longer prompt is computed again: some `tokens` methods compare
    with all text that follows the pictures, `layers` methods rank by its last tokens, or by what all give, and sparse
    prefill treats as prompt what was decoded densely.
    """
    narrowed: dict[int, LayerReduction] = {}
    narrows: dict[type, Any] = {}
    reduced: dict[Any, ReducedTokens] = {}
    originals: dict[type, Any] = {}
    picked: dict[Any, FrameChoice] = {}
    selects: dict[type, Any] = {}
    attends: dict[type, Any] = {}
    prompts: dict[int, int] = {}

    def narrow_once(self: LayerReducer, tokens: LayerTokens, memory: Any) -> LayerReduction:
        if tokens.layer not in narrowed:
            narrowed[tokens.layer] = narrows[type(self)](self, tokens, memory)
        return narrowed[tokens.layer]

    def reduce_once(self: TokenReducer, video: VideoFeatures) -> ReducedTokens:
        key = (video.grid, float(video.embeddings.double().sum()))
        if key not in reduced:
            reduced[key] = originals[type(self)](self, video)
        return reduced[key]

    def pick_once(self: FrameSelector, frames: Frames) -> FrameChoice:
        # Videos are told apart by what the tower makes of them, which no question changes.
        features = frames.features if frames.features is not None else frames.timestamps
        key = (frames.num_frames, float(features.double().sum()))
        if key not in picked:
            picked[key] = selects[type(self)](self, frames)
        return picked[key]

    def attend_once(self: SparsePrefill, inputs: PrefillInputs) -> Attended:
        prompt = prompts.setdefault(inputs.layer, inputs.length)
        states = {name: getattr(inputs, name)[:, :prompt] for name in ("query", "key", "value")}
        places = None if inputs.coordinates is None else inputs.coordinates[:prompt]
        first = attends[type(self)](self, replace(inputs, **states, coordinates=places))
        if prompt == inputs.length or first.output is None:
            return first
        # Rows that were decoded one by one were dense.
        dense = torch.nn.functional.scaled_dot_product_attention(
            inputs.query, inputs.key, inputs.value, is_causal=True, scale=inputs.scale, enable_gqa=True
        )
        return replace(first, output=torch.cat([first.output, dense[:, prompt:]], dim=1))

    for method in METHODS["layers"].items().values():
        assert issubclass(method, LayerReducer)
        narrows[method] = method.reduce
    for method in narrows:  # after all were noted, for some inherit theirs
        monkeypatch.setattr(method, "reduce", narrow_once)
    for method in METHODS["tokens"].items().values():
        if issubclass(method, TokenReducer) and "question" in method.needs:
            originals[method] = method.reduce
            monkeypatch.setattr(method, "reduce", reduce_once)
    for method in METHODS["frames"].items().values():
        if issubclass(method, FrameSelector) and method.needs & {"relevance", "score"}:
            selects[method] = method.select
            monkeypatch.setattr(method, "select", pick_once)
    for method in METHODS["attention"].items().values():
        assert issubclass(method, SparsePrefill)
        attends[method] = method.attend
    for method in attends:
        monkeypatch.setattr(method, "attend", attend_once)
    yield
    monkeypatch.undo()
