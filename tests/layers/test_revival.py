"""Dropped tokens that come back while decoding."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from pydantic import PrivateAttr
from torch import Tensor
from transformers import DynamicCache

from spatiotoken import patch_model, patched, revival, unpatch_model
from spatiotoken.config import PatchConfig
from spatiotoken.layers.base import LayerPruner
from spatiotoken.revival import LooseRows, joined, loose_mask
from spatiotoken.sequence import LogicalLayer, Rows
from spatiotoken.structures import LayerTokens
from tests.conftest import QUESTION, Family

PROMPT = [("video", "pancake", 8), QUESTION]
OTHER = [("video", "vp9", 8), "Which object is on the table, and who put it there?"]
LAZY = {"layers": {"method": "lazyllm", "layers": [1, 3], "shares": [0.4, 0.5], "revive": True}}
OTHERS = {
    "tokens": {"method": "divprune", "retention": 0.7},
    "attention": {"method": "powerattention", "block": 4, "window": 2, "backend": "gather"},
}
NEXT = torch.tensor([[5]])


class Regrets(LayerPruner):
    """Drops every other token before layer 2 at first, and keeps all once it is told to."""

    name: ClassVar[str] = "regrets"
    complexity: ClassVar[str] = ""
    fidelity: ClassVar[str] = ""
    _sorry: list[bool] = PrivateAttr(default_factory=list)

    def prune_layers(self, depth: int) -> tuple[int, ...]:
        return (2,)

    def revives(self) -> bool:
        return True

    def select(self, tokens: LayerTokens) -> Tensor:
        return torch.arange(0, tokens.needed("attention").shape[1], 1 if self._sorry else 2)


def step(family: Family, cache: Any, ids: Tensor = NEXT) -> Tensor:
    with torch.inference_mode():
        return family.model(input_ids=ids, past_key_values=cache).logits[:, -1]


def prefilled(family: Family, inputs: dict[str, Tensor]) -> Any:
    with torch.inference_mode():
        return family.model(**inputs, use_cache=True).past_key_values


def in_order(layer: LogicalLayer, sample: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Places in the conversation, keys ``[heads, K, d]`` and values of the rows of one sample that are no padding."""
    assert layer.order is not None and layer.keys is not None and layer.values is not None
    rows = torch.arange(layer.order.shape[1]) if layer.valid is None else layer.valid[sample].nonzero()[:, 0]
    rows = rows[layer.order[sample, rows].argsort()]
    return layer.order[sample, rows], layer.keys[sample, :, rows], layer.values[sample, :, rows]


def test_what_is_back_is_what_its_layers_make_of_it(family: Family) -> None:
    """Everything comes back at the first step: rows that had been dropped are then those of a model that drops nothing,
    for they see all that came before them; and the new token sees all rows."""
    inputs = family.inputs(PROMPT)
    dense = prefilled(family, inputs)
    method = Regrets()
    with patched(family.model, PatchConfig(layers=method)):
        cache = prefilled(family, inputs)
        kept = in_order(cache.layers[2])[0]
        waiting = cache.layers[2].aside
        method._sorry.append(True)
        logits = step(family, cache)
        dropped = waiting.order[0].sort().values
        assert (
            len(dropped) > 3
            and cache.layers[2].aside is None
            and cache.get_seq_length() == len(kept) + len(dropped) + 1
        )
        # They are gone from the waiting ones, so a further step is an ordinary one.
        lengths = [layer.physical_length for layer in cache.layers]
        again = step(family, cache)
        assert [layer.physical_length for layer in cache.layers] == [length + 1 for length in lengths]
    for index in (2, 3):
        order, keys, values = in_order(cache.layers[index])
        assert torch.equal(order, torch.arange(len(order)))
        for found, expected in ((keys, dense.layers[index].keys), (values, dense.layers[index].values)):
            torch.testing.assert_close(found[:, dropped], expected[0][:, dropped], atol=1e-5, rtol=1e-4)
        # What comes after a dropped token did not see it at the prefill.
        same = torch.isclose(keys[:, kept], dense.layers[index].keys[0][:, kept], atol=1e-5).all()
        assert bool(same) == (index == 2)
    # An unpatched model that is handed these rows says the same.
    prefilled(family, inputs)
    plain = DynamicCache(config=family.model.config.get_text_config())
    for index, layer in enumerate(cache.layers):
        _, keys, values = in_order(layer)
        plain.update(keys[None, :, :-2], values[None, :, :-2], index)
    for expected in (logits, again):
        torch.testing.assert_close(step(family, plain), expected, atol=1e-4, rtol=1e-4)


