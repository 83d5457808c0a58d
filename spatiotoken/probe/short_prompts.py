"""Settings of sparse prefill for prompts as short as the probe's, which its presets leave to dense attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Settings = Mapping[str, Mapping[str, Any]]

PROBE_SETTINGS: Settings = {
    "anchorattention": {"theta": 0.0, "step": 4, "block": 8},
    "deltallm": {"threshold": 1.2, "window": 16, "block_q": 16, "block_k": 4},
    "dhsa": {
        "budget": 48,
        "global_tokens": 8,
        "local_tokens": 16,
        "instruction_tokens": 8,
        "block_q": 8,
        "block_k": 8,
    },
    "flexprefill": {"gamma": 0.68, "min_budget": 16, "block": 8},
    "hip": {"k": 24, "sink": 8, "window": 16, "block_q": 8, "block_k": 8},
    "minference": {"vertical": 36, "slash": 9, "sink": 4, "local": 4, "last_queries": 16, "block": 8},
    "mminference": {
        "density": 0.2,
        "vertical": 32,
        "slash": 8,
        "sink": 4,
        "local": 4,
        "last_queries": 16,
        "block": 8,
    },
    "pbs_attn": {"threshold": 0.5, "segment": 32, "block": 8},
    "powerattention": {"window": 4, "block": 8},
    "psa": {"shares": [0.05, 0.15, 0.3, 0.45], "stride": 4, "block": 8},
    "sampleattention": {"alpha": 0.6, "rows": 0.1, "window": 0.1, "block": 8},
    "seerattention": {"sparsity_method": "nz_ratio", "nz_ratio": 0.35, "block": 8},
    "sliding_vertical": {"sink": 4, "window": 20, "columns": 40, "last_queries": 16, "block": 8},
    "spargeattn": {"share": 0.28, "block_q": 8, "block_k": 8},
    "token_sparse": {"coverage": 0.2, "min_tokens": 64, "window": 16, "start": 0.0},
    "xattention": {"threshold": 0.65, "stride": 4, "block": 8},
    "yopo_neighbours": {"radius": 1, "frames": 1, "block": 8},
    "zipvl": {"tau": 0.65, "recent": 16, "spread": 16, "block": 8},
}
"""By method, for about 0.5 and 0.4 of the pairs of the probe models' prompts: 144 and 272 tokens, so small blocks."""
