"""The shortened sequence against a plain, unpatched language model that is fed the kept rows by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spatiotoken import patched
from spatiotoken.structures import LayerTokens, VideoFeatures
from tests.cases import REDUCED, config_of
from tests.conftest import QUESTION, Family

PROMPT = ["Look:", ("video", "pancake", 8), QUESTION]


def entry_of(family: Family, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What enters the unpatched language model."""
    seen: dict[str, Any] = {}
    hook = family.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    try:
        family.logits(inputs, use_cache=False)
    finally:
        hook.remove()
    return seen


def grid_of(family: Family, inputs: dict[str, Tensor]) -> tuple[int, int, int]:
    if family.stacks_videos:
        return (inputs["pixel_values_videos"].shape[1], 3, 3)
    frames, height, width = inputs["video_grid_thw"][0].tolist()
    return (frames, height // 2, width // 2)


def run_rows(family: Family, entry: dict[str, Any], rows: Tensor, embeds: Tensor) -> Tensor:
    """Logits of the unpatched model for the chosen rows only, their positions kept."""
    arguments = {key: value for key, value in entry.items() if key in ("position_ids",)}
    positions = arguments["position_ids"]
    if positions is None:
        positions = torch.arange(embeds.shape[1])[None]
    extra: dict[str, Any] = {}
    if entry.get("visual_pos_masks") is not None:
        pictures = entry["visual_pos_masks"]
        order = pictures[0].long().cumsum(0) - 1
        extra["visual_pos_masks"] = pictures[:, rows]
        extra["deepstack_visual_embeds"] = [x[order[rows][pictures[0, rows]]] for x in entry["deepstack_visual_embeds"]]
    with torch.inference_mode():
        output = family.model.model.language_model(
            inputs_embeds=embeds[:, rows],
            position_ids=positions[..., rows],
            attention_mask=torch.ones(1, len(rows), dtype=torch.long),
            use_cache=False,
            **extra,
        )
        return family.model.lm_head(output.last_hidden_state)


@pytest.mark.parametrize("name", ["random", "divprune", "evs", "downsample"])
def test_tokens(family: Family, name: str) -> None:
    if name == "downsample" and family.name == "qwen3_vl":
        pytest.skip("its deepstack features are averaged too: test_deepstack_is_merged")
    inputs = family.inputs(PROMPT)
    entry = entry_of(family, inputs)
    config = config_of(("tokens", name), REDUCED["tokens", name])
    is_video = inputs["input_ids"][0] == family.model.config.video_token_id
    places = is_video.nonzero()[:, 0]
    grid = grid_of(family, inputs)
    places = places[: grid[0] * grid[1] * grid[2]]  # without the newline of LLaVA-OneVision
    assert config.tokens is not None
    reduced = config.tokens.reduce(VideoFeatures(entry["inputs_embeds"][0, places], grid))
    embeds = entry["inputs_embeds"].clone()
    embeds[0, places[reduced.source]] = reduced.embeddings
    dropped = set(places.tolist()) - set(places[reduced.source].tolist())
    rows = torch.tensor([row for row in range(embeds.shape[1]) if row not in dropped])
    expected = run_rows(family, entry, rows, embeds)
    with patched(family.model, config):
        actual = family.logits(inputs)
    torch.testing.assert_close(actual[:, rows], expected, atol=2e-4, rtol=1e-4)
    assert not actual[:, sorted(dropped)].any()


def test_fastv(family: Family) -> None:
    """Layer by layer, with eager attention over the whole prompt to rank by."""
    inputs = family.inputs(PROMPT)
    config = config_of(("layers", "fastv"), REDUCED["layers", "fastv"])
    assert config.layers is not None
    entry = entry_of(family, inputs)
    embeds, length = entry["inputs_embeds"], entry["inputs_embeds"].shape[1]
    places = (inputs["input_ids"][0] == family.model.config.video_token_id).nonzero()[:, 0]
    family.model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            attentions = family.model(**inputs, output_attentions=True, use_cache=False).attentions
    finally:
        family.model.set_attn_implementation("sdpa")
    kept = config.layers.select(LayerTokens(2, len(places), attentions[1][0, :, -1, places]))
    dropped = set(places.tolist()) - set(places[kept].tolist())
    rows = torch.tensor([row for row in range(length) if row not in dropped])

    model = family.model.model.language_model
    positions = entry["position_ids"] if entry["position_ids"] is not None else torch.arange(length)[None]
    if positions.ndim == 3 and positions.shape[0] == 4:
        positions = positions[1:]
    if family.stacks_videos is False and positions.ndim == 2:
        positions = positions[None].expand(3, -1, -1)
    with torch.inference_mode():
        hidden = embeds
        cos, sin = model.rotary_emb(hidden, positions)
        pictures = entry.get("visual_pos_masks")
        for index, layer in enumerate(model.layers):
            if index == 2:
                hidden, cos, sin = hidden[:, rows], cos[:, rows], sin[:, rows]
            hidden = layer(hidden, attention_mask=None, position_embeddings=(cos, sin), past_key_values=None)
            if pictures is not None and index < len(entry["deepstack_visual_embeds"]):
                features = entry["deepstack_visual_embeds"][index]
                here = torch.zeros(length, dtype=torch.int64)
                here[pictures[0]] = torch.arange(len(features))
                active = torch.arange(length) if index < 2 else rows
                seen = pictures[0, active]
                hidden = hidden.clone()
                hidden[0, seen] += features[here[active][seen]]
        expected = family.model.lm_head(model.norm(hidden))
    with patched(family.model, config):
        actual = family.logits(inputs)
    torch.testing.assert_close(actual[:, rows], expected, atol=2e-4, rtol=1e-4)
    assert not actual[:, sorted(dropped)].any()


def test_attention_rows_equal_eager_attention(family: Family) -> None:
    from spatiotoken.patches.adapter import find_adapter

    inputs = family.inputs(PROMPT)
    model = family.model.model.language_model
    seen: dict[str, Any] = {}
    hook = model.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs, hidden=args[0]), with_kwargs=True
    )
    family.model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            expected = family.model(**inputs, output_attentions=True).attentions[1]
            rows = torch.tensor([[3, 10, expected.shape[2] - 1]])
            cache = seen["past_key_values"]
            for keys in (None, cache.layers[1].keys):
                actual = find_adapter(family.model).attention_rows(
                    model.layers[1], seen["hidden"], rows, seen["position_embeddings"], keys, None
                )
                torch.testing.assert_close(actual, expected[:, :, rows[0]], atol=1e-5, rtol=0)
    finally:
        hook.remove()
        family.model.set_attn_implementation("sdpa")


