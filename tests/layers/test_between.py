"""What `layers` methods are told inside a model, held against the model's own eager attention."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from pydantic import PrivateAttr
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from spatiotoken import last_report, patch_model, patched, unpatch_model
from spatiotoken.config import PatchConfig
from spatiotoken.layers.base import LayerReducer
from spatiotoken.structures import LayerReduction, LayerTokens
from tests.conftest import QUESTION, Family

PROMPT = [("video", "pancake", 8), QUESTION]
OTHER = [("image", "nasa"), ("video", "vp9", 8), "Which object is on the table, and who put it there?"]


class Told(LayerReducer):
    """Keeps every other token at layer 2, and all at layer 3; remembers what it was told."""

    name: ClassVar[str] = "told"
    needs: ClassVar[frozenset[str]] = frozenset({"text", "weights", "rows", "hidden", "received", "observed"})
    complexity: ClassVar[str] = ""
    fidelity: ClassVar[str] = ""
    _seen: list[dict[str, Any]] = PrivateAttr(default_factory=list)

    def prune_layers(self, depth: int) -> tuple[int, ...]:
        return (2, 3)

    def observed_layers(self, depth: int) -> tuple[int, ...]:
        return (0, 2)

    def observe(self, part: str, module: nn.Module, before: Tensor, after: Tensor) -> Tensor:
        return after.float().norm(dim=-1)

    def reduce(self, tokens: LayerTokens, memory: Any) -> LayerReduction:
        assert tokens.weights is not None and tokens.rows is not None and tokens.received is not None
        every = torch.arange(tokens.length)
        self._seen.append(
            {
                "tokens": tokens,
                "before": tokens.weights(every, False),
                "entering": tokens.weights(every, True),
                "received": tokens.received(),
                "rows": tokens.rows(every),
            }
        )
        count = len(tokens.needed("places"))
        return LayerReduction(torch.arange(0, count, 2 if tokens.layer == 2 else 1))


def told(family: Family, inputs: dict[str, Tensor], **arguments: Any) -> list[dict[str, Any]]:
    """By sample what the method was told at layer 2, then at layer 3."""
    method = Told()
    patch_model(family.model, PatchConfig(layers=method))
    with torch.inference_mode():
        family.model(**inputs, **arguments)
    return method._seen


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_weights_are_those_of_eager_attention(family: Family, side: str, cached: bool) -> None:
    eager = family.fresh()
    eager.model.set_attn_implementation("eager")
    inputs = family.inputs(PROMPT, OTHER, padding_side=side)
    with torch.inference_mode():
        attentions = eager.model(**inputs, output_attentions=True).attentions
    seen = told(family, inputs, use_cache=cached)
    for sample, one in enumerate(seen[:2]):
        real = inputs["attention_mask"][sample].bool()
        for name, layer in (("before", 1), ("entering", 2)):
            expected = attentions[layer][sample][:, real][:, :, real]
            torch.testing.assert_close(one[name], expected, atol=1e-5, rtol=1e-5)
        # Every other visual token is gone at layer 3: its input is what layer 2 made of the others.
        later = seen[2 + sample]
        kept = torch.cat([one["tokens"].places[::2], one["tokens"].text, _images(family, inputs, sample)]).sort().values
        assert later["tokens"].length == len(kept) < one["tokens"].length
        torch.testing.assert_close(later["before"].sum(-1), torch.ones(later["before"].shape[:2]))
        assert torch.equal(later["tokens"].text.sort().values, torch.searchsorted(kept, one["tokens"].text))


def _images(family: Family, inputs: dict[str, Tensor], sample: int) -> Tensor:
    ids = inputs["input_ids"][sample][inputs["attention_mask"][sample].bool()]
    return (ids == family.model.config.image_token_id).nonzero()[:, 0]


def test_places_and_words(family: Family) -> None:
    inputs = family.inputs(PROMPT, OTHER)
    for sample, one in enumerate(told(family, inputs)[:2]):
        tokens: LayerTokens = one["tokens"]
        ids = inputs["input_ids"][sample][inputs["attention_mask"][sample].bool()]
        config = family.model.config
        video, image = ids == config.video_token_id, ids == config.image_token_id
        assert tokens.length == len(ids)
        assert torch.equal(tokens.needed("places"), video.nonzero()[:, 0])
        words = (~video & ~image).nonzero()[:, 0]
        assert torch.equal(tokens.needed("text"), words)
        assert torch.equal(tokens.needed("asking"), words > int(video.nonzero()[-1]))
        assert torch.equal(one["rows"][tokens.needed("places")], tokens.needed("hidden"))
        mean = one["before"].mean(0).sum(0) / len(ids)
        torch.testing.assert_close(one["received"], mean[tokens.needed("places")], atol=1e-6, rtol=1e-4)


def test_observed_parts_follow_their_tokens(family: Family) -> None:
    inputs = family.inputs(PROMPT, OTHER)
    outputs: dict[tuple[int, str], Tensor] = {}
    layers = family.model.model.language_model.layers
    seen = told(family, inputs)
    hooks = [
        module.register_forward_hook(
            lambda _, __, output, key=(index, part): outputs.__setitem__(
                key, output[0] if isinstance(output, tuple) else output
            )
        )
        for index in (0, 2)
        for part, module in (("attention", layers[index].self_attn), ("mlp", layers[index].mlp))
    ]
    with torch.inference_mode():
        family.model(**inputs)
    for hook in hooks:
        hook.remove()
    for sample in range(2):
        first, second = seen[sample]["tokens"], seen[2 + sample]["tokens"]
        assert set(first.observed) == {0} and set(second.observed) == {0, 2}
        real = inputs["attention_mask"][sample].bool()
        for number, part in enumerate(("attention", "mlp")):
            norms = outputs[0, part][sample][real].norm(dim=-1)[first.places]
            torch.testing.assert_close(first.observed[0][number], norms)
            torch.testing.assert_close(second.observed[0][number], norms[::2])
            assert second.observed[2][number].shape == norms[::2].shape and bool((second.observed[2][number] > 0).all())


def test_a_second_turn_sees_the_cached_rows(llava: Family) -> None:
    """With new pictures on a cache, weights of this pass's rows leave the share that goes to earlier ones."""
    first, second = llava.inputs(PROMPT), llava.inputs([("video", "vp9", 8), "And now?"])
    method = Told()
    patch_model(llava.model, PatchConfig(layers=method))
    with torch.inference_mode():
        cache = llava.model(**first, use_cache=True).past_key_values
        mask = torch.ones(1, first["input_ids"].shape[1] + second["input_ids"].shape[1], dtype=torch.int64)
        llava.model(**{**second, "attention_mask": mask}, past_key_values=cache)
    later = method._seen[2]
    assert later["tokens"].length == second["input_ids"].shape[1]
    for name in ("before", "entering"):
        total = later[name].sum(-1)
        assert bool((total < 0.999).any()) and bool((total > 0).all())


