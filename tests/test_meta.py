"""Nothing is registered without a preset, a row in the method table, and a line in README."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from spatiotoken.catalog import methods_page, readme_methods, readme_presets
from spatiotoken.config import PatchConfig, presets
from spatiotoken.evaluation.base import DATASETS
from spatiotoken.patches.adapter import ADAPTERS
from spatiotoken.probe import TINY_IMAGE_MODEL_TYPES, TINY_MODEL_TYPES
from spatiotoken.probe.models import PROBE_MODEL_TYPES
from spatiotoken.registry import METHODS, STAGES
from tests.cases import KEEP_ALL, REDUCED

ROOT = Path(__file__).parents[1]
EVERY = [(stage, name) for stage in STAGES for name in METHODS[stage].items()]


@pytest.mark.parametrize(("stage", "name"), EVERY)
def test_every_method(stage: str, name: str) -> None:
    method = METHODS[stage].get(name)
    assert known_presets()[name].methods()[stage].name == name, "needs a preset of its own name"
    assert (stage, name) in KEEP_ALL and (stage, name) in REDUCED, "needs a row in tests/cases.py"
    assert f"| `{name}` | {stage} |" in readme(), "needs a line in README"
    assert method.__module__ == f"spatiotoken.{stage}.{name}", "one method, one file"
    assert method.summary() and len(Path(ROOT, "spatiotoken", stage, f"{name}.py").read_text().splitlines()) <= 150
    assert all(field.description for field in method.model_fields.values()), "parameters are described"
    assert method.kind and method.complexity and method.fidelity, "docs/methods.md tells of them"
    assert f"| `{name}` |" in methods_table(), f"{method.kind!r} is no kind that docs/methods.md has"
    if method.paper:
        assert re.fullmatch(r"\d{4}\.\d{5}", method.paper) and method.paper in (method.__doc__ or "")


def test_no_row_without_a_method() -> None:
    assert set(KEEP_ALL) == set(REDUCED) == set(EVERY)


@pytest.mark.parametrize("model_type", ADAPTERS.items())
def test_every_model(model_type: str) -> None:
    assert model_type in (*TINY_MODEL_TYPES, *TINY_IMAGE_MODEL_TYPES), "needs a tiny model to be tested with"
    assert f"`{model_type}`" in readme(), "needs a line in README"


def test_readme_tables_are_current() -> None:
    """The tables of methods and presets are those that the library itself gives."""
    for rows in (readme_methods(), readme_presets()):
        assert "\n".join(rows) + "\n\n" in readme(), "run `make methods`"
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == methods_page(), "run `make methods`"


def test_probe_page_has_every_preset() -> None:
    page = (ROOT / "docs" / "probe.md").read_text(encoding="utf-8")
    for name in presets():
        # Frame selectors stand in a second table too, of the needles that they find.
        tables = 2 if name in METHODS["frames"].items() else 1
        assert page.count(f"| `{name}` |") == tables * len(PROBE_MODEL_TYPES), f"{name}: run `make probe`"


@cache
def known_presets() -> dict[str, PatchConfig]:
    return presets()


@cache
def methods_table() -> str:
    return methods_page()


@cache
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_dataset_is_documented() -> None:
    """With where its annotations come from."""
    (table,) = re.findall(r"\n\| name \| headline .*?\n\n", (ROOT / "docs" / "evaluation.md").read_text(), re.DOTALL)
    rows = [row.split("|") for row in table.strip().splitlines()[2:]]
    told = {name: row for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    built_in = {name: kind for name, kind in DATASETS.items().items() if kind.__module__.startswith("spatiotoken.")}
    assert told.keys() == built_in.keys()
    for name, kind in built_in.items():
        assert kind.hub is None or f"`{kind.hub}`" in told[name][4], name
        assert ("mean over" in told[name][2]) == (kind.macro is not None), name
        assert all(field.description for field in kind.model_fields.values()) and kind.summary().endswith((".", "to"))
