"""The `vision` stage against towers that compute every patch, each overwritten by what stands for it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from pydantic import Field
from torch import Tensor

from spatiotoken import last_report, patched
from spatiotoken.config import PatchConfig, load_config
from spatiotoken.patches.adapter import find_adapter
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens import SaliencyReducer
from spatiotoken.vision.base import TowerMerge, TowerReducer, TowerShape, TowerTokens
from tests.conftest import QUESTION, Family


class Pairs(TowerReducer):
    """Merges columns in pairs at the first of its layers, rows in pairs at the second: 2 x 2 blocks then."""

    name = "pairs"
    proportional = True

    at: tuple[int, ...] = (0, 1)
    mean: bool = True

    def layers(self, tower: TowerShape) -> tuple[int, ...]:
        return self.at

    def reduce(self, tokens: TowerTokens) -> TowerMerge | None:
        _, height, width = tokens.grid
        first = tokens.places
        if tokens.layer == self.at[0]:
            target = torch.where(first % width % 2 == 1, first - 1, first)
        else:
            target = torch.where(first // width % height % 2 == 1, first - width, first)
        return merged(first, target, tokens.sizes if self.mean else None)


class PairsBefore(Pairs):
    """The same before a layer."""

    name = "pairs_before"
    before_layer = True


class FramePairs(TowerReducer):
    """Merges each second frame into the one before."""

    name = "frame_pairs"

    def layers(self, tower: TowerShape) -> tuple[int, ...]:
        return (1,)

    def reduce(self, tokens: TowerTokens) -> TowerMerge | None:
        _, height, width = tokens.grid
        frames = tokens.places // (height * width)
        merge = merged(tokens.places, tokens.places - frames % 2 * height * width, tokens.sizes)
        return TowerMerge(merge.survivors, merge.assignment, merge.weights, counts=tokens.counts[::2])


class Nothing(Pairs):
    """Is asked, and leaves everything."""

    name = "nothing"

    def reduce(self, tokens: TowerTokens) -> TowerMerge | None:
        return None


class Repeated(TowerReducer):
    """Every second patch of later frames repeats that of the first frame."""

    name = "repeated"
    before_layer = True

    frame: bool = Field(True)

    @property
    def whole_context(self) -> bool:
        return self.frame

    def layers(self, tower: TowerShape) -> tuple[int, ...]:
        return (0,)

    def reduce(self, tokens: TowerTokens) -> TowerMerge | None:
        _, height, width = tokens.grid
        spot = tokens.places % (height * width)
        return merged(tokens.places, torch.where(spot % 2 == 0, spot, tokens.places), None)


def merged(places: Tensor, target: Tensor, weights: Tensor | None) -> TowerMerge:
    """Patches at ``places`` go to those at ``target``."""
    survivors, assignment = target.unique(return_inverse=True)
    return TowerMerge(torch.searchsorted(places, survivors), assignment, weights)


@contextmanager
def overwritten(family: Family, method: TowerReducer, encoding: dict[str, Tensor]) -> Iterator[None]:
    """The tower computes all patches, and overwrites them with (the mean of) those that the method puts together."""
    adapter = find_adapter(family.model)
    core = adapter.core(family.model)
    kind = "video" if "pixel_values_videos" in encoding else "image"
    rows, extra = adapter.tower_rows(core, kind, encoding), int(adapter.has_cls(core))
    total = sum(t * h * w for t, h, w in rows.grids)
    places = torch.arange(total) if rows.places is None else rows.places
    owner = torch.arange(total)  # by place
    layers = adapter.tower_span(core)
    shape = TowerShape(len(layers), tuple(range(len(layers))), bool(extra))
    before = {layer: layer.forward for layer in layers}

    def group(layer: int) -> Tensor:
        """`[patches]` by place, what the method puts together at a layer, on top of what it did before."""
        new, start = owner.clone(), 0
        for grid in rows.grids:
            size = grid[0] * grid[1] * grid[2]
            left = owner[start : start + size].unique() - start
            counts = tuple((left // (grid[1] * grid[2])).bincount().tolist())
            tokens = TowerTokens(torch.zeros(len(left), 1), torch.ones(len(left)), left, counts, grid, layer, shape)
            merge = method.reduce(tokens)
            if merge is not None:
                heirs = torch.arange(total)
                heirs[left + start] = left[merge.survivors][merge.assignment] + start
                new[start : start + size] = heirs[owner[start : start + size]]
            start += size
        return new

    def tower_rows_of(by_place: Tensor) -> Tensor:
        """An owner by place, as rows of the tower, CLS tokens included."""
        row_of = torch.empty_like(places).index_copy_(0, places, torch.arange(total))
        own = row_of[by_place[places]]
        if not extra:
            return own
        side = rows.grids[0][1] * rows.grids[0][2]
        frames = own.view(-1, side)
        index = torch.arange(len(frames))[:, None]
        # A frame that is gone altogether has the CLS token of the one that its first patch went to.
        heir = torch.where((frames // side == index).any(1, keepdim=True), index, frames[:, :1] // side)
        return torch.cat([heir * (side + 1), frames + frames // side + 1], dim=1).flatten()

    def joined(hidden: Tensor, index: int) -> Tensor:
        nonlocal owner
        owner = group(index)
        flat, to = hidden.flatten(0, -2), tower_rows_of(owner)
        out = flat[to]
        if (weights := getattr(method, "mean", isinstance(method, FramePairs))) is not False:
            assert weights
            patches = torch.ones(len(flat), dtype=torch.bool)
            if extra:
                patches[:: rows.grids[0][1] * rows.grids[0][2] + 1] = False
            total_of = torch.zeros_like(flat).index_add_(0, to[patches], flat[patches])
            size = torch.zeros(len(flat)).index_add_(0, to[patches], torch.ones(int(patches.sum())))
            mean = total_of / size.clamp(min=1)[:, None]
            out[patches] = mean[to[patches]]
        return out.view(hidden.shape)

    def run(index: int) -> Any:
        norm, attention, second, mlp = adapter.tower_block(layers[index])
        acts = index in method.layers(shape)

        def forward(hidden: Tensor, *args: Any, **arguments: Any) -> Tensor:
            if acts and method.before_layer:
                hidden = joined(hidden, index)
            to = tower_rows_of(owner)
            if "position_embeddings" in arguments:
                positions = tuple(values[to] for values in arguments["position_embeddings"])
                arguments["position_embeddings"] = positions
            if args:
                arguments["attention_mask"] = args[0]
            mixed = attention(norm(hidden), **arguments)
            hidden = hidden + (mixed[0] if isinstance(mixed, tuple) else mixed)
            if acts and not method.before_layer:
                hidden = joined(hidden, index)
                to = tower_rows_of(owner)
            hidden = hidden + mlp(second(hidden))
            return hidden.flatten(0, -2)[to].view(hidden.shape)

        return forward

    for index, layer in enumerate(layers):
        layer.forward = run(index)
    try:
        yield
    finally:
        for layer in before:
            del layer.__dict__["forward"]


def features(family: Family, encoding: dict[str, Tensor]) -> Tensor:
    kind = "video" if "pixel_values_videos" in encoding else "image"
    extract = getattr(family.model.model, f"get_{kind}_features")
    # The name of the first argument differs between versions of transformers.
    pixels, *rest = encoding
    with torch.inference_mode():
        output = extract(encoding[pixels], **{name: encoding[name] for name in rest}, return_dict=True)
    adapter = find_adapter(family.model)
    return torch.cat(adapter.read(output), dim=-1)


def encoding_of(family: Family, *samples: Any) -> dict[str, Tensor]:
    """Arguments of the feature extractor, the pixels first."""
    names = ("pixel_values_videos", "pixel_values", "video_grid_thw", "image_grid_thw", "image_sizes")
    inputs = family.inputs(*samples)
    return {name: inputs[name] for name in names if name in inputs}


def config_of(method: TowerReducer, **more: Any) -> PatchConfig:
    return PatchConfig(vision=method, **more)


METHODS = [Pairs(), Pairs(mean=False), PairsBefore(), FramePairs(), Repeated()]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.model_dump()}")
def test_tower_equals_one_that_computes_every_patch(family: Family, method: TowerReducer) -> None:
    videos = [("video", "pancake", 4)], [("video", "nasa", 4)]
    encoding = encoding_of(family, *([*video, QUESTION] for video in videos))
    plain = features(family, encoding)
    with overwritten(family, method, encoding):
        wanted = features(family, encoding)
    with patched(family.model, config_of(method)):
        got = features(family, encoding)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(features(family, encoding), plain, atol=0, rtol=0)


@pytest.mark.parametrize("method", [Nothing(), Pairs(at=())], ids=["asked", "never asked"])
def test_nothing_left_out(family: Family, method: TowerReducer) -> None:
    encoding = encoding_of(family, [("video", "pancake", 4), QUESTION])
    plain = features(family, encoding)
    with patched(family.model, config_of(method)):
        got = features(family, encoding)
    # Where a method is asked, attention is in our calls, not the model's.
    exact = {"atol": 0, "rtol": 0} if not method.layers(TowerShape(2, (0, 1), False)) else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(got, plain, **exact)


def test_repeated_frames_cost_nothing(family: Family) -> None:
    """Of a still video one frame enters the tower, and all get what they would have."""
    inputs = family.inputs([("video", "pancake", 4), QUESTION])
    encoding = encoding_of(family, [("video", "pancake", 4), QUESTION])
    pixels = encoding["pixel_values_videos"]
    rows = find_adapter(family.model).tower_rows(family.model.model, "video", encoding)
    frames = rows.grids[0][0]
    units = pixels.unflatten(0, (frames, -1)) if pixels.ndim == 2 else pixels[0]
    still = units[:1].expand_as(units).reshape(pixels.shape)
    encoding, inputs = encoding | {"pixel_values_videos": still}, inputs | {"pixel_values_videos": still}
    plain = features(family, encoding)
    for context in ("frame", "kept"):
        with patched(family.model, {"vision": {"method": "static_patches", "threshold": 0, "context": context}}):
            torch.testing.assert_close(features(family, encoding), plain, atol=1e-5, rtol=1e-5)
            family.logits(inputs)
            report = last_report(family.model)
        assert report.stages["vision"].tokens_out == report.stages["vision"].tokens_in // frames
        assert report.tower_rows == (report.stages["vision"].tokens_out,) * len(report.tower_rows)


def test_places_are_those_of_the_positions(qwen: Family) -> None:
    """Rows of a tower with one place in a frame have one rotary position, those of two places two."""
    adapter, core = find_adapter(qwen.model), qwen.model.model
    encoding = encoding_of(qwen, [("video", "pancake", 4), QUESTION])
    rows, caught = adapter.tower_rows(core, "video", encoding), []
    handle = core.visual.blocks[0].register_forward_pre_hook(
        lambda module, args, arguments: caught.append(arguments["position_embeddings"][0]), with_kwargs=True
    )
    features(qwen, encoding)
    handle.remove()
    (_, height, width), places = rows.grids[0], rows.places
    assert places is not None and torch.equal(places.sort().values, torch.arange(len(places)))
    _, distinct = caught[0].unique(dim=0, return_inverse=True)
    pairs = torch.stack([places % (height * width), distinct], dim=1).unique(dim=0)
    assert len(pairs) == height * width == len(distinct.unique())


def test_pixels_are_those_of_the_places(family: Family) -> None:
    adapter, core = find_adapter(family.model), family.model.model
    encoding = encoding_of(family, [("video", "pancake", 4), QUESTION])
    frames, height, width = adapter.tower_rows(core, "video", encoding).grids[0]
    pixels = adapter.tower_pixels(core, "video", encoding)
    patch = core.config.vision_config.patch_size
    pictures = adapter.pictures(core, encoding)[0][..., : height * patch, : width * patch].float() / 255
    wanted = pictures.unflatten(3, (width, patch)).unflatten(2, (height, patch)).permute(0, 2, 4, 1, 3, 5)
    together = pixels.shape[1] // (3 * patch * patch)
    got = pixels.view(frames, height, width, together, patch, patch, 3)[:, :, :, 0].movedim(-1, 3)
    torch.testing.assert_close(got, wanted, atol=0.5 / 255 + 1e-6, rtol=0)


def test_readers_see_every_patch(family: Family) -> None:
    """Saliency, keys and hidden features of the reduced tower are read as of one that computes every patch."""
    seen: list[VideoFeatures] = []

    class Spy(SaliencyReducer):
        name = "spy"
        needs = frozenset({"saliency", "hidden", "keys", "frame_features"})

        def reduce(self, video: VideoFeatures) -> ReducedTokens:
            seen.append(video)
            return ReducedTokens.everything(video)

        def saliency_layers(self, depth: int) -> tuple[int, ...]:
            return (0, depth - 1)

    encoding = encoding_of(family, [("video", "pancake", 4), QUESTION])
    with overwritten(family, FramePairs(), encoding), patched(family.model, PatchConfig(tokens=Spy())):
        features(family, encoding)
    with patched(family.model, PatchConfig(tokens=Spy(), vision=FramePairs())):
        features(family, encoding)
    wanted, got = seen
    for name in Spy.needs:
        torch.testing.assert_close(getattr(got, name), getattr(wanted, name), atol=2e-5, rtol=1e-4, msg=name)


def test_patches_of_one_value_are_projected_once(family: Family) -> None:
    projector = find_adapter(family.model).patch_projector(family.model.model)
    if projector is None:
        assert not family.stacks_videos
        return
    rows: list[int] = []
    for sample in (("image", "pancake"), ("video", "pancake", 4)):
        encoding = encoding_of(family, [sample, QUESTION])
        for config in (load_config("dense"), config_of(Pairs(), images=True)):
            with patched(family.model, config):
                handle = projector.linear_1.register_forward_pre_hook(
                    lambda _, args: rows.append(args[0].shape[:-1].numel())
                )
                features(family, encoding)
                handle.remove()
    image, fewer, video, left = rows
    # LLaVA-NeXT-Video pools videos before the projector.
    assert fewer < image / 3 and (left == video if family.name == "llava_next_video" else left < video / 3)


def test_images_only_when_asked(family: Family) -> None:
    encoding = encoding_of(family, [("image", "pancake"), QUESTION])
    plain = features(family, encoding)
    with patched(family.model, config_of(Pairs())):
        torch.testing.assert_close(features(family, encoding), plain, atol=0, rtol=0)
    with patched(family.model, config_of(Pairs(), images=True)):
        got = features(family, encoding)
    with overwritten(family, Pairs(), encoding):
        wanted = features(family, encoding)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


def test_layers_that_are_not_there(family: Family) -> None:
    with pytest.raises(ValueError, match=r"vision.pairs acts at the layers \[0, 99\]; the tower has"):
        with patched(family.model, config_of(Pairs(at=(0, 99)))):
            pass


def test_a_method_that_contradicts_itself(family: Family) -> None:
    class Wrong(Pairs):
        name = "wrong"

        def reduce(self, tokens: TowerTokens) -> TowerMerge | None:
            found = super().reduce(tokens)
            assert found is not None
            return TowerMerge(found.survivors, found.assignment, counts=(1,))

    encoding = encoding_of(family, [("video", "pancake", 4), QUESTION])
    with patched(family.model, config_of(Wrong())), pytest.raises(RuntimeError, match="'wrong' left"):
        features(family, encoding)


def test_attention_before_it_has_run(family: Family) -> None:
    class Early(PairsBefore):
        name = "early"
        needs = frozenset({"attention"})

    with pytest.raises(ValueError, match="'early' acts before a layer"), patched(family.model, config_of(Early())):
        pass


@pytest.mark.parametrize("method", ["tome", "static_patches"])
def test_training(family: Family, method: str) -> None:
    """Gradients reach the tower; with checkpointing an error says that they cannot."""
    family = family.fresh()
    inputs = family.inputs([("video", "pancake", 4), QUESTION])
    family.model.train()
    weights = find_adapter(family.model).tower_span(family.model.model)[0].parameters()
    with patched(family.model, f"{method}-50"):
        family.model(**inputs).logits[:, -1].logsumexp(-1).sum().backward()
        assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in weights)
        # Renamed after transformers 5.17.
        enable = getattr(family.model, "activation_checkpointing_enable", family.model.gradient_checkpointing_enable)
        enable()
        with pytest.raises(ValueError, match="gradient checkpointing"):
            family.model(**inputs)


def test_offloaded_weights(family: Family) -> None:
    """The tower's weights are on no device until its layers run."""
    inputs = family.inputs([("video", "pancake", 4), QUESTION])
    names, expected = ("tome-50", "static_patches"), {}
    for name in names:
        with patched(family.model, name):
            expected[name] = family.logits(inputs)
    family = family.fresh()
    adapter = find_adapter(family.model)
    for layer in adapter.tower_span(adapter.core(family.model)):
        cpu_offload(layer, execution_device=torch.device("cpu"))
        assert all(weight.is_meta for weight in layer.parameters())
    for name in names:
        with patched(family.model, name):
            torch.testing.assert_close(family.logits(inputs), expected[name], atol=1e-5, rtol=1e-5)