def test_rows_may_be_computed_a_few_at_a_time(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = family.inputs(PROMPT, OTHER)
    # What comes back before layers 1 and 2 is mixed there, and one layer more sees what became of it.
    with patched(family.model, {"layers": LAZY["layers"] | {"layers": [1, 2]}}):
        expected = torch.stack(family.generate(inputs, new=6).scores)
        monkeypatch.setattr(revival, "ROWS", 2)
        torch.testing.assert_close(torch.stack(family.generate(inputs, new=6).scores), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [LAZY, LAZY | OTHERS], ids=["alone", "beside other stages"])
def test_a_batch_is_answered_like_each_prompt_alone(family: Family, config: dict[str, Any]) -> None:
    alone, lengths = [], []
    with patched(family.model, config):
        for prompt in (PROMPT, OTHER):
            output = family.generate(family.inputs(prompt), new=12)
            alone.append(torch.stack(output.scores)[:, 0])
            lengths.append([layer.physical_length for layer in output.past_key_values.layers])
        output = family.generate(family.inputs(PROMPT, OTHER), new=12)
    torch.testing.assert_close(torch.stack(output.scores), torch.stack(alone, dim=1), atol=2e-4, rtol=1e-4)
    for index, layer in enumerate(output.past_key_values.layers):
        real = [layer.physical_length] * 2 if layer.valid is None else layer.valid.sum(1).tolist()
        assert real == [one[index] for one in lengths]


def test_nothing_is_lost_and_nothing_is_there_twice(family: Family) -> None:
    """Layer by layer a part of the rows before, and what is not there waits; more and more come back."""
    with patched(family.model, LAZY):
        cache = prefilled(family, family.inputs(PROMPT, OTHER))
        counts = []
        for number in range(8):
            for sample in range(2):
                places = [in_order(layer, sample)[0].tolist() for layer in cache.layers]
                assert all(len(set(own)) == len(own) for own in places)
                for index, (before, here) in enumerate(zip(places, places[1:], strict=False), start=1):
                    waiting: list[int] = []
                    if (aside := cache.layers[index].aside) is not None:
                        waiting = aside.order[sample][aside.valid[sample]].tolist()
                    assert sorted([*here, *waiting]) == before
                    assert not waiting or index in (1, 3)
            assert len({layer.get_seq_length() for layer in cache.layers}) == 1
            counts.append([layer.valid.sum() for layer in cache.layers])
            step(family, cache, torch.tensor([[5 + number], [9 + 2 * number]]))
    back = torch.tensor(counts[1:]).diff(dim=0) - 2
    assert (back >= 0).all() and not back[:, 0].any() and back[:, 1].any(), "none came back, so this test says nothing"


def test_without_revival_dropped_tokens_stay_away(family: Family) -> None:
    still = {"layers": LAZY["layers"] | {"revive": False}}
    with patched(family.model, still):
        cache = family.generate(family.inputs(PROMPT), new=6).past_key_values
    assert all(layer.order is None and layer.aside is None for layer in cache.layers)


def test_revival_of_nothing_is_bit_identical(family: Family) -> None:
    inputs = family.inputs(PROMPT, OTHER)
    expected = torch.stack(family.generate(inputs, new=6).scores)
    with patched(family.model, {"layers": {"method": "lazyllm", "layers": [1, 3], "shares": [1, 1]}}):
        assert torch.equal(torch.stack(family.generate(inputs, new=6).scores), expected)


def test_beams_keep_their_own_tokens(llava: Family) -> None:
    """Beam search reorders what waits as well: each beam is as likely as its tokens are one after the other."""
    inputs = llava.inputs(PROMPT)
    ends = llava.model.generation_config.eos_token_id
    with patched(llava.model, LAZY):
        beams = llava.generate(inputs, new=8, num_beams=3, num_return_sequences=3, length_penalty=0.0)
        for sequence, score in zip(beams.sequences[:, -8:], beams.sequences_scores, strict=True):
            with torch.inference_mode():
                output = llava.model(**inputs, use_cache=True)
            total, logits = torch.zeros(()), output.logits[0, -1]
            for token in sequence:
                total += logits.log_softmax(-1)[token]
                if int(token) == ends:
                    break
                logits = step(llava, output.past_key_values, token[None, None])[0]
            torch.testing.assert_close(total, score, atol=1e-3, rtol=1e-4)


def test_a_later_turn_and_cropping(family: Family) -> None:
    with patched(family.model, LAZY):
        whole, cut = (prefilled(family, family.inputs(PROMPT)) for _ in range(2))
        for cache in (whole, cut):
            step(family, cache)
        # Several new rows at once: the last one asks. Candidates that are refused leave no trace but what came back.
        step(family, cut, torch.tensor([[7, 8, 9]]))
        cut.crop(-2)
        length = cut.get_seq_length()
        assert length == whole.get_seq_length() + 1
        for layer in cut.layers:
            assert layer.order.shape == (1, layer.physical_length) and int(layer.order.max()) == length - 1
        with pytest.raises(ValueError, match="cannot crop"):
            cut.crop(-length + 2)
        step(family, whole, torch.tensor([[7, 8, 9]]))
    with pytest.raises(RuntimeError, match="patch the model to go on"):
        step(family, whole)


def test_a_second_video_waits_beside_the_first(llava: Family) -> None:
    first, second = llava.inputs(PROMPT), llava.inputs([("video", "vp9", 8), "And now?"])
    mask = torch.ones(1, first["input_ids"].shape[1] + second["input_ids"].shape[1], dtype=torch.int64)
    with patched(llava.model, LAZY):
        cache = prefilled(llava, first)
        step(llava, cache)
        before = [cache.layers[index].aside.order.shape[1] for index in (1, 3)]
        length = cache.get_seq_length()
        with torch.inference_mode():
            mask = torch.ones(1, length + second["input_ids"].shape[1], dtype=torch.int64)
            llava.model(**{**second, "attention_mask": mask}, past_key_values=cache)
        for index, count in zip((1, 3), before, strict=True):
            layer = cache.layers[index]
            order = layer.aside.order[0]
            assert int((order < length).sum()) == count and int((order >= length).sum()) > 0
            here = torch.cat([order, layer.order[0]]).sort().values
            assert torch.equal(here, cache.layers[index - 1].order[0].sort().values)
        droppable = cache.layers[1].droppable[0]
        video = second["input_ids"][0] == llava.model.config.video_token_id
        assert torch.equal(droppable[length:], video) and int(droppable[:length].sum()) > 0
        assert bool(step(llava, cache).isfinite().all())


def test_nothing_of_it_stays_on_the_model(family: Family) -> None:
    layers = family.model.model.language_model.layers
    before = [dict(layer.__dict__) for layer in layers], dict(family.model.model.language_model.__dict__)
    patch_model(family.model, LAZY)
    family.generate(family.inputs(PROMPT), new=4)
    unpatch_model(family.model)
    assert ([dict(layer.__dict__) for layer in layers], dict(family.model.model.language_model.__dict__)) == before


def test_other_attention_is_refused(llava: Family) -> None:
    other = llava.fresh()
    other.model.model.language_model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"layers\.revive.*flex_attention.*sdpa, eager.*revive: false"):
        patch_model(other.model, LAZY)
    patch_model(other.model, {"layers": LAZY["layers"] | {"revive": False}})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(llava: Family, dtype: torch.dtype) -> None:
    half = llava.fresh()
    half.model.to(dtype)
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in half.inputs(PROMPT, OTHER).items()}
    with patched(half.model, LAZY):
        before = [layer.physical_length for layer in prefilled(half, inputs).layers]
        output = half.generate(inputs, new=6)
    assert bool(torch.stack(output.scores).isfinite().all())
    layer = output.past_key_values.layers[1]
    assert layer.keys.dtype == dtype and layer.physical_length > before[1] + 5


