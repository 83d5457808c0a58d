"""The vision tower in fewer calls: the same values, in every family and under every kind of config."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_outputs import BaseModelOutputWithPooling

from spatiotoken import load_config, patch_model, patched, unpatch_model
from spatiotoken.evaluation.sharing import leaves_the_tower_alone
from spatiotoken.patches.adapter import find_adapter
from spatiotoken.vision import exact
from spatiotoken.vision.exact import chunk_rows, chunked_attention
from tests.conftest import QUESTION, Family

PROMPT = [("image", "nasa"), ("video", "pancake", 6), QUESTION]
SAME = {"atol": 2e-5, "rtol": 1e-4}


def config(name: str, fast: bool = True) -> Any:
    return load_config(name, fast_tower=fast)


@pytest.mark.parametrize(
    "lengths", [[5], [4, 4, 4], [4, 2, 4, 4, 2, 1], [3, 0, 3, 2], [1, 2, 3]], ids=lambda value: str(value)
)
def test_chunks_attend_within_themselves(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, sum(lengths), 8, generator=generator) for _ in range(3))
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    found = chunked_attention(query, key, value, chunk_rows(bounds, query.device), 0.3)
    parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    expected = torch.cat([scaled_dot_product_attention(*part, scale=0.3) for part in parts], dim=2).transpose(1, 2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["dense", "divprune", "visionzip", "kmeans", "fastv", "holitom"])
def test_same_outputs(family: Family, name: str) -> None:
    """Also where methods choose frames, or read what passes within the tower."""
    inputs = family.inputs(PROMPT, [("video", "vp9", 6), "Who?"]) if not family.stacks_videos else family.inputs(PROMPT)
    found = []
    for fast in (False, True):
        with patched(family.model, config(name, fast), processor=family.processor):
            found.append(family.logits(inputs))
    torch.testing.assert_close(*found, **SAME)


def test_images_alone(image_family: Family) -> None:
    inputs = image_family.inputs([("image", "nasa"), ("image", "pancake"), QUESTION])
    expected = image_family.logits(inputs)
    with patched(image_family.model, config("dense")):
        torch.testing.assert_close(image_family.logits(inputs), expected, **SAME)


def test_nothing_is_left(family: Family) -> None:
    inputs = family.inputs(PROMPT)
    expected = family.logits(inputs)
    core = find_adapter(family.model).core(family.model)
    tower = core.visual if hasattr(core, "visual") else core.vision_tower
    before = (
        [dict(module.__dict__) for module in tower.modules()],
        tower.config.to_dict(),
        list(family.model.state_dict()),
    )
    patch_model(family.model, config("dense"))
    assert list(family.model.state_dict()) == before[2], "a patched model can be saved whole"
    family.logits(inputs)
    unpatch_model(family.model)
    assert [dict(module.__dict__) for module in tower.modules()] == before[0] and tower.config.to_dict() == before[1]
    assert torch.equal(family.logits(inputs), expected)


def test_qwen_towers_are_called_once_for_all_windows(qwen: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and frames of an image and a video; the bounds are brought to the host once for each kind."""
    calls: list[int] = []
    own = scaled_dot_product_attention

    def counted(*args: Tensor, **kwargs: Any) -> Tensor:
        calls.append(args[0].shape[0])
        return own(*args, **kwargs)

    read: list[int] = []
    rows = exact.chunk_rows
    monkeypatch.setattr(exact, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(exact, "chunk_rows", lambda bounds, device: read.append(len(bounds)) or rows(bounds, device))
    inputs = qwen.inputs([("video", "pancake", 8), QUESTION])
    with patched(qwen.model, config("dense")):
        qwen.logits(inputs)
    layers = len(qwen.model.model.visual.blocks)
    kinds = 2 if hasattr(qwen.model.model.visual, "fullatt_block_indexes") else 1
    assert len(read) == kinds and sum(calls) >= 4 * layers
    # Windows at the edges are of other sizes, so there are up to four.
    assert layers <= len(calls) <= 4 * layers


def test_qwen_towers_without_sdpa_are_refused(qwen: Family) -> None:
    eager = qwen.fresh()
    eager.model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="fast_tower needs a vision tower with attn_implementation='sdpa' or flash"):
        patch_model(eager.model, config("dense"))
    assert "_spatiotoken" not in eager.model.__dict__


def test_llava_towers_run_in_parts(llava: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few frames at a time, no layers behind the one that is read, and nothing held of the others."""
    monkeypatch.setattr(exact, "FRAMES", 4)
    inputs = llava.inputs([("video", "pancake", 6), QUESTION])
    expected = llava.logits(inputs)
    core = llava.model.model
    sizes: list[int] = []
    handle = core.vision_tower.encoder.layers[0].register_forward_hook(lambda _, __, out: sizes.append(out.shape[0]))
    held: list[list[bool]] = []
    pooled = core.get_video_features

    @functools.wraps(pooled)
    def watched(*args: Any, **kwargs: Any) -> Any:
        output = pooled(*args, **kwargs)
        held.append([state is not None for state in output.hidden_states])
        return output

    core.get_video_features = watched
    try:
        with patched(llava.model, config("dense")):
            torch.testing.assert_close(llava.logits(inputs), expected, **SAME)
    finally:
        handle.remove()
        del core.get_video_features
    assert sizes == [4, 2] and sum(held[0]) == 1


def test_states_that_nobody_reads_are_gone_before_the_next_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "FRAMES", 2)
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []

    def tower(pixel_values: Tensor) -> BaseModelOutputWithPooling:
        counts.append(sum(state() is not None for state in alive))
        states = tuple(pixel_values + layer for layer in range(4))
        alive.extend(map(weakref.ref, states))
        return BaseModelOutputWithPooling(last_hidden_state=states[-1], hidden_states=states)

    output = exact.in_parts(tower, (-2,), torch.arange(6.0)[:, None])
    assert counts == [0, 2, 4], "of each part the one that is read, and the last one"
    assert [state is None for state in output.hidden_states] == [True, True, False, True]
    assert output.hidden_states[2][:, 0].tolist() == [2, 3, 4, 5, 6, 7]
    assert output.last_hidden_state[:, 0].tolist() == [3, 4, 5, 6, 7, 8]


def test_evaluations_do_not_mix_the_two() -> None:
    assert leaves_the_tower_alone(config("divprune", False)) and not leaves_the_tower_alone(config("divprune"))


def test_it_is_a_key_of_configs() -> None:
    assert load_config({"fast_tower": True}).fast_tower and not load_config("dense").fast_tower
    assert load_config(config("evs").to_yaml() and config("evs").to_dict()) == config("evs")
    with pytest.raises(ValueError, match="fast_tower"):
        load_config("dense", fast_tower="perhaps")