def test_nothing_of_it_stays(family: Family) -> None:
    layer = family.model.model.language_model.layers[0]
    before = dict(layer.self_attn.__dict__), dict(layer.mlp.__dict__)
    told(family, family.inputs(PROMPT))
    assert "forward" in layer.self_attn.__dict__ and "forward" in layer.mlp.__dict__
    unpatch_model(family.model)
    assert (dict(layer.self_attn.__dict__), dict(layer.mlp.__dict__)) == before


# Each drops nothing at these settings, and is told of every layer from 1 on, or of layer 2.
KEEPING: list[dict[str, Any]] = [
    {"method": "dyvte", "layer": 1, "threshold": 1e-9},
    {"method": "todre_drop", "layer": 2, "threshold": 1e-9},
    {"method": "spatten", "layer": 1, "shares": [1, 1]},
    {"method": "fastv", "layer": 2, "retention": 1.0},
]


@pytest.mark.parametrize("settings", KEEPING, ids=lambda settings: settings["method"])
@pytest.mark.parametrize("cached", [True, False])
def test_inputs_of_layers_are_freed(family: Family, settings: dict[str, Any], cached: bool) -> None:
    """While a decoder layer computes, nothing holds the hidden states that earlier layers began with."""
    layers = family.model.model.language_model.layers
    begun: list[StorageWeakRef] = []
    alive: list[list[bool]] = []

    def begins(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begun.append(StorageWeakRef((args[0] if args else kwargs["hidden_states"]).untyped_storage()))

    def computes(_: nn.Module, args: tuple[Any, ...]) -> None:
        # That of the first layer is the embeddings, which the model itself holds.
        alive.append([not one.expired() for one in begun[1:]])

    hooks = [layer.register_forward_pre_hook(begins, with_kwargs=True) for layer in layers]
    hooks += [layer.mlp.register_forward_pre_hook(computes) for layer in layers]
    with patched(family.model, {"layers": settings}), torch.inference_mode():
        output = family.model(**family.inputs(PROMPT, OTHER), use_cache=cached)
        assert len(set(last_report(family.model).layer_tokens)) == 1, "something was dropped"
    for hook in hooks:
        hook.remove()
    assert alive == [[number == layer for number in range(1, layer + 1)] for layer in range(len(layers))]
    del output
    assert all(one.expired() for one in begun)


TRIMMING = {"method": "mustdrop", "layers": [2], "overall": 1.1, "individual": 1000.0}


def _stepped(family: Family, inputs: dict[str, Tensor], trim: bool, cut: bool = False) -> tuple[Any, Tensor]:
    """The cache after a prefill that drops tokens before layer 2, and the logits of one more token.

    Args:
        cut: take the rows that were dropped out of the other layers by hand.
    """
    with patched(family.model, {"layers": {**TRIMMING, "trim": trim}}), torch.inference_mode():
        cache = family.model(**inputs, use_cache=True).past_key_values
        if cut:
            final = torch.ones_like(inputs["input_ids"][0], dtype=torch.bool)
            video = inputs["input_ids"][0] == family.model.config.video_token_id
            final[video] = torch.tensor(last_report(family.model).seen[0])
            for layer in cache.layers[:2]:
                layer.keys, layer.values = layer.keys[:, :, final], layer.values[:, :, final]
                layer.dropped = cache.layers[3].dropped
        return cache, family.model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits[:, -1]


def test_a_trimmed_cache_is_one_that_was_cut_by_hand(family: Family) -> None:
    expected = []
    for inputs in (family.inputs(prompt) for prompt in (PROMPT, OTHER)):
        trimmed, logits = _stepped(family, inputs, trim=True)
        whole, other = _stepped(family, inputs, trim=False)
        _, by_hand = _stepped(family, inputs, trim=False, cut=True)
        lengths = [layer.physical_length for layer in trimmed.layers]
        assert len(set(lengths)) == 1 and lengths[0] < whole.layers[0].physical_length
        assert lengths[3] == whole.layers[3].physical_length
        torch.testing.assert_close(logits, by_hand, atol=2e-4, rtol=1e-4)
        assert not torch.allclose(logits, other, atol=1e-2)
        with patched(family.model, {"layers": TRIMMING}):
            expected.append(torch.stack(family.generate(inputs).scores))
    with patched(family.model, {"layers": TRIMMING}):
        together = torch.stack(family.generate(family.inputs(PROMPT, OTHER)).scores)
    torch.testing.assert_close(together, torch.cat(expected, dim=1), atol=2e-4, rtol=1e-4)
