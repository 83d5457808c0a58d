"""What each layer of a model attends with, seen from outside."""

from __future__ import annotations

import pytest
import torch

from spatiotoken import load_config, patch_model, unpatch_model
from spatiotoken.attention import PrefillInputs
from spatiotoken.attention.observe import Observer, observed
from spatiotoken.config import PatchConfig
from spatiotoken.registry import METHODS
from tests.cases import REDUCED, config_of
from tests.conftest import QUESTION, Family


def test_every_layer_is_visited_with_what_it_attends_with(family: Family) -> None:
    """The inputs give the attention weights that the model itself has."""
    inputs = family.inputs([("video", "pancake", 4), QUESTION])
    visited: list[PrefillInputs] = []
    observed(family.model, inputs, visited.append)
    depth = family.model.config.text_config.num_hidden_layers
    assert [one.layer for one in visited] == list(range(depth)) and {one.depth for one in visited} == {depth}
    eager = family.fresh().model
    eager.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = eager(**inputs, output_attentions=True, use_cache=False).attentions
    for one, theirs in zip(visited, expected, strict=True):
        key = one.key.repeat_interleave(one.groups, dim=0)
        future = torch.ones(one.length, one.length, dtype=torch.bool).triu(1)
        logits = (one.query @ key.transpose(1, 2) * one.scale).masked_fill(future, -torch.inf)
        torch.testing.assert_close(logits.softmax(dim=-1), theirs[0], atol=1e-4, rtol=1e-4)


def test_coordinates_and_padding(family: Family) -> None:
    """Each prompt of a batch by itself, with the places of its tokens."""
    batch = family.inputs([("video", "pancake", 4), "Why?"], [("video", "nasa", 4), QUESTION, QUESTION])
    visited: list[PrefillInputs] = []
    observed(family.model, batch, visited.append)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert lengths[0] < lengths[1] and [one.length for one in visited[:2]] == lengths
    for one in visited[:2]:
        places = one.needed("coordinates")
        assert len(places) == one.length and (places[:, 0] >= 0).sum() > 4 and (places[:, 0] < 0).sum() > 4


def test_the_rest_of_a_config_stays_active(family: Family) -> None:
    """Tokens are reduced as the config says; its attention method does not run."""
    inputs = family.inputs([("video", "pancake", 8), QUESTION])
    attention = config_of(("attention", "sliding_vertical"), REDUCED["attention", "sliding_vertical"]).attention
    config = load_config("divprune", **{"tokens.retention": 0.25}).model_copy(update={"attention": attention})
    lengths: dict[str, list[int]] = {"whole": [], "reduced": []}
    observed(family.model, inputs, lambda one: lengths["whole"].append(one.length))
    observed(family.model, inputs, lambda one: lengths["reduced"].append(one.length), config=config)
    assert lengths["reduced"][0] < lengths["whole"][0] == inputs["input_ids"].shape[1]


def test_the_model_is_as_before(family: Family) -> None:
    inputs = family.inputs([("video", "pancake", 4), QUESTION])
    expected = family.logits(inputs)
    observed(family.model, inputs, lambda one: None)
    assert "_spatiotoken" not in family.model.__dict__ and torch.equal(family.logits(inputs), expected)
    patch_model(family.model, "divprune")
    reduced = family.logits(inputs)
    with pytest.raises(ZeroDivisionError):
        observed(family.model, inputs, lambda one: 1 // 0)
    assert torch.equal(family.logits(inputs), reduced), "the patch from before is back, also after an error"
    unpatch_model(family.model)


def test_the_observer_is_no_method_of_configs() -> None:
    assert "observer" not in METHODS["attention"].items()
    assert PatchConfig(attention=Observer(visit=print)).to_dict()["attention"] == {
        "method": "observer",
        "backend": "auto",
    }
