"""Models in bfloat16, as they are released, and in float16."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spatiotoken import last_report, patched
from spatiotoken.config import PatchConfig
from spatiotoken.probe import TINY_MODEL_TYPES
from tests.cases import keep_all_cases, reduced_cases
from tests.conftest import QUESTION, Family


@pytest.fixture(scope="module")
def halves(families: dict[str, Family]) -> dict[torch.dtype, dict[str, Family]]:
    """Models of their own, since rounding cannot be undone."""
    made: dict[torch.dtype, dict[str, Family]] = {}
    for dtype in (torch.bfloat16, torch.float16):
        made[dtype] = {name: families[name].fresh() for name in TINY_MODEL_TYPES}
        for family in made[dtype].values():
            family.model.to(dtype)
    return made


def in_turn(cases: list[Any]) -> list[Any]:
    """Each on one family and in one of both dtypes; on the others when slow tests run."""
    families, dtypes = len(TINY_MODEL_TYPES), (torch.bfloat16, torch.float16)
    return [
        pytest.param(
            name,
            dtype,
            *case.values,
            id=f"{name}-{str(dtype).removeprefix('torch.')}-{case.id}",
            marks=[] if place == number % families and half == number // families % 2 else [pytest.mark.slow],
        )
        for number, case in enumerate(cases)
        for place, name in enumerate(TINY_MODEL_TYPES)
        for half, dtype in enumerate(dtypes)
    ]


def asked(family: Family) -> dict[str, torch.Tensor]:
    inputs = family.inputs([("image", "nasa"), ("video", "pancake", 8), QUESTION], ["How many people are there?"])
    return {name: x.to(family.model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}


@pytest.mark.parametrize(("name", "dtype", "config"), in_turn(keep_all_cases()))
def test_keep_all_is_identical(
    name: str, dtype: torch.dtype, config: PatchConfig, halves: dict[torch.dtype, dict[str, Family]]
) -> None:
    family = halves[dtype][name]
    inputs = asked(family)
    expected = family.generate(inputs, new=2)
    with patched(family.model, config):
        actual = family.generate(inputs, new=2)
    assert torch.equal(torch.stack(actual.scores), torch.stack(expected.scores))


@pytest.mark.parametrize(("name", "dtype", "config"), in_turn(reduced_cases()))
def test_close_to_float32(
    name: str,
    dtype: torch.dtype,
    config: PatchConfig,
    halves: dict[torch.dtype, dict[str, Family]],
    families: dict[str, Family],
) -> None:
    """Which tokens are kept may differ where some are nearly as good, and about how many where a threshold decides."""
    kept = []
    for family in (halves[dtype][name], families[name]):
        inputs = asked(family)
        with patched(family.model, config):
            answer = family.generate(inputs, new=2)
            kept.append(last_report(family.model).visual_kept)
            logits = family.logits(inputs)
        assert logits.dtype == family.model.dtype and bool(logits.isfinite().all())
        assert all(bool(score.isfinite().all()) for score in answer.scores)
    assert 0 < kept[0] and abs(kept[0] - kept[1]) <= 0.2 * kept[1]
