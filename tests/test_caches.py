"""Caches, decoding modes and what else users do with a patched model."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from spatiotoken import last_report, load_config, patch_model, patched, unpatch_model
from spatiotoken.sequence import LogicalLayer, Rows
from spatiotoken.undo import UndoError
from tests.cases import COMBINED, REDUCED, config_of
from tests.conftest import QUESTION, Family

PROMPT = [("video", "pancake", 8), QUESTION]
CONFIGS = [
    pytest.param(config_of(("tokens", "evs"), REDUCED["tokens", "evs"]), id="tokens"),
    pytest.param(config_of(("layers", "fastv"), REDUCED["layers", "fastv"]), id="layers"),
    pytest.param(config_of(("frames", "uniform"), REDUCED["frames", "uniform"]), id="frames"),
]


def single_answers(family: Family, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    return family.model.generate(**inputs, max_new_tokens=5, **kwargs)


@pytest.mark.parametrize("config", CONFIGS)
def test_beam_search(family: Family, config: Any) -> None:
    """Beams repeat and reorder the cache; with one beam's worth of choice they give the greedy answer."""
    inputs = family.inputs(PROMPT, ["Describe", ("video", "nasa", 8), "the scene."])
    with patched(family.model, config):
        batch = single_answers(family, inputs, num_beams=3, do_sample=False)
        alone = single_answers(family, family.inputs(PROMPT), num_beams=3, do_sample=False)
        assert torch.equal(batch[0, -5:], alone[0, -5:])
        uncached = single_answers(family, family.inputs(PROMPT), num_beams=3, do_sample=False, use_cache=False)
    if config.layers is None:  # which otherwise ranks by another last token
        assert torch.equal(alone, uncached)


@pytest.mark.parametrize("config", CONFIGS)
def test_several_returned_sequences(family: Family, config: Any) -> None:
    with patched(family.model, config):
        torch.manual_seed(0)
        several = single_answers(family, family.inputs(PROMPT), do_sample=True, num_return_sequences=3)
        assert several.shape[0] == 3
        greedy = single_answers(family, family.inputs(PROMPT), do_sample=True, num_return_sequences=2, top_k=1)
        expected = single_answers(family, family.inputs(PROMPT), do_sample=False)
        assert torch.equal(greedy, expected.expand(2, -1))


@pytest.mark.parametrize("config", CONFIGS)
def test_tokens_taken_back(family: Family, config: Any) -> None:
    """What assisted decoding does with rejected candidates. (Its own modes copy placeholders of these prompts.)"""
    inputs = family.inputs(PROMPT, ["Describe", ("video", "nasa", 8), "the scene."])
    with patched(family.model, config), torch.inference_mode():
        one, two = (family.model(**inputs, use_cache=True).past_key_values for _ in range(2))
        more = inputs["input_ids"][:, -6:]

        def go_on(ids: Tensor, cache: Any) -> Tensor:
            mask = torch.cat(
                [inputs["attention_mask"], torch.ones(2, cache.get_seq_length() - length + ids.shape[1])], 1
            )
            positions = mask.cumsum(-1).long()[:, -ids.shape[1] :]
            return family.model(
                input_ids=ids, attention_mask=mask.long(), position_ids=positions, past_key_values=cache
            ).logits

        length = inputs["input_ids"].shape[1]
        go_on(more[:, :4], one)
        one.crop(-2)
        assert one.get_seq_length() == length + 2
        go_on(more[:, :2], two)
        torch.testing.assert_close(go_on(more[:, 4:], one), go_on(more[:, 4:], two))


