"""What always holds, for every method and model family (design, section 7)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from spatiotoken import last_report, patch_model, patched, unpatch_model
from spatiotoken.config import PatchConfig, load_config
from tests.cases import KEEP_ALL, REDUCED, REPRESENTATIVE, config_of, keep_all_cases, reduced_cases, replayed
from tests.conftest import QUESTION, Family

PROMPT = [("video", "pancake", 8), QUESTION]
OTHER = [("video", "vp9", 8), "Which object is on the table?"]
ABOUT_TIME = ("evs", "dtd", "dycoke", "framefusion", "static_patches", "early_merge")
"""Methods to which a still picture is all first frame."""
TOLERANCE = 2e-4
"""fp32 logits of a few tens, summed in another order."""


def closest(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=1e-4)


def scores(output: Any) -> torch.Tensor:
    return torch.stack(output.scores, dim=1)


@pytest.mark.parametrize("config", keep_all_cases())
def test_keep_all_is_identical(family: Family, config: PatchConfig) -> None:
    inputs = family.inputs([("image", "nasa"), *PROMPT])
    expected, expected_logits = family.unpatched([("image", "nasa"), *PROMPT])
    patch_model(family.model, config)
    actual = family.generate(inputs)
    assert torch.equal(actual.sequences, expected.sequences)
    assert torch.equal(scores(actual), scores(expected))
    assert torch.equal(family.logits(inputs), expected_logits)
    report = last_report(family.model)
    assert report.visual_kept == report.visual_tokens > 0


def test_empty_config_is_identical(family: Family) -> None:
    inputs = family.inputs(PROMPT)
    expected = family.generate(inputs)
    with patched(family.model, "dense"):
        assert torch.equal(scores(family.generate(inputs)), scores(expected))
        report = last_report(family.model)
    assert report.stages == {} and report.prefill_flops == report.prefill_flops_dense > 0


@pytest.mark.parametrize("config", reduced_cases())
def test_generate_equals_recomputation(family: Family, config: PatchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = family.inputs(PROMPT)
    unreduced, _ = family.unpatched(PROMPT)
    patch_model(family.model, config)
    with replayed(monkeypatch):
        cached = family.generate(inputs)
        assert last_report(family.model).decode_steps == 3
        recomputed = family.generate(inputs, use_cache=False)
    assert torch.equal(cached.sequences, recomputed.sequences)
    closest(scores(cached), scores(recomputed))
    assert not torch.allclose(scores(unreduced)[:, 0], scores(cached)[:, 0], atol=1e-2)


def ragged(family: Family) -> list[list[Any]]:
    """Samples of several lengths, with one video, two and none."""
    longer = ("video", "vp9", 8 if family.stacks_videos else 12)
    return [
        PROMPT,
        ["Describe", longer, ("video", "nasa", 8), "the scene in detail."],
        ["How many people are there?"],
    ]


SIDES = [
    pytest.param(*case.values, side, id=f"{case.id}-{side}", marks=case.marks)
    # `generate` pads on the left, so the other side is by default for some of each kind.
    for side, cases in (("left", reduced_cases()), ("right", reduced_cases(every=False)))
    for case in cases
]


@pytest.mark.parametrize(("config", "padding_side"), SIDES)
def test_batch_equals_singles(family: Family, config: PatchConfig, padding_side: str) -> None:
    samples = ragged(family)
    patch_model(family.model, config)
    batch = family.inputs(*samples, padding_side=padding_side)
    together = family.logits(batch)
    kept = last_report(family.model)
    real = batch["attention_mask"].bool()
    alone = [family.inputs(sample) for sample in samples]
    visual = 0
    for row, single in enumerate(alone):
        logits = family.logits(single)
        visual += last_report(family.model).visual_kept
        # Dropped tokens have zero logits in both; text before, between and after the pictures must agree.
        closest(together[row][real[row]], logits[0])
    assert kept.visual_kept == visual


def _answers() -> list[Any]:
    """Decoding goes by what is left in the cache, however methods before the language model chose that: of those only
    some run by default."""
    cases = []
    for case in reduced_cases():
        config: PatchConfig = case.values[0]
        chosen = {method.name for method in (config.frames, config.vision, config.tokens) if method}
        quick = config.layers or config.attention or chosen & set(REPRESENTATIVE)
        cases.append(pytest.param(config, id=case.id, marks=[] if quick else [pytest.mark.slow]))
    return cases


@pytest.mark.parametrize("config", _answers())
def test_answers_of_a_batch_equal_singles(family: Family, config: PatchConfig) -> None:
    samples = ragged(family)
    patch_model(family.model, config)
    together = family.generate(family.inputs(*samples))
    for row, sample in enumerate(samples):
        alone = family.generate(family.inputs(sample))
        closest(scores(together)[row], scores(alone)[0])
        assert torch.equal(together.sequences[row, -4:], alone.sequences[0, -4:])


@pytest.mark.parametrize("config", reduced_cases())
def test_unpatch_restores(family: Family, config: PatchConfig) -> None:
    inputs = family.inputs(PROMPT)
    expected, _ = family.unpatched(PROMPT, new=2)
    before = snapshot(family.model)
    patch_model(family.model, config)
    family.generate(inputs, new=2)
    patch_model(family.model, config)  # patching twice replaces
    family.generate(inputs, new=1)
    assert snapshot(family.model) != before
    unpatch_model(family.model)
    assert snapshot(family.model) == before
    assert torch.equal(scores(family.generate(inputs, new=2)), scores(expected))
    unpatch_model(family.model)
    assert snapshot(family.model) == before


def snapshot(model: torch.nn.Module) -> dict[str, Any]:
    """Every attribute, hook and config value, by identity where that is what matters."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key != "rope_deltas":  # transformers writes it in every prefill
                state[f"{name}.{key}"] = dict(value) if isinstance(value, dict) else id(value)
        config = getattr(module, "config", None)
        if config is not None:
            state[f"{name}.config"] = sorted(map(str, config.__dict__.items()))
    return state