def test_eager_attention_brings_back_the_same(family: Family) -> None:
    other = family.fresh()
    other.model.model.language_model.set_attn_implementation("eager")
    scores = []
    for one in (family, other):
        with patched(one.model, LAZY):
            scores.append(torch.stack(one.generate(one.inputs(PROMPT, OTHER), new=8).scores))
    torch.testing.assert_close(*scores, atol=5e-4, rtol=1e-3)


def loose(order: list[list[int]], valid: list[list[bool]] | None = None) -> LooseRows:
    places = torch.tensor(order)
    real = torch.ones_like(places, dtype=torch.bool) if valid is None else torch.tensor(valid)
    states = places[..., None].float()
    return LooseRows(states, states, states, places, real)


def test_loose_rows() -> None:
    rows = loose([[3, 5, 9], [2, 4, 0]], [[True, True, True], [True, True, False]])
    found = rows.where(torch.tensor([[True, False, True], [False, True, True]]))
    assert (
        found is not None
        and found.order[:, 1].tolist() == [9, 4]
        and found.valid.tolist() == [[True] * 2, [False, True]]
    )
    assert torch.equal(found.hidden[..., 0].long(), found.order)
    assert rows.where(torch.tensor([[False] * 3, [False, False, True]])) is None
    wanted = torch.zeros(2, 10, dtype=torch.bool)
    wanted[0, 5] = wanted[1, 2] = True
    assert rows.among(wanted).tolist() == [[False, True, False], [True, False, False]]
    both = joined(found, rows)
    assert both is not None and both.order.shape == (2, 5) and joined(None, rows) is rows and joined(rows, None) is rows