@pytest.mark.parametrize("config", CONFIGS)
def test_copied_cache(family: Family, config: Any) -> None:
    """One encoded video, several questions, each on a copy of the cache."""
    prompt = family.inputs(PROMPT)
    with patched(family.model, config):
        first = family.generate(prompt)
        kept = copy.deepcopy(first.past_key_values)
        ids = torch.cat([first.sequences, first.sequences[:, -3:]], dim=1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        one = family.generate(again, past_key_values=first.past_key_values)
        two = family.generate(again, past_key_values=kept)
    assert torch.equal(one.sequences, two.sequences)


@pytest.mark.parametrize("config", CONFIGS)
def test_second_turn_brings_another_video(llava: Family, config: Any) -> None:
    """A cache that is shorter already grows by a prompt that is cut too: as one prompt with both."""
    with patched(llava.model, config, **({"layers.retention": 1.0} if config.layers else {})):
        both = llava.inputs([*PROMPT, "Now:", ("video", "nasa", 8), "And this?"])
        first_pixels = both["pixel_values_videos"][:1]
        ids = both["input_ids"]
        is_video = (ids[0] == llava.model.config.video_token_id).nonzero()[:, 0]
        cut = int(is_video[len(is_video) // 2]) - 2
        expected = llava.logits(both)[:, -1]
        with torch.inference_mode():
            cache = llava.model(
                input_ids=ids[:, :cut], pixel_values_videos=first_pixels, use_cache=True
            ).past_key_values
            actual = llava.model(
                input_ids=ids[:, cut:], pixel_values_videos=both["pixel_values_videos"][1:], past_key_values=cache
            ).logits[:, -1]
    if config.layers is None:
        assert cache.layers[0].dropped > 0
    assert cache.get_seq_length() == ids.shape[1]
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
def test_video_after_a_cached_prefix(llava: Family, config: Any) -> None:
    """A prefix without pictures is cached as usual; the prompt with the video is cut, as one prompt would be."""
    inputs = llava.inputs(["A long instruction that every question shares.", *PROMPT])
    ids = inputs["input_ids"]
    with patched(llava.model, config), torch.inference_mode():
        expected = llava.model(**inputs).logits
        cache = llava.model(input_ids=ids[:, :8], use_cache=True).past_key_values
        assert type(cache.layers[0]) is not LogicalLayer
        rest = {**inputs, "input_ids": ids[:, 8:], "attention_mask": inputs["attention_mask"]}
        actual = llava.model(**rest, past_key_values=cache).logits
    torch.testing.assert_close(actual, expected[:, 8:], atol=2e-4, rtol=1e-4)
    assert cache.get_seq_length() == ids.shape[1] > cache.layers[-1].physical_length


@pytest.mark.parametrize("config", CONFIGS)
def test_cache_after_unpatching(family: Family, config: Any) -> None:
    """A cache of one prompt goes on with the plain model; others say that they cannot."""
    short = [("video", "vp9", 8), QUESTION]  # since Qwen2.5-VL loses its place after slowly sampled video
    batch = family.inputs(short, ["Describe", ("video", "nasa", 8), "the scene."])
    for inputs, padded in ((family.inputs(short), False), (batch, True)):
        with patched(family.model, config):
            first = family.generate(inputs, new=6)
            expected = family.generate(inputs, new=7)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(first.sequences), 6, dtype=torch.long)], dim=1)
        again = {"input_ids": first.sequences, "attention_mask": mask}
        if padded or config.layers:
            with pytest.raises(RuntimeError, match="patch the model to go on"):
                family.generate(again, new=1, past_key_values=first.past_key_values)
        else:
            actual = family.generate(again, new=1, past_key_values=first.past_key_values)
            torch.testing.assert_close(actual.scores[0], expected.scores[6], atol=2e-4, rtol=1e-4)


def test_tuples_instead_of_outputs(family: Family) -> None:
    inputs = family.inputs(PROMPT)
    with patched(family.model, COMBINED["balanced"]), torch.inference_mode():
        expected = family.model(**inputs)
        actual = family.model(**inputs, return_dict=False)
    assert isinstance(actual, tuple) and torch.equal(actual[0], expected.logits)


def test_hidden_states_have_the_real_lengths(family: Family) -> None:
    inputs = family.inputs(PROMPT)
    with patched(family.model, COMBINED["balanced"]), torch.inference_mode():
        output = family.model(**inputs, output_hidden_states=True)
        report = last_report(family.model)
    lengths = [state.shape[1] for state in output.hidden_states[:-1]]
    entered, left = report.text_tokens + report.visual_kept, report.stages["layers"]
    # What enters each decoder layer, as it comes from the one before.
    assert lengths == [entered] * 3 + [entered - left.tokens_in + left.tokens_out]


