"""The authors' own results, as ``shared/golden/README`` describes them.

Vectors of permissively licensed code are copied to ``tests/golden``; the others are read from the workplace's shared
folder where there is one, and the test that finds none says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import GOLDEN

SHARED = Path(__file__).parents[2] / "shared" / "golden"


def cases(method: str, kind: str = "") -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Hyper-parameters and tensors of each case of a method, of those whose file begins with ``METHOD_kind``."""
    folder = next((folder for folder in (GOLDEN, SHARED) if (folder / f"{method}.json").exists()), None)
    if folder is None:
        pytest.skip(f"all vectors of {method} left out: their licence keeps them outside the repository")
    described = json.loads((folder / f"{method}.json").read_text())["cases"]
    return [
        (case.get("hyper", {}), load_file(folder / case["file"]))
        for case in described
        if case["file"].startswith(f"{method}_{kind}")
    ]