def test_loose_rows_see_what_came_before_them() -> None:
    layer = LogicalLayer()
    layer.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4))
    index = torch.tensor([[0, 4, 6], [1, 2, 5]])
    layer.record(7, Rows(index, torch.tensor([[True] * 3, [False, True, True]]), [3, 2], True), ordered=True)
    mask = loose_mask(loose([[3, 5], [9, 4]], [[True, True], [False, True]]), layer)
    assert mask.shape == (2, 1, 2, 5)
    assert (mask[:, 0] == 0).int().tolist() == [[[1, 0, 0, 1, 0], [1, 1, 0, 1, 1]], [[0, 1, 1, 1, 1], [0, 1, 0, 0, 1]]]


def test_rows_of_samples_that_come_back_at_different_steps_are_packed() -> None:
    """Padding for one another never makes a layer longer than the conversation."""
    layer = LogicalLayer()

    def add(order: list[list[int]], valid: list[list[bool]]) -> None:
        places = torch.tensor(order)
        layer.update(*(places[:, None, :, None].float() for _ in range(2)))
        layer.come_back(places, torch.tensor(valid))

    start = torch.tensor([[0, 3], [0, 3]])
    layer.update(*(start[:, None, :, None].float() for _ in range(2)))
    layer.record(4, Rows(start, torch.ones(2, 2, dtype=torch.bool), [2, 2], True), ordered=True)
    assert layer.dropped == 2
    add([[1], [0]], [[True], [False]])
    add([[2], [1]], [[True], [True]])
    assert layer.dropped == 0 and layer.get_seq_length() == 4
    add([[0], [2]], [[False], [True]])
    assert layer.physical_length == 4 and layer.get_seq_length() == 4 and layer.dropped == 0
    assert layer.order is not None and layer.valid is not None and layer.valid.all()
    assert layer.order.tolist() == [[0, 3, 1, 2], [0, 3, 1, 2]]
    assert layer.keys is not None and torch.equal(layer.keys[:, 0, :, 0].long(), layer.order)