@pytest.mark.parametrize("config", CONFIGS)
def test_unsupported_caches_are_named(family: Family, config: Any) -> None:
    inputs = family.inputs(PROMPT)
    with patched(family.model, config):
        with pytest.raises(ValueError, match="static cache|StaticCache"):
            single_answers(family, inputs, cache_implementation="static", disable_compile=True)
        cache = StaticCache(config=family.model.config.text_config, max_cache_len=512)
        with pytest.raises(ValueError, match="StaticCache.*supported: DynamicCache"), torch.inference_mode():
            family.model(**inputs, past_key_values=cache)
        offloaded = DynamicCache()
        offloaded.offloading = True  # its constructor wants a GPU
        with pytest.raises(ValueError, match="offloaded"), torch.inference_mode():
            family.model(**inputs, past_key_values=offloaded)
        single_answers(family, inputs)  # the model still works


def test_static_cache_without_reduction(family: Family) -> None:
    inputs = family.inputs(PROMPT)
    options = {"do_sample": False, "cache_implementation": "static", "disable_compile": True}
    expected = single_answers(family, inputs, **options)
    with patched(family.model, "dense"):
        assert torch.equal(single_answers(family, inputs, **options), expected)


def test_cache_of_another_config_is_refused(family: Family) -> None:
    prompt = family.inputs(PROMPT)
    with patched(family.model, config_of(("layers", "fastv"), {"layer": 2})):
        first = family.generate(prompt)
    with patched(family.model, config_of(("layers", "fastv"), {"layer": 3})):
        ids = torch.cat([first.sequences, first.sequences[:, -3:]], dim=1)
        with pytest.raises(ValueError, match="layer 2 by another config"):
            family.generate(
                {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, past_key_values=first.past_key_values
            )


def test_logical_layer_crop_and_reset() -> None:
    layer = LogicalLayer()
    states = torch.arange(10.0).view(1, 1, 10, 1)
    layer.update(states[:, :, :6], states[:, :, :6])
    layer.record(9, Rows(torch.tensor([[0, 1, 4, 6, 7, 8]]), torch.ones(1, 6, dtype=torch.bool), [6], True))
    assert (layer.get_seq_length(), layer.physical_length, layer.get_mask_sizes(2)) == (9, 6, (8, 3))
    layer.update(states[:, :, 6:9], states[:, :, 6:9])
    layer.append(3, None)
    layer.crop(-2)
    assert (layer.get_seq_length(), layer.physical_length) == (10, 7)
    with pytest.raises(ValueError, match="cannot crop 5 tokens: only the last 4 are whole"):
        layer.crop(-5)
    layer.crop(-4)
    assert (layer.get_seq_length(), layer.physical_length) == (6, 3)
    layer.reset()
    assert (layer.get_seq_length(), layer.dropped, layer.valid) == (0, 0, None)


def test_logical_layer_mask_over_the_original_length() -> None:
    layer = LogicalLayer()
    states = torch.zeros(2, 1, 3, 1)
    layer.update(states, states)
    valid = torch.tensor([[False, True, True], [True, True, True]])
    layer.record(5, Rows(torch.tensor([[0, 3, 4], [0, 3, 4]]), valid, [2, 3], True))
    mask = layer.attention_mask(None, 1)
    assert mask is not None and mask.int().tolist() == [[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    layer.batch_select_indices(torch.tensor([1]))
    assert layer.valid is not None and layer.valid.tolist() == [[True, True, True]]


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """Operations that make the host wait for a GPU: reading values, and results whose size depends on values."""
    waits: list[str] = []
    reading = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default"}

    class CountOperations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func)
            by_mask = name.startswith("aten.index") and any(
                isinstance(index, Tensor) and index.dtype == torch.bool
                for index in (args[1] if isinstance(args[1], list | tuple) else ())
            )
            if name in reading or by_mask or name.startswith("aten.bincount"):
                waits.append(name)
            return func(*args, **(kwargs or {}))

    class CountCopies(TorchFunctionMode):  # which do nothing on a CPU, so no operation is seen
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") in {"tolist", "cpu", "numpy"}:
                waits.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with CountOperations(), CountCopies():
        yield waits


def test_waits_are_counted() -> None:
    values = torch.arange(4)
    with counted_waits() as waits:
        assert values[torch.tensor(2)].item() == 2  # an index that is a bare tensor is read
        values[values > 1]
        values.tolist()
        values.nonzero()
        torch.bincount(values)
        bool((values > 0).all())
        values.sum() + values[1:].max()
    assert len(waits) == 7, waits


TOWERS = {
    method: config_of((stage, method), settings).to_dict()
    for (stage, method), settings in REDUCED.items()
    if stage == "vision"
}


@pytest.mark.parametrize("config", [pytest.param(config, id=name) for name, config in {**COMBINED, **TOWERS}.items()])
def test_host_waits_do_not_grow_with_frames(
    family: Family, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("divprune", "todre"):  # as on a GPU
        monkeypatch.setattr(f"spatiotoken.tokens.{module}.waits_are_free", lambda device: False)
    # The CPU's kernel waits at each block, the GPU's does not at all.
    monkeypatch.setattr("spatiotoken.attention.base.block_sparse_attention", lambda query, *_, **__: query)
    # Each layer asks once how much there is to compute, and each new mask which rows are padding.
    sparse = 4 + 2 if config.get("attention") else 0
    # Each layer in which patches go asks how many are left, and how many of each window if there are any.
    tower = 8 if config.get("vision") else 0
    counts = []
    for frames in (4, 8, 16):
        inputs = family.inputs([("video", "pancake", frames), QUESTION])
        if "pixel_values_videos" in inputs and not family.stacks_videos:
            # Same number of tokens per frame, so that only their number changes.
            assert inputs["video_grid_thw"][0, 0] == max(frames // 2, 1)
        with counted_waits() as unpatched:
            family.logits(inputs)
        with patched(family.model, config), counted_waits() as waits:
            family.logits(inputs)
        counts.append(len(waits) - len(unpatched))
    assert max(counts) <= 8 + sparse + tower, counts
    assert counts[1] == counts[2], counts


def test_decoding_adds_few_host_waits(family: Family) -> None:
    inputs = family.inputs(PROMPT)
    with counted_waits() as unpatched:
        family.generate(inputs, new=8)
    short, long = [], []
    for waits, new in ((short, 8), (long, 16)):
        with patched(family.model, COMBINED["light"]), counted_waits() as counted:
            family.generate(inputs, new=new)
        waits += counted
    with counted_waits() as unpatched_long:
        family.generate(inputs, new=16)
    assert (len(long) - len(short)) <= (len(unpatched_long) - len(unpatched))


def test_report_of_a_generation(family: Family) -> None:
    inputs = family.inputs(PROMPT)
    with patched(family.model, COMBINED["balanced"]):
        family.generate(inputs)
        report = last_report(family.model)
        assert report.prompt_tokens == inputs["input_ids"].shape[1]
        assert report.text_tokens + report.visual_tokens == report.prompt_tokens
        frames, tokens, layers = (report.stages[stage] for stage in ("frames", "tokens", "layers"))
        assert frames.tokens_in > frames.tokens_out == tokens.tokens_in > tokens.tokens_out
        newlines = report.visual_tokens - frames.tokens_in
        assert report.visual_kept == tokens.tokens_out + newlines == layers.tokens_in > layers.tokens_out
        assert report.frames is not None and len(report.frames[0]) == 3
        assert 0 < report.prefill_flops < report.prefill_flops_dense
        assert report.prefill_ms > sum(stage.milliseconds for stage in report.stages.values()) > 0
        assert report.decode_ms > 0 and report.decode_steps == 3 and report.peak_memory_bytes > 0
        assert report.to_dict()["stages"]["tokens"]["method"] == "divprune"
    with pytest.raises(ValueError, match="patch_model first"):
        last_report(family.model)
    with patched(family.model, "dense"), pytest.raises(ValueError, match="has not run"):
        last_report(family.model)


def test_padding_is_not_reported(family: Family) -> None:
    """Neither of prompts with pictures, reduced or not, nor of text."""
    text = family.inputs(["How many people are there in the room?"], ["What?"])
    batch = family.inputs(PROMPT, ["Describe", ("video", "nasa", 8), "the scene in detail."])
    for config in ("dense", "evs", "sliding_vertical"):
        with patched(family.model, config):
            for inputs in (text, batch):
                family.logits(inputs)
                assert last_report(family.model).prompt_tokens == int(inputs["attention_mask"].sum())
                assert inputs["attention_mask"].sum() < inputs["attention_mask"].numel()


def test_gathered_logits_keep_their_places(family: Family) -> None:
    """`logits_to_keep` and plain forwards agree on the rows that callers index."""
    inputs = family.inputs(PROMPT)
    with patched(family.model, config_of(("tokens", "evs"), {"retention": 0.3})):
        everything = family.logits(inputs)
        assert everything.shape[1] == inputs["input_ids"].shape[1]
        torch.testing.assert_close(family.logits(inputs, logits_to_keep=3), everything[:, -3:])
        core = family.model.model(**inputs).last_hidden_state
        torch.testing.assert_close(family.model.lm_head(core), everything)


def test_inputs_embeds_instead_of_ids(llava: Family) -> None:
    inputs = llava.inputs(PROMPT)
    with patched(llava.model, config_of(("tokens", "evs"), {"retention": 0.3})):
        expected = llava.logits(inputs)
        embeds = llava.model.get_input_embeddings()(inputs["input_ids"])
        rest = {key: value for key, value in inputs.items() if key != "input_ids"}
        torch.testing.assert_close(llava.logits({**rest, "inputs_embeds": embeds}), expected)


def test_nan_features_are_refused(family: Family) -> None:
    inputs = family.inputs(PROMPT)
    broken = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"] * float("nan")}
    with patched(family.model, config_of(("tokens", "evs"), {})):
        with pytest.raises(ValueError, match="video features contain NaN"):
            family.logits(broken)
        assert torch.isfinite(family.logits(inputs)).all()


def test_accelerate_dispatch(families: dict[str, Family]) -> None:
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_module

    family = families["qwen2_5_vl"]
    inputs, model = family.inputs(PROMPT), family.fresh().model
    config = config_of(("tokens", "evs"), {"retention": 0.3})
    # The same weights in memory: products of matrices that lie elsewhere may be rounded otherwise.
    with patched(model, config), torch.inference_mode():
        expected = model(**inputs).logits
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    with patched(model, config), torch.inference_mode():
        assert torch.equal(model(**inputs).logits, expected)
    patch_model(model, config)
    remove_hook_from_module(model.model.language_model)  # takes our forward away with accelerate's
    with pytest.raises(UndoError, match="TextModel.forward was replaced after patch_model"):
        unpatch_model(model)


def test_copies_of_patched_models_are_refused(families: dict[str, Family]) -> None:
    model = families["qwen2_vl"].model
    with patched(model, "evs"), pytest.raises(RuntimeError, match="copy the unpatched model"):
        copy.deepcopy(model)
    assert copy.deepcopy(model).__dict__.keys() == model.__dict__.keys()


def test_one_patched_model_within_another(families: dict[str, Family], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in assisted decoding: passes may nest, and each model keeps its own state and report."""
    outer, inner = families["qwen2_5_vl"], families["llava_onevision"]
    inputs, other = outer.inputs(PROMPT), inner.inputs(PROMPT)
    with patched(inner.model, COMBINED["light"]):
        expected_inner = inner.logits(other)
    with patched(outer.model, COMBINED["balanced"]):
        expected = outer.logits(inputs)
    with patched(outer.model, COMBINED["balanced"]), patched(inner.model, COMBINED["light"]):
        norm = outer.model.model.language_model.norm
        hook = norm.register_forward_pre_hook(lambda *_: seen.append(inner.logits(other)) if not seen else None)
        seen: list[Tensor] = []
        assert torch.equal(outer.logits(inputs), expected)
        hook.remove()
        assert torch.equal(seen[0], expected_inner)
        assert last_report(outer.model).visual_tokens != last_report(inner.model).visual_tokens


def test_threads(families: dict[str, Family]) -> None:
    family = families["qwen3_vl"]
    prompts = [family.inputs([("video", clip, 8), QUESTION]) for clip in ("pancake", "vp9", "nasa")]
    with patched(family.model, COMBINED["balanced"]):
        expected = [family.logits(prompt) for prompt in prompts]
        with ThreadPoolExecutor(3) as pool:
            for _ in range(3):
                for actual, one in zip(pool.map(family.logits, prompts), expected, strict=True):
                    assert torch.equal(actual, one)


def test_patched_models_are_collected(families: dict[str, Family]) -> None:
    model = patch_model(families["llava_onevision"].fresh().model, COMBINED["light"])
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("config", CONFIGS)
def test_padded_prefix_in_a_plain_cache(llava: Family, config: Any) -> None:
    """Rows that were cached before anything was dropped keep their padding."""
    samples = [["Hi.", *PROMPT], ["A much longer instruction comes first.", ("video", "nasa", 8), QUESTION]]
    batch = llava.inputs(*samples)
    ids, mask, cut = batch["input_ids"], batch["attention_mask"], 10
    assert not mask[0, :4].any()
    with patched(llava.model, config), torch.inference_mode():
        cache = llava.model(input_ids=ids[:, :cut], attention_mask=mask[:, :cut], use_cache=True).past_key_values
        rest = {**batch, "input_ids": ids[:, cut:]}
        positions = torch.arange(cut, ids.shape[1])[None]
        actual = llava.model(**rest, position_ids=positions, past_key_values=cache).logits
        expected = llava.model(**batch, position_ids=torch.arange(ids.shape[1])[None]).logits
    for row in range(2):
        real = mask[row, cut:].bool()
        torch.testing.assert_close(actual[row][real], expected[row, cut:][real], atol=2e-4, rtol=1e-4)


def test_unreduced_pictures_on_a_pruned_cache(llava: Family) -> None:
    """A turn whose picture stays whole is on the cache's record like any other."""
    config = config_of(("tokens", "evs"), {"retention": 0.3})
    then = [("image", "nasa"), "And this?"]  # the same in both, so that it begins at the same row
    samples = [
        ["Hi.", ("video", "pancake", 8), *then],
        ["A much longer instruction first.", ("video", "nasa", 8), *then],
    ]
    batch = llava.inputs(*samples)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    is_image = ids == llava.model.config.image_token_id
    cut = int(is_image.long().argmax(dim=1).min())
    assert not (ids[:, cut:] == llava.model.config.video_token_id).any()
    with patched(llava.model, config), torch.inference_mode():
        expected = llava.logits({**batch, "position_ids": torch.arange(ids.shape[1])[None]})
        pixels = {"pixel_values_videos": batch["pixel_values_videos"]}
        first = {**pixels, "input_ids": ids[:, :cut], "attention_mask": mask[:, :cut]}
        cache = llava.model(**first, position_ids=torch.arange(cut)[None], use_cache=True).past_key_values
        rest = {k: v for k, v in batch.items() if k != "pixel_values_videos"} | {"input_ids": ids[:, cut:]}
        positions = torch.arange(cut, ids.shape[1])[None]
        actual = llava.model(**rest, position_ids=positions, past_key_values=cache).logits
    for row in range(2):
        real = mask[row, cut:].bool()
        torch.testing.assert_close(actual[row][real], expected[row, cut:][real], atol=2e-4, rtol=1e-4)
    assert cache.layers[0].valid.shape[1] == cache.layers[0].physical_length


# Without a `layers` method: prompt and first candidates come as one, so FastV would rank by the last candidate.
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[2]])
def test_assisted_generation(family: Family, config: Any) -> None:
    """Candidates are verified in one pass and taken back where they are wrong."""
    inputs = family.inputs(PROMPT)
    with patched(family.model, config):
        expected = single_answers(family, inputs, do_sample=False)
        actual = single_answers(family, inputs, do_sample=False, assistant_model=family.fresh().model)
    assert torch.equal(actual, expected)


def test_sparse_prefill_leaves_other_passes_alone(family: Family) -> None:
    """A static cache hands over its whole buffer, which the model's own attention understands."""
    inputs = family.inputs(PROMPT)
    config = config_of(("attention", "sliding_vertical"), REDUCED["attention", "sliding_vertical"])
    static = {"cache_implementation": "static", "disable_compile": True, "do_sample": False}
    expected = single_answers(family, inputs, **static)
    with patched(family.model, config):
        assert torch.equal(single_answers(family, inputs, **static), expected)
        assert not torch.equal(single_answers(family, inputs, do_sample=False), expected)


def test_sparse_prefill_leaves_masks_of_the_caller_alone(llava: Family) -> None:
    inputs = llava.inputs(PROMPT)
    config = config_of(("attention", "sliding_vertical"), REDUCED["attention", "sliding_vertical"])
    length = inputs["input_ids"].shape[1]
    own = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    own[..., 4:9] = False
    own[..., torch.arange(length), torch.arange(length)] = True
    with torch.inference_mode():
        expected = llava.model(**{**inputs, "attention_mask": own}).logits
        with patched(llava.model, config):
            assert torch.equal(llava.model(**{**inputs, "attention_mask": own}).logits, expected)


def test_nested_patches(family: Family) -> None:
    inputs = family.inputs(PROMPT)
    with patched(family.model, "evs"):
        outer = family.logits(inputs)
        with patched(family.model, "random"):
            assert not torch.equal(family.logits(inputs), outer)
        assert torch.equal(family.logits(inputs), outer)
    assert "_spatiotoken" not in family.model.__dict__


def test_no_mark_in_any_output(family: Family) -> None:
    inputs = family.inputs([("image", "nasa"), *PROMPT])
    with patched(family.model, load_config(COMBINED["light"], images=True)), torch.inference_mode():
        output = family.model(**inputs, output_hidden_states=True)
    flat = [output.logits, *output.hidden_states]
    flat += [
        x for name in ("image_hidden_states", "video_hidden_states") if (x := getattr(output, name, None)) is not None
    ]
    assert all(torch.isfinite(x).all() for x in flat) and len(flat) >= 6


def test_text_conversation_beside_a_video_conversation(family: Family) -> None:
    text = family.inputs(["How many people are there in the room?"])
    again = family.processor.tokenizer(" And then?", return_tensors="pt").input_ids
    with patched(family.model, "evs"):
        answers = []
        for disturbed in (False, True):
            first = family.generate(text)
            if disturbed:
                family.generate(family.inputs(PROMPT))
            ids = torch.cat([first.sequences, again], dim=1)
            turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            answers.append(family.generate(turn, past_key_values=first.past_key_values))
    assert torch.equal(torch.stack(answers[0].scores), torch.stack(answers[1].scores))


def test_core_and_features_as_tuples(family: Family) -> None:
    inputs = family.inputs(PROMPT)
    with patched(family.model, "evs"), torch.inference_mode():
        core = family.model.model(**inputs, return_dict=False)
        assert isinstance(core, tuple) and core[0].shape[1] == inputs["input_ids"].shape[1]


def test_training(family: Family) -> None:
    """Gradients flow through a patched model, also with gradient checkpointing unless layers prune."""
    fresh = family.fresh()
    inputs = fresh.inputs(PROMPT)
    fresh.model.train()
    # Renamed after transformers 5.17.
    new_name = getattr(fresh.model, "activation_checkpointing_enable", None)
    grads = []
    with patched(fresh.model, "evs"):
        for checkpointing in (False, True):
            if checkpointing:
                (new_name or fresh.model.gradient_checkpointing_enable)()
            fresh.model.zero_grad()
            fresh.model(**inputs).logits[:, -1].logsumexp(-1).sum().backward()
            grads.append([p.grad.clone() for p in fresh.model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 20
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)
    with patched(fresh.model, "fastv"):
        with pytest.raises(ValueError, match="gradient checkpointing"):
            fresh.model(**inputs)
        fresh.model.eval()
        assert torch.isfinite(fresh.logits(inputs)).all()


def test_chunk_that_loses_everything(family: Family) -> None:
    """With chunked prefill, which transformers has for encoded pictures, a chunk may keep no row."""
    import transformers

    if int(transformers.__version__.split(".")[1]) < 23:
        pytest.skip("transformers 5.17 does not split prompts with pictures")
    inputs = family.inputs(PROMPT)
    for config in (
        config_of(("frames", "uniform"), {"num_frames": 1}),
        config_of(("tokens", "evs"), {"retention": 0.3}),
    ):
        with patched(family.model, config):
            expected = family.generate(inputs)
            actual = family.generate(inputs, prefill_chunk_size=4)
        torch.testing.assert_close(actual.scores[0], expected.scores[0], atol=2e-4, rtol=1e-4)