def test_deepstack_is_merged(families: dict[str, Family]) -> None:
    """Features that Qwen3-VL adds in decoder layers are averaged like the tokens they belong to."""
    family = families["qwen3_vl"]
    inputs = family.inputs(PROMPT)
    entry = entry_of(family, inputs)
    config = config_of(("tokens", "downsample"), {"retention": 0.3})
    seen: dict[str, Any] = {}
    with patched(family.model, config):
        hook = family.model.model.language_model.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(hidden=args[0]), with_kwargs=True
        )
        deepstack: list[Tensor] = []
        original = type(family.model.model.language_model)._deepstack_process

        def spy(hidden: Tensor, pictures: Tensor, features: Tensor) -> Tensor:
            deepstack.append(features)
            return original(family.model.model.language_model, hidden, pictures, features)

        family.model.model.language_model.__dict__["_deepstack_process"] = spy
        family.logits(inputs)
        del family.model.model.language_model.__dict__["_deepstack_process"]
        hook.remove()
    assert config.tokens is not None
    grid = grid_of(family, inputs)
    for actual, full in zip(deepstack, entry["deepstack_visual_embeds"], strict=True):
        expected = config.tokens.reduce(VideoFeatures(full, grid)).embeddings
        torch.testing.assert_close(actual, expected)
