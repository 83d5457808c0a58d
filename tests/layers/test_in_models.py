"""`layers` methods in whole models: large batches, and any attention backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spatiotoken import last_report, patched
from spatiotoken.config import PatchConfig
from tests.cases import REDUCED, REPRESENTATIVE, config_of
from tests.conftest import QUESTION, Family

METHODS = [
    pytest.param(config_of(key, settings), id=key[1], marks=[] if key[1] in REPRESENTATIVE else [pytest.mark.slow])
    for key, settings in REDUCED.items()
    if key[0] == "layers"
]


def prompts(family: Family) -> list[list[Any]]:
    """Four with videos of several lengths (LLaVA's processors stack videos, so there of one) and questions of their
    own."""
    frames = (8, 8, 8, 8) if family.stacks_videos else (8, 4, 12, 6)
    clips = ("pancake", "vp9", "nasa", "pancake")
    questions = (QUESTION, "Why?", "Which object is on the table, and who put it there?", "How many people are there?")
    return [
        [("video", *clip), question] for clip, question in zip(zip(clips, frames, strict=True), questions, strict=True)
    ]


@pytest.mark.parametrize("config", METHODS)
def test_four_prompts_are_answered_like_each_alone(family: Family, config: PatchConfig) -> None:
    samples = prompts(family)
    with patched(family.model, config):
        together = family.generate(family.inputs(*samples), new=32).sequences[:, -32:]
        for answer, sample in zip(together, samples, strict=True):
            assert torch.equal(family.generate(family.inputs(sample), new=32).sequences[0, -32:], answer)


# transformers still passes what torch calls out of date.
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.parametrize("config", METHODS)
@pytest.mark.parametrize("implementation", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_any_attention_keeps_the_same_tokens(family: Family, implementation: str, config: PatchConfig) -> None:
    """Of flex attention the prefill: its CPU kernel does not compile for single queries."""
    if implementation == "flex_attention" and not family.stacks_videos:
        pytest.skip("transformers does not support flex attention in the Qwen-VL families")
    inputs = family.inputs(*prompts(family)[:2])
    other = family.fresh()
    other.model.model.language_model.set_attn_implementation(implementation)
    found = {}
    for name, one in (("sdpa", family), (implementation, other)):
        with patched(one.model, config):
            found[name] = one.logits(inputs)[:, -1], last_report(one.model).seen
    assert found["sdpa"][1] == found[implementation][1]
    torch.testing.assert_close(found["sdpa"][0], found[implementation][0], atol=5e-4, rtol=1e-3)
