"""What the tests of the benchmark's suites have in common."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


def options(settings: Mapping[str, Any]) -> list[str]:
    """``settings`` as the command line has them."""
    return [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]


def run_script(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    """``scripts/benchmark.py``, in this process."""
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *args])
    importlib.import_module("benchmark").main()


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each Markdown table, the header first; all rows are as wide as it."""
    found: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
            if not inside:
                found.append([])
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        inside = line.startswith("|")
    for rows in found:
        assert {len(row) for row in rows} == {len(rows[0])} and set(rows.pop(1)) == {"---"}
    return found


def cells(text: str) -> list[list[str]]:
    """Those of the one Markdown table."""
    (found,) = tables(text)
    return found
