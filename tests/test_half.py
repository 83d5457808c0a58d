"""Models in bfloat16, as they are released, in float16, and in float32 under autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from spatiotoken import last_report, patched
from spatiotoken.config import PatchConfig
from spatiotoken.probe import TINY_MODEL_TYPES
from tests.cases import keep_all_cases, reduced_cases
from tests.conftest import QUESTION, Family

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = (*DTYPES, "autocast")

Models = Callable[[str, str], tuple[Family, AbstractContextManager[Any]]]
"""A family, and what its model is called in, by the family's name and the precision."""


@pytest.fixture(scope="module")
def models(families: dict[str, Family]) -> Models:
    """Those of a dtype are models of their own, since rounding cannot be undone."""
    made: dict[tuple[str, str], Family] = {}
    for precision, dtype in DTYPES.items():
        for name in TINY_MODEL_TYPES:
            made[name, precision] = families[name].fresh()
            made[name, precision].model.to(dtype)

    def find(name: str, precision: str) -> tuple[Family, AbstractContextManager[Any]]:
        if precision == "autocast":
            return families[name], torch.autocast("cpu", torch.bfloat16)
        return made[name, precision], nullcontext()

    return find


def in_turn(cases: list[Any], every: int = 1) -> list[Any]:
    """Each, or one in ``every``, on one family and in one precision; the others when slow tests run."""
    families = len(TINY_MODEL_TYPES)
    return [
        pytest.param(
            name,
            precision,
            *case.values,
            id=f"{name}-{precision}-{case.id}",
            marks=[]
            if number % every == 0 and (place, turn) == (number % families, number // families % len(PRECISIONS))
            else [pytest.mark.slow],
        )
        for number, case in enumerate(cases)
        for place, name in enumerate(TINY_MODEL_TYPES)
        for turn, precision in enumerate(PRECISIONS)
    ]


def asked(family: Family) -> dict[str, torch.Tensor]:
    inputs = family.inputs([("image", "nasa"), ("video", "pancake", 8), QUESTION], ["How many people are there?"])
    return {name: x.to(family.model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}


@pytest.mark.parametrize(("name", "precision", "config"), in_turn(keep_all_cases(), every=3))
def test_keep_all_is_identical(name: str, precision: str, config: PatchConfig, models: Models) -> None:
    family, context = models(name, precision)
    inputs = asked(family)
    with context:
        expected = family.generate(inputs, new=2)
        with patched(family.model, config):
            actual = family.generate(inputs, new=2)
    assert torch.equal(torch.stack(actual.scores), torch.stack(expected.scores))


@pytest.mark.parametrize(("name", "precision", "config"), in_turn(reduced_cases()))
def test_close_to_float32(
    name: str, precision: str, config: PatchConfig, models: Models, families: dict[str, Family]
) -> None:
    """Which tokens are kept may differ where some are nearly as good, and about how many where a threshold decides."""
    kept = []
    for family, context in (models(name, precision), (families[name], nullcontext())):
        inputs = asked(family)
        with context, patched(family.model, config):
            answer = family.generate(inputs, new=2)
            kept.append(last_report(family.model).visual_kept)
            logits = family.logits(inputs)
        assert bool(logits.isfinite().all())
        assert precision == "autocast" or logits.dtype == family.model.dtype
        assert all(bool(score.isfinite().all()) for score in answer.scores)
    assert 0 < kept[0] and abs(kept[0] - kept[1]) <= 0.2 * kept[1]
