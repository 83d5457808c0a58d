"""Flash attention as the model's own, where there is none: see ``tests/flash.py``."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from spatiotoken import VideoCache, patched
from spatiotoken.config import PatchConfig, load_config
from spatiotoken.probe import TINY_MODEL_TYPES
from tests import flash
from tests.cases import COMBINED, reduced_cases
from tests.conftest import QUESTION, Family, lent
from tests.flash import flash_attention

PROMPT = [("video", "pancake", 8), QUESTION]
Answer = tuple[Any, Tensor]


def prompts(family: Family) -> list[dict[str, Tensor]]:
    """One without padding, which flash attention takes for several if position ids have gaps, and a batch with."""
    longer = ("video", "nasa", 8 if family.stacks_videos else 12)
    return [
        family.inputs(PROMPT),
        family.inputs(
            [("image", "vp9"), *PROMPT],
            ["Describe", longer, ("video", "nasa", 8), "the scene in detail."],
            ["How many people are there?"],
        ),
    ]


def answers(family: Family, config: PatchConfig | None) -> list[Answer]:
    patch: AbstractContextManager[Any] = nullcontext() if config is None else patched(family.model, config)
    with patch:
        return [(family.generate(inputs, new=2), family.logits(inputs)) for inputs in prompts(family)]


def assert_same(actual: list[Answer], expected: list[Answer], family: Family) -> None:
    for (answer, logits), (wanted, wanted_logits), inputs in zip(actual, expected, prompts(family), strict=True):
        assert torch.equal(answer.sequences, wanted.sequences)
        torch.testing.assert_close(torch.stack(answer.scores), torch.stack(wanted.scores), atol=1e-3, rtol=1e-3)
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(logits[real], wanted_logits[real], atol=1e-3, rtol=1e-3)


def test_the_stand_in_is_used_and_right(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers(family, None)
    calls: list[str] = []
    for function in (flash.flash_attn_func, flash.flash_attn_varlen_func):

        @functools.wraps(function)  # transformers reads the signature
        def counted(*args: Any, _function: Any = function, **kwargs: Any) -> Tensor:
            calls.append(_function.__name__)
            return _function(*args, **kwargs)

        monkeypatch.setattr(flash, function.__name__, counted)
    with flash_attention(family.model, monkeypatch):
        assert_same(answers(family, None), expected, family)
    assert {"flash_attn_func", "flash_attn_varlen_func"} == set(calls)
    assert family.model.config.text_config._attn_implementation != flash.NAME


def _cases() -> list[Any]:
    """Every method on every family; by default on one, in turn."""
    exact = pytest.param(load_config("dense", fast_tower=True), id="exact")
    return [
        pytest.param(
            name,
            *case.values,
            id=f"{name}-{case.id}",
            marks=[] if place == number % len(TINY_MODEL_TYPES) else [pytest.mark.slow],
        )
        for number, case in enumerate([*reduced_cases(), exact])
        for place, name in enumerate(TINY_MODEL_TYPES)
    ]


@pytest.mark.parametrize(("name", "config"), _cases())
def test_the_kernel_makes_no_difference(
    name: str, config: PatchConfig, families: dict[str, Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    for family in lent(families[name]):
        expected = answers(family, config)
        with flash_attention(family.model, monkeypatch):
            assert_same(answers(family, config), expected, family)


@pytest.mark.parametrize("config", [pytest.param(load_config(config), id=name) for name, config in COMBINED.items()])
def test_a_conversation(family: Family, config: PatchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second turn comes to a cache with gaps."""
    inputs = family.inputs(PROMPT)
    question = family.processor.tokenizer(" And what is on the table?", return_tensors="pt").input_ids

    def second_answer() -> Any:
        with patched(family.model, config):
            first = family.generate(inputs)
            ids = torch.cat([first.sequences, question], dim=1)
            more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            return family.generate(more, past_key_values=first.past_key_values)

    expected = second_answer()
    with flash_attention(family.model, monkeypatch):
        actual = second_answer()
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.scores), torch.stack(expected.scores), atol=1e-3, rtol=1e-3)


def test_prefixes_of_prompts(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = family.inputs(PROMPT)
    with patched(family.model, "evs"):
        expected = family.generate(inputs)
    with (
        flash_attention(family.model, monkeypatch),
        VideoCache(family.model) as cache,
        patched(family.model, "evs"),
    ):
        for _ in range(2):
            actual = family.generate(cache.prefilled(inputs))
            torch.testing.assert_close(torch.stack(actual.scores), torch.stack(expected.scores), atol=1e-3, rtol=1e-3)
    assert cache.hits > 0