def test_layers_asked_for_at_the_call(llava: Family) -> None:
    inputs = llava.inputs([("video", "pancake", 4), QUESTION])
    with patched(llava.model, "tome-50"):
        with pytest.raises(ValueError, match="vision_feature_layer=-3: set it in the model's configuration"):
            llava.logits(inputs, vision_feature_layer=-3)


def test_colours_are_those_of_the_processor(family: Family) -> None:
    """Which patches stand still does not depend on how the processor normalises."""
    processor = copy.deepcopy(family.processor)
    inputs, rows = {}, {}
    for mean, std in (([0.5] * 3, [0.5] * 3), ([0.0] * 3, [1 / 255] * 3)):
        processor.video_processor.image_mean, processor.video_processor.image_std = mean, std
        own = replace(family, processor=processor, prepared={})
        inputs = own.inputs([("video", "pancake", 8), QUESTION])
        with patched(family.model, "static_patches", processor=processor):
            family.logits(inputs)
            rows[std[0]] = last_report(family.model).tower_rows
    assert rows[0.5] == rows[1 / 255] and rows[0.5][0] < rows_of_the_whole_tower(family, inputs)


def rows_of_the_whole_tower(family: Family, inputs: dict[str, Tensor]) -> int:
    """Rows of the whole tower."""
    with patched(family.model, config_of(Nothing())):
        family.logits(inputs)
        return last_report(family.model).tower_rows[0]
