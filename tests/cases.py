"""The method table: every registered method, with settings that change nothing and settings that do.

``tests/test_meta.py`` checks that no method is missing here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from spatiotoken.attention import sliding_vertical
from spatiotoken.config import PatchConfig, load_config
from spatiotoken.layers.fastv import FastV

KEEP_ALL: dict[tuple[str, str], dict[str, Any]] = {
    ("frames", "uniform"): {"num_frames": 1000},
    ("frames", "kmeans"): {"num_frames": 1000},
    ("tokens", "random"): {"retention": 1.0},
    ("tokens", "downsample"): {"retention": 1.0},
    ("tokens", "divprune"): {"retention": 1.0},
    ("tokens", "evs"): {"retention": 1.0},
    ("layers", "fastv"): {"layer": 2, "retention": 1.0},
    ("attention", "sliding_vertical"): {"window": 100_000},
}

REDUCED: dict[tuple[str, str], dict[str, Any]] = {
    ("frames", "uniform"): {"num_frames": 2},
    ("frames", "kmeans"): {"num_frames": 2},
    ("tokens", "random"): {"retention": 0.3},
    ("tokens", "downsample"): {"retention": 0.3},
    ("tokens", "divprune"): {"retention": 0.3},
    ("tokens", "evs"): {"retention": 0.4},
    ("layers", "fastv"): {"layer": 2, "retention": 0.5},
    ("attention", "sliding_vertical"): {"sink": 2, "window": 6, "columns": 8, "last_queries": 4, "block": 16},
}

COMBINED: dict[str, dict[str, Any]] = {
    "light": load_config("light").to_dict(),
    "balanced": load_config("balanced", **{"frames.num_frames": 3}).to_dict(),
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


def reduced_cases() -> list[Any]:
    single = [pytest.param(config_of(key, settings), id="-".join(key)) for key, settings in REDUCED.items()]
    return single + [pytest.param(load_config(config), id=name) for name, config in COMBINED.items()]


@contextmanager
def replayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make question-aware choices once, at the first prefill, and repeat them afterwards.

    "The same kept tokens" cannot be had otherwise when a longer prompt is computed again: FastV ranks by its last
    token, and sparse prefill treats as prompt what was decoded densely.
    """
    select, attend = FastV.select, sliding_vertical.SlidingVertical.attend
    chosen: list[torch.Tensor] = []
    columns: dict[int, torch.Tensor] = {}
    calls = {"layer": 0}

    def select_once(self: FastV, tokens: Any) -> torch.Tensor:
        if not chosen:
            chosen.append(select(self, tokens))
        return chosen[0]

    def attend_once(self: Any, query: Any, key: Any, value: Any, key_valid: Any, scale: float) -> torch.Tensor:
        layer = calls["layer"] % 4
        calls["layer"] += 1
        assert key_valid is None
        if layer not in columns:
            mass = sliding_vertical.column_mass(query[:, :, -self.last_queries :], key, None, scale)
            columns[layer] = sliding_vertical.important_columns(mass, None, self.sink, self.columns)
            assert torch.equal(
                attend(self, query, key, value, None, scale),
                sliding_vertical.gather_attention(
                    query, key, value, columns[layer], None, self.window, self.block, scale
                ),
            )
        dense = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        sparse = sliding_vertical.gather_attention(
            query, key, value, columns[layer], None, self.window, self.block, scale
        )
        # Rows that were decoded one by one were dense; the prompt's own rows end where those begin.
        decoded = max(0, query.shape[2] - lengths.setdefault(layer, query.shape[2]))
        boundary = query.shape[2] - decoded
        return torch.cat([sparse[:, :, :boundary], dense[:, :, boundary:]], dim=2)

    lengths: dict[int, int] = {}
    monkeypatch.setattr(FastV, "select", select_once)
    monkeypatch.setattr(sliding_vertical.SlidingVertical, "attend", attend_once)
    yield
    monkeypatch.undo()
