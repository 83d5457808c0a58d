"""What is read from vision towers: the same weights as eager attention, in the places of the features."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl

from spatiotoken import patch_model, patched
from spatiotoken.config import PatchConfig
from spatiotoken.encoding import FeatureStages
from spatiotoken.patches.adapter import find_adapter
from spatiotoken.patches.qwen_vl import rotated
from spatiotoken.registry import METHODS
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens import SaliencyReducer
from spatiotoken.tower import TowerReader, mean_weights
from tests.conftest import QUESTION, Family
from tests.test_adapters import SHAPES, encoding_of, image_inputs


class Curious(SaliencyReducer):
    """Notes what it is given and keeps every second token."""

    name: ClassVar[str] = "curious"
    needs: ClassVar[frozenset[str]] = frozenset({"saliency", "hidden", "keys", "frame_features", "question"})

    seen: ClassVar[list[VideoFeatures]] = []

    def reduce(self, video: VideoFeatures) -> ReducedTokens:
        self.seen.append(video)
        return ReducedTokens.pruned(video, torch.arange(0, video.num_tokens, 2))

    def saliency_layers(self, depth: int) -> tuple[int, ...]:
        return (0, depth - 1)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS["tokens"].items(), "curious", Curious)


def curious(**fields: Any) -> PatchConfig:
    Curious.seen.clear()
    return PatchConfig(tokens=Curious(**fields), images=True)


@contextmanager
def recorded_weights(family: Family, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """``[views, heads, n, n]`` weights of every call of the tower's eager attention."""
    adapter, core = find_adapter(family.model), family.model.model
    module = sys.modules[type(adapter.tower_attention(adapter.tower_layers(core)[0])).__module__]
    original, weights = module.eager_attention_forward, []

    def recording(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        weights.append(output[1])
        return output

    tower = core.visual if hasattr(core, "visual") else core.vision_tower
    monkeypatch.setattr(module, "eager_attention_forward", recording)
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        yield weights
    finally:
        tower.set_attn_implementation(before)
        monkeypatch.undo()


def test_saliency_equals_eager_attention(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = family.inputs([("video", "pancake", 4), QUESTION])
    patch_model(family.model, curious(attention="received"))
    with recorded_weights(family, monkeypatch) as weights:
        family.logits(inputs)
    (video,) = Curious.seen
    assert video.saliency is not None and video.saliency.dtype == torch.float32
    adapter, core = find_adapter(family.model), family.model.model
    encoding = encoding_of(family, "video", inputs)
    per_layer = len(weights) // (2 if family.name == "llava_next_video" else 3) if family.stacks_videos else None
    for row, layer in zip(video.saliency, (0, len(adapter.tower_layers(core)) - 1), strict=True):
        if per_layer:
            calls = weights[layer * per_layer : (layer + 1) * per_layer] if per_layer > 1 else [weights[layer]]
        else:
            calls = _calls_of_block(core, encoding, weights, layer)
        received = torch.cat([call.float().mean(dim=(1, 2)).flatten() for call in calls])
        if adapter.has_cls(core):
            received = received.unflatten(0, (-1, calls[0].shape[-1]))[:, 1:].flatten()
        (expected,) = adapter.arrange(core, "video", encoding, received[:, None])
        torch.testing.assert_close(row, expected[:, 0], atol=1e-6, rtol=1e-4)


def _calls_of_block(core: Any, encoding: dict[str, Any], weights: list[Tensor], layer: int) -> list[Tensor]:
    """A Qwen tower calls attention once for each chunk of each block; chunks fill all patches once a block."""
    patches = len(encoding["pixel_values_videos"])
    blocks: list[list[Tensor]] = [[]]
    for call in weights:
        if sum(each.shape[-1] for each in blocks[-1]) == patches:
            blocks.append([])
        blocks[-1].append(call)
    return blocks[layer]


def test_cls_attention(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    if not find_adapter(family.model).has_cls(family.model.model):
        with pytest.raises(ValueError, match="tokens.attention: .* has no 'cls'; supported: auto"):
            patch_model(family.model, curious(attention="cls"))
        return
    inputs = family.inputs([("video", "pancake", 4), QUESTION])
    patch_model(family.model, curious())
    with recorded_weights(family, monkeypatch) as weights:
        family.logits(inputs)
    core, encoding = family.model.model, encoding_of(family, "video", inputs)
    expected = weights[1][:, :, 0, 1:].mean(dim=1).flatten()  # hidden state -2 is what layer 1 of 3 makes
    (expected,) = find_adapter(family.model).arrange(core, "video", encoding, expected[:, None])
    assert Curious.seen[0].saliency is not None
    torch.testing.assert_close(Curious.seen[0].saliency[1], expected[:, 0], atol=1e-6, rtol=1e-4)


def test_pooling_head_attention(families: dict[str, Family]) -> None:
    family = families["llava_onevision"].fresh()
    core = family.model.model
    inputs = family.inputs([("video", "pancake", 4), QUESTION])
    caught = []
    handle = core.vision_tower.head.attention.register_forward_pre_hook(lambda module, args: caught.append(args))
    patch_model(family.model, curious(attention="head"))
    family.logits(inputs)
    handle.remove()
    attention, (probe, keys, values) = core.vision_tower.head.attention, caught[0]
    with torch.no_grad():
        pooled, expected = attention(probe, keys, values, need_weights=True)
    (arranged,) = find_adapter(family.model).arrange(
        core, "video", encoding_of(family, "video", inputs), expected.flatten()[:, None]
    )
    video = Curious.seen[0]
    assert video.saliency is not None and video.frame_features is not None
    torch.testing.assert_close(video.saliency[0], arranged[:, 0], atol=1e-6, rtol=1e-4)
    assert video.frame_features.shape == (4, pooled.shape[-1])


@pytest.mark.parametrize("kind", ["video", "image"])
def test_hidden_features_stand_where_the_tokens_do(family: Family, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a projector that only pools, the features that the model makes are the hidden ones."""
    family = family.fresh()
    core, adapter = family.model.model, find_adapter(family.model)
    if kind == "video":
        inputs = family.inputs([("video", "pancake", 4), ("video", "nasa", 4), QUESTION])
    else:
        inputs = image_inputs(family, SHAPES[2:3])
    encoding = {name: x for name, x in encoding_of(family, kind, inputs).items() if name != "batch_num_images"}
    stages = FeatureStages(adapter, core, curious())
    assert stages.reader is not None
    if family.stacks_videos:
        core.multi_modal_projector.forward = lambda states: states
        core.image_newline = torch.nn.Parameter(torch.zeros(32))
    else:
        size = core.visual.spatial_merge_size**2
        core.visual.merger.forward = lambda states: states.view(-1, size, states.shape[-1]).mean(1)
    with stages.reader.reading() as seen, torch.no_grad():
        output = getattr(core, f"get_{kind}_features")(*encoding.values(), return_dict=True)
    extras = stages.reader.extras(kind, encoding, seen)
    items = adapter.items(core, kind, encoding)
    rows = torch.cat([item.reshape(-1, item.shape[-1]) for item in output.pooler_output])
    start, trailing = 0, (len(rows) - sum(item.size for item in items)) // len(items)
    for item, extra in zip(items, extras, strict=True):
        assert extra.hidden is not None and extra.saliency is not None and extra.keys is not None
        torch.testing.assert_close(rows[start : start + item.size], extra.hidden, atol=1e-5, rtol=1e-4)
        assert extra.saliency.shape == (2, item.size) and extra.keys.shape[0] == item.size
        assert extra.frame_features is not None and extra.frame_features.shape[0] == item.segments[0].grid[0]
        start += item.size + trailing


def test_question_is_the_text_after_the_pictures(family: Family) -> None:
    """Of each sample its own, the same in `generate` (which may encode ahead) and forward, padded or not."""
    samples = [[("video", "pancake", 4), "Why?"], ["Look.", ("video", "nasa", 4), ("video", "pancake", 4), QUESTION]]
    embed = family.model.get_input_embeddings()
    found = {}
    for side in ("left", "right"):
        inputs = family.inputs(*samples, padding_side=side)
        for run in ("forward", "generate"):
            with patched(family.model, curious()):
                family.logits(inputs) if run == "forward" else family.generate(inputs, new=2)
                found[side, run] = [video.question for video in Curious.seen]
    words = family.processor.tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    for questions in found.values():
        assert len(questions) == 3 and torch.equal(questions[1], questions[2])
        assert len(questions[0]) < len(questions[1])
        ids = [int((embed.weight == row).all(1).nonzero()[0, 0]) for row in questions[1]]
        assert any(ids[at : at + len(words)] == words for at in range(len(ids)))
        assert all(torch.equal(a, b) for a, b in zip(questions, found["left", "forward"], strict=True))


def test_without_text_the_question_is_missed(family: Family) -> None:
    inputs = family.inputs([("video", "pancake", 4), QUESTION])
    patch_model(family.model, curious())
    with pytest.raises(ValueError, match="'curious' needs the question"):
        family.model.model.get_video_features(*encoding_of(family, "video", inputs).values())


def test_no_hook_stays(family: Family) -> None:
    inputs = family.inputs([("video", "pancake", 4), QUESTION])
    family.logits(inputs)  # transformers may have hooks of its own, set on first use

    def hooks() -> list[int]:
        return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in family.model.modules()]

    before = hooks()
    patch_model(family.model, curious())
    family.logits(inputs)
    assert hooks() == before


def test_mean_weights_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(5, 3, 7, 4), torch.randn(5, 3, 7, 4)
    expected = (query @ key.transpose(-1, -2) * 0.5).softmax(-1).mean(dim=(1, 2))
    torch.testing.assert_close(mean_weights(query, key, 0.5), expected)
    monkeypatch.setattr("spatiotoken.tower._WEIGHTS_ON_CPU", 40)
    torch.testing.assert_close(mean_weights(query, key, 0.5), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("module", [modeling_qwen2_vl, modeling_qwen2_5_vl, modeling_qwen3_vl])
def test_rotated_as_the_tower_rotates(module: ModuleType, dtype: torch.dtype) -> None:
    pair, angles = torch.randn(9, 2, 3, 8).to(dtype), torch.randn(9, 4).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    expected = module.apply_rotary_pos_emb_vision(*pair.unbind(dim=1), cos, sin)
    # One rounding of the sum apart, which in half precision may show in the last digit.
    torch.testing.assert_close(rotated(pair, cos, sin), torch.stack(expected, dim=1))


def test_layers_that_the_tower_lacks(family: Family) -> None:
    class Deep(Curious):
        def saliency_layers(self, depth: int) -> tuple[int, ...]:
            return (depth,)

    with pytest.raises(ValueError, match="the tower has no layers"):
        TowerReader(find_adapter(family.model), family.model.model, Deep())