@pytest.mark.parametrize("config", reduced_cases(every=False))
def test_text_only_is_untouched(family: Family, config: PatchConfig) -> None:
    if config.attention:
        # Sparse prefill is about prompts of any kind, so it is the other stages that leave these alone.
        everything = KEEP_ALL["attention", config.attention.name]
        config = load_config(config, attention={"method": config.attention.name, **everything})
    samples = ["How many people are there in the room?"], ["What is this?"]
    inputs = family.inputs(*samples)
    expected, expected_logits = family.unpatched(*samples)
    with patched(family.model, config):
        actual = family.generate(inputs)
        assert torch.equal(scores(actual), scores(expected))
        assert torch.equal(family.logits(inputs), expected_logits)
        assert last_report(family.model).visual_tokens == 0
        assert type(actual.past_key_values) is DynamicCache
        assert type(actual.past_key_values.layers[0]).__name__ == "DynamicLayer"


@pytest.mark.parametrize("key", [key for key in REDUCED if key[0] in ("vision", "tokens", "layers")], ids="-".join)
def test_images_only_when_asked(family: Family, key: tuple[str, str]) -> None:
    image_only = family.inputs([("image", "nasa"), "What is this?"])
    mixed = family.inputs([("image", "nasa"), *PROMPT])
    _, expected = family.unpatched([("image", "nasa"), "What is this?"])
    with patched(family.model, config_of(key, REDUCED[key])):
        assert torch.equal(family.logits(image_only), expected)
        family.logits(mixed)
        videos_only = last_report(family.model)
    with patched(family.model, config_of(key, REDUCED[key], images=True)):
        actual = family.logits(image_only)
        report = last_report(family.model)
        if key[1] not in ABOUT_TIME:
            assert not torch.allclose(actual, expected)
            stage = report.stages[key[0]]
            # Tokens are counted at each layer that they come to, in the tower patches.
            often = len(config_of(key, REDUCED[key]).layers.prune_layers(4)) if key[0] == "layers" else 1
            assert stage.tokens_out <= stage.tokens_in
            assert key[0] == "vision" or stage.tokens_out < stage.tokens_in <= often * report.visual_tokens
        family.logits(mixed)
        both = last_report(family.model)
    assert videos_only.visual_tokens == both.visual_tokens
    assert both.stages[key[0]].tokens_in > videos_only.stages[key[0]].tokens_in


