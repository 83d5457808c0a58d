"""Sparse prefill inside a model: what methods are told after other stages, and what the report says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spatiotoken import last_report, patched
from spatiotoken.attention import PrefillInputs, dispatch
from spatiotoken.attention.observe import observed
from spatiotoken.config import PatchConfig, load_config
from tests.cases import REDUCED, replayed
from tests.conftest import QUESTION, Family

PROMPT = [("video", "pancake", 8), QUESTION]
SHORT = ["What is this?"]
STAGES: dict[str, Any] = {
    "tokens": {"method": "divprune", "retention": 0.6},
    "layers": {"method": "fastv", "layer": 2, "retention": 0.5},
}


def config(method: str, **stages: Any) -> PatchConfig:
    return load_config({**stages, "attention": {"method": method, **REDUCED["attention", method]}})


def seen_by_layers(family: Family, stages: dict[str, Any]) -> list[PrefillInputs]:
    seen: list[PrefillInputs] = []
    observed(family.model, family.inputs(PROMPT), seen.append, config=load_config(stages))
    return seen


def test_places_are_true_after_merging_and_pruning(family: Family) -> None:
    """The grid has holes then: each token that is left has the place that it had among all."""
    whole, left = seen_by_layers(family, {})[0], seen_by_layers(family, STAGES)
    places = whole.needed("coordinates")
    assert places.shape == (whole.length, 4)
    visual = places[places[:, 0] >= 0]
    assert len(visual.unique(dim=0)) == len(visual) == int(visual[:, 1:].amax(0).add(1).prod())
    known = {tuple(place) for place in visual.tolist()}
    lengths = [inputs.length for inputs in left]
    assert whole.length > lengths[0] == lengths[1] > lengths[2] == lengths[3]
    for inputs in left:
        own = [tuple(place) for place in inputs.needed("coordinates").tolist() if place[0] >= 0]
        assert own == sorted(own) and set(own) < known
        # FastV takes a newline for a token like any other.
        newlines = whole.length - len(visual) - (inputs.length - len(own))
        assert newlines == 0 or (newlines == 1 and inputs.layer >= 2 and family.name == "llava_onevision")


@pytest.mark.parametrize("method", ["mminference", "psa", "xattention"])
def test_composes_with_the_other_stages(family: Family, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = family.inputs(PROMPT)
    with patched(family.model, config(method, **STAGES)), replayed(monkeypatch):
        cached = family.generate(inputs)
        fed = {**inputs, "input_ids": cached.sequences, "attention_mask": torch.ones_like(cached.sequences)}
        if "mm_token_type_ids" in fed:
            added = cached.sequences.shape[1] - fed["mm_token_type_ids"].shape[1]
            fed["mm_token_type_ids"] = torch.nn.functional.pad(fed["mm_token_type_ids"], (0, added))
        again = family.logits(fed, use_cache=False)[:, -len(cached.scores) - 1 : -1]
        report = last_report(family.model)
    torch.testing.assert_close(torch.stack(cached.scores, dim=1), again, atol=2e-4, rtol=1e-4)
    assert report.stages.keys() == {"tokens", "layers", "attention"}


def test_report_tells_density_and_kernel(family: Family) -> None:
    sparse = config("powerattention")
    with patched(family.model, sparse):
        family.logits(family.inputs(PROMPT))
        report = last_report(family.model)
        family.logits(family.inputs(SHORT))
        short = last_report(family.model)
    assert [entry.backends for entry in report.attention] == [("gather",)] * 4
    assert all(0 < entry.density < 0.6 for entry in report.attention)
    assert report.prefill_flops < report.prefill_flops_dense
    assert short.visual_tokens == 0
    with patched(family.model, "dense"):
        family.logits(family.inputs(PROMPT))
        assert last_report(family.model).attention == ()


def test_what_gains_nothing_is_left_to_the_models_own_attention(family: Family) -> None:
    """A window of all but a few keys: computed if a kernel is named, dense and bit-identical by default."""
    inputs = family.inputs(PROMPT)
    length = int(inputs["attention_mask"].sum())
    expected = family.logits(inputs)
    settings = {"method": "sliding_vertical", "sink": 1, "window": length - 6, "columns": 0, "block": 2}
    with patched(family.model, {"attention": settings}):
        assert torch.equal(family.logits(inputs), expected)
        assert {entry.backends for entry in last_report(family.model).attention} == {("dense",)}
        assert all(entry.density == 1 for entry in last_report(family.model).attention)
    with patched(family.model, {"attention": {**settings, "backend": "gather"}}):
        assert not torch.equal(family.logits(inputs), expected)
        report = last_report(family.model)
    assert {entry.backends for entry in report.attention} == {("gather",)}
    assert all(0.9 < entry.density < 1 for entry in report.attention)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_may_be_sparse_in_part(family: Family, side: str) -> None:
    """A short prompt beside a long one is dense; both are what they are alone."""
    settings = {"method": "sliding_vertical", "sink": 1, "window": 24, "columns": 4, "block": 4}
    prompts = (PROMPT, SHORT)
    with patched(family.model, {"attention": settings}):
        batch = family.inputs(*prompts, padding_side=side)
        together = family.logits(batch)
        report = last_report(family.model)
        for row, prompt in enumerate(prompts):
            alone = family.logits(family.inputs(prompt))[0]
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(together[row][real], alone, atol=2e-4, rtol=1e-4)
    assert {entry.backends for entry in report.attention} == {("dense", "gather")}


def test_layers_that_the_method_is_not_asked_for(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer with a window of its own is left to the model: no entry of the report, and all of its arithmetic."""
    inputs = family.inputs(PROMPT)
    own = dispatch.sparse_attention

    def windowed(module: Any, *args: Any, **kwargs: Any) -> Any:
        slides = module.layer_idx == 1
        return own(module, *args, **({**kwargs, "sliding_window": 10_000} if slides else kwargs))

    flops = []
    for function in (own, windowed):
        monkeypatch.setattr(dispatch, "sparse_attention", function)
        with patched(family.model, config("powerattention")):
            family.logits(inputs)
            report = last_report(family.model)
        flops.append(report.prefill_flops)
    assert [entry.layer for entry in report.attention] == [0, 2, 3]
    assert flops[0] < flops[1] < report.prefill_flops_dense


def test_lengths_are_those_of_each_layer(family: Family) -> None:
    """Also where no mask tells that a `layers` method has made the sequence shorter."""
    lengths: list[int] = []

    class Watched(type(config("powerattention").attention)):  # type: ignore[misc]
        def attend(self, inputs: PrefillInputs) -> Any:
            lengths.append(inputs.length)
            return super().attend(inputs)

    method = Watched(**REDUCED["attention", "powerattention"])
    layers = load_config({"layers": STAGES["layers"]}).layers
    with patched(family.model, PatchConfig(layers=layers, attention=method)):
        family.logits(family.inputs(PROMPT))
        forward_lengths = last_report(family.model).layer_tokens
        recorder = family.model.__dict__["_spatiotoken"].recorder
    assert tuple(lengths) == forward_lengths
    pairs = [recorder._attended[layer][0][0] for layer in range(4)]
    assert pairs == [length * (length + 1) // 2 for length in forward_lengths]