# Sparse prefill is told of rows alone, whatever they stand for; most of its methods are slow on these long prompts.
FEW = {case.id for case in reduced_cases(every=False) if not case.marks}
MIXED = [
    case
    if case.values[0].attention is None or case.id in FEW
    else pytest.param(*case.values, id=case.id, marks=pytest.mark.slow)
    for case in reduced_cases()
]


@pytest.mark.parametrize("config", MIXED)
def test_mixed_prompt(family: Family, config: PatchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = family.inputs(["Look:", ("image", "nasa"), ("video", "pancake", 8), "then", ("video", "vp9", 8), QUESTION])
    patch_model(family.model, load_config(config, images=True))
    with replayed(monkeypatch):
        cached = family.generate(inputs, new=2)
        closest(scores(cached), scores(family.generate(inputs, new=2, use_cache=False)))


@pytest.mark.parametrize("config", reduced_cases(every=False))
def test_interleaved_conversations(family: Family, config: PatchConfig) -> None:
    """Two conversations in turns on one model, each as if it were alone, each answer as if computed afresh."""
    prompts = [family.inputs(PROMPT), family.inputs(["Hello.", ("video", "nasa", 4), "Is it moving?"])]
    second = family.processor.tokenizer(" And then? Answer with one word.", return_tensors="pt").input_ids
    patch_model(family.model, config)

    def turn(history: torch.Tensor, cache: Any) -> Any:
        ids = torch.cat([history, second], dim=1)
        return family.generate({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, past_key_values=cache)

    alone = []
    for prompt in prompts:
        first = family.generate(prompt)
        alone.append((first, turn(first.sequences, first.past_key_values)))
    firsts = [family.generate(prompt) for prompt in prompts]
    for (expected_first, expected), first in zip(alone, firsts, strict=True):
        assert torch.equal(first.sequences, expected_first.sequences)
        actual = turn(first.sequences, first.past_key_values)
        assert torch.equal(scores(actual), scores(expected))
        assert actual.past_key_values.get_seq_length() == actual.sequences.shape[1] - 1


# Without sparse prefill, which treats the rows of a second turn as prompt; interleaved conversations cover that.
@pytest.mark.parametrize("config", [case for case in reduced_cases(every=False) if case.values[0].attention is None])
def test_second_turn_equals_recomputation(family: Family, config: PatchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    # A short clip: once temporal positions exceed those of the text, unpatched Qwen2.5-VL itself goes on elsewhere than
    # a recomputation would (its position offset counts them).
    prompt = family.inputs(OTHER)
    patch_model(family.model, config)
    with replayed(monkeypatch):
        first = family.generate(prompt)
        more = family.processor.tokenizer(" And then? Answer with one word.", return_tensors="pt").input_ids
        ids = torch.cat([first.sequences, more], dim=1)
        whole = {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in prompt:
            types = prompt["mm_token_type_ids"]
            whole["mm_token_type_ids"] = torch.cat([types, types.new_zeros(1, ids.shape[1] - types.shape[1])], dim=1)
        afresh = family.generate(whole)
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        continued = family.generate(text, past_key_values=first.past_key_values)
    assert torch.equal(continued.sequences, afresh.sequences)
    closest(scores(continued), scores(afresh))


@pytest.mark.parametrize("config", reduced_cases(every=False))
def test_eager_equals_sdpa(family: Family, config: PatchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the language model: the tower's last bits would decide between tokens that are nearly alike."""
    inputs = family.inputs(PROMPT)
    with nullcontext() if config.attention else replayed(monkeypatch):
        with patched(family.model, config):
            expected = family.generate(inputs)
        family.model.set_attn_implementation({"text_config": "eager"})
        try:
            with patched(family.model, config):
                actual = family.generate(inputs)
            assert family.model.config.get_text_config()._attn_implementation == "eager"
        finally:
            family.model.set_attn_implementation({"text_config": "sdpa"})
    assert torch.equal(actual.sequences, expected.sequences)
    closest(scores(actual), scores(expected))
