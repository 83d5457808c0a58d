"""Frames chosen inside a model: which pixels the tower gets, and where what it makes of them stands."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from spatiotoken import last_report, patch_model, patched
from spatiotoken.config import PatchConfig
from spatiotoken.frames import FrameSelector, ScoredSelector, Scorer
from spatiotoken.frames.relevance import question_similarity
from spatiotoken.patches.adapter import Item, ModelAdapter, Part, find_adapter
from spatiotoken.placement import parts_of, placement
from spatiotoken.structures import FrameChoice, Frames
from tests.conftest import QUESTION, Family
from tests.test_oracle import entry_of, grid_of, run_rows

VIDEO = ("video", "pancake", 8)


class Fixed(FrameSelector):
    """Chooses what the test says."""

    name: ClassVar[str] = "fixed"
    choice: Any = None

    def select(self, frames: Frames) -> FrameChoice:
        return self.choice


def fixed(choice: FrameChoice, **more: Any) -> PatchConfig:
    return PatchConfig(frames=Fixed(choice=choice, **more))


def video_encoding(family: Family, inputs: dict[str, Tensor]) -> dict[str, Any]:
    names = ("pixel_values_videos", "video_grid_thw")
    return {name: inputs[name] for name in names if name in inputs}


def adapter_of(family: Family) -> ModelAdapter:
    """With the normalisation of the family's own processor."""
    adapter, processor = find_adapter(family.model), family.processor.video_processor
    adapter.pixel_mean, adapter.pixel_std = tuple(processor.image_mean), tuple(processor.image_std)
    return adapter


def own_rows(family: Family, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``[T, H, W]`` places of the video's tokens in the prompt, and all places that are none of these."""
    grid = grid_of(family, inputs)
    places = (inputs["input_ids"][0] == family.model.config.video_token_id).nonzero()[:, 0]
    places = places[: grid[0] * grid[1] * grid[2]].view(grid)
    others = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    others[places.flatten()] = False
    return places, others.nonzero()[:, 0]


def test_positions_are_kept(family: Family) -> None:
    """The unpatched language model, fed the rows of the chosen frames at the positions they have among all."""
    inputs = family.inputs(["Look:", VIDEO, QUESTION])
    places, others = own_rows(family, inputs)
    rows = torch.cat([places[[0, 2]].flatten(), others]).sort().values
    entry = entry_of(family, inputs)
    expected = run_rows(family, entry, rows, entry["inputs_embeds"])
    with patched(family.model, fixed(FrameChoice((0, 2)))):
        actual = family.logits(inputs)
        assert last_report(family.model).frames == ((0, 2),)
    torch.testing.assert_close(actual[:, rows], expected, atol=2e-4, rtol=1e-4)


def test_compact_positions_equal_just_those_frames(llava: Family) -> None:
    """Where positions are relative to the frames shown, dropping frames is the same as never having had them."""
    inputs = llava.inputs(["Look:", VIDEO, QUESTION])
    chosen = (1, 2, 5, 6)
    fewer = llava.inputs(["Look:", ("video", "pancake", 4), QUESTION])
    fewer["pixel_values_videos"] = inputs["pixel_values_videos"][:, list(chosen)]
    expected = llava.generate(fewer)
    places, others = own_rows(llava, inputs)
    rows = torch.cat([places[list(chosen)].flatten(), others]).sort().values
    with patched(llava.model, fixed(FrameChoice(chosen), positions="compact")):
        actual = llava.generate(inputs)
        logits = llava.logits(inputs)[:, rows]
    torch.testing.assert_close(logits, llava.logits(fewer), atol=2e-4, rtol=1e-4)
    new = actual.sequences[0, inputs["input_ids"].shape[1] :]
    assert new.tolist() == expected.sequences[0, fewer["input_ids"].shape[1] :].tolist()


def test_compact_needs_positions_of_one_dimension(qwen: Family) -> None:
    with pytest.raises(ValueError, match="frames.positions: 'compact' does not work with this model's M-RoPE"):
        patch_model(qwen.model, "uniform", **{"frames.positions": "compact"})


def test_pictures(family: Family) -> None:
    """What an encoder is shown is what the processor was given, up to its resizing."""
    inputs = family.inputs([VIDEO, QUESTION])
    adapter, core = adapter_of(family), family.model.model
    (pictures,) = adapter.pictures(core, video_encoding(family, inputs))
    frames = family.video("pancake", 8)[0][:: adapter.frames_per_unit(core)]
    if family.processor.video_processor.do_center_crop:
        beside = (frames.shape[3] - frames.shape[2]) // 2
        frames = frames[..., beside : frames.shape[3] - beside]
    assert pictures.dtype == torch.uint8 and len(pictures) == len(frames)
    given = interpolate(frames.float(), pictures.shape[2:], mode="bicubic", antialias=True).clamp(0, 255)
    assert (given - pictures).abs().mean() < 5, "others differ by 40"


def test_smaller_frames_are_the_pictures_made_small(qwen: Family) -> None:
    inputs = qwen.inputs([VIDEO, QUESTION])
    adapter, core = adapter_of(qwen), qwen.model.model
    encoding = video_encoding(qwen, inputs)
    ((taken, _),) = adapter.take_frames(core, encoding, [[Part((0, 3)), Part((1, 2), 0.5)]])
    whole, small = adapter.items(core, "video", taken)
    _, height, width = adapter.items(core, "video", encoding)[0].segments[0].grid
    assert whole.segments[0].grid == (2, height, width) and small.segments[0].grid == (2, height // 2, width // 2)
    (full,), (first, second) = adapter.pictures(core, encoding), adapter.pictures(core, taken)
    assert torch.equal(first, full[[0, 3]])
    expected = interpolate(full[[1, 2]].float(), second.shape[2:], mode="bicubic", antialias=True)
    assert (expected - second).abs().mean() < 1


def test_smaller_frames_enter_the_model(family: Family) -> None:
    """Slow frames are as they were; fast ones are fewer tokens, at places of their own frame."""
    inputs = family.inputs([VIDEO, QUESTION])
    places, others = own_rows(family, inputs)
    units, height, width = places.shape
    fast = range(1, units, 2)
    scales = tuple(0.5 if unit in fast else 1.0 for unit in range(units))
    with patched(family.model, fixed(FrameChoice(tuple(range(units)), scales=scales))):
        logits = family.logits(inputs)
        report = last_report(family.model)
    seen = logits[0].any(dim=-1)
    assert seen[others].all() and seen[places[0::2].flatten()].all()
    tokens = max(1, height // 2) * max(1, width // 2)
    assert all(int(seen[places[unit].flatten()].sum()) == tokens for unit in fast)
    assert report.stages["frames"].tokens_out == len(fast) * tokens + (units - len(fast)) * height * width
    torch.testing.assert_close(
        logits[:, places[0].flatten()], family.logits(inputs)[:, places[0].flatten()], atol=2e-4, rtol=1e-4
    )


def test_smaller_frames_of_llava_are_pooled_features(llava: Family) -> None:
    inputs = llava.inputs([VIDEO, QUESTION])
    entry = entry_of(llava, inputs)
    places, others = own_rows(llava, inputs)
    units = places.shape[0]
    embeds = entry["inputs_embeds"].clone()
    pooled = embeds[0, places[1]].mean(dim=(0, 1))  # of 3 x 3 to 1 x 1
    embeds[0, places[1, 1, 1]] = pooled
    rows = torch.cat([places[[unit for unit in range(units) if unit != 1]].flatten(), places[1, 1, 1][None], others])
    rows = rows.sort().values
    scales = tuple(0.5 if unit == 1 else 1.0 for unit in range(units))
    with patched(llava.model, fixed(FrameChoice(tuple(range(units)), scales=scales))):
        actual = llava.logits(inputs)[:, rows]
    torch.testing.assert_close(actual, run_rows(llava, entry, rows, embeds), atol=2e-4, rtol=1e-4)


def test_mixed_frames(family: Family) -> None:
    """A frame that stands for several is their weighted mean, pixel by pixel."""
    inputs = family.inputs([VIDEO, QUESTION])
    units = grid_of(family, inputs)[0]
    mixing = torch.zeros(2, units)
    mixing[0, :2], mixing[1, 2:4] = torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5])
    adapter, core = adapter_of(family), family.model.model
    encoding = video_encoding(family, inputs)
    ((taken, _),) = adapter.take_frames(core, encoding, [parts_of(FrameChoice((0, 3), mixing=mixing))])
    (full,), (mixed,) = adapter.pictures(core, encoding), adapter.pictures(core, taken)
    assert (mixed[0].float() - (0.75 * full[0] + 0.25 * full[1])).abs().max() <= 1
    assert (mixed[1].float() - (0.5 * full[2] + 0.5 * full[3])).abs().max() <= 1
    with patched(family.model, fixed(FrameChoice((0, 3), mixing=mixing))):
        family.logits(inputs)
        seen = last_report(family.model).seen
    assert seen is not None
    per_unit = torch.tensor(seen[0][: torch.tensor(grid_of(family, inputs)).prod()]).view(units, -1).all(dim=1)
    assert per_unit.tolist() == [unit < 4 for unit in range(units)], "absorbed frames count as seen"


def test_videos_of_different_lengths(family: Family) -> None:
    """Also where videos are stacked, each may keep as many frames as its content asks for."""

    class Alternating(FrameSelector):
        name: ClassVar[str] = "alternating"
        first: Any = None

        def select(self, frames: Frames) -> FrameChoice:
            self.first.append(len(self.first))
            return FrameChoice((0, 2) if len(self.first) % 2 else (0, 1, 3))

    inputs = family.inputs([VIDEO, QUESTION], [("video", "nasa", 8), QUESTION])
    singles = [family.inputs([VIDEO, QUESTION]), family.inputs([("video", "nasa", 8), QUESTION])]
    with patched(family.model, PatchConfig(frames=Alternating(first=[]))):
        batch = family.logits(inputs)[:, -1]
        assert last_report(family.model).frames == ((0, 2), (0, 1, 3))
    for row, (single, choice) in enumerate(zip(singles, ((0, 2), (0, 1, 3)), strict=True)):
        with patched(family.model, fixed(FrameChoice(choice))):
            torch.testing.assert_close(batch[row], family.logits(single)[0, -1], atol=2e-4, rtol=1e-4)


class Asking(ScoredSelector):
    """Keeps what it was told."""

    name: ClassVar[str] = "asking"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "patches", "relevance"})
    told: Any = None

    def select(self, frames: Frames) -> FrameChoice:
        self.told.append(frames)
        return FrameChoice.everything(frames)


def test_the_tower_describes_frames(family: Family) -> None:
    inputs = family.inputs([VIDEO, QUESTION])
    entry, (places, _) = entry_of(family, inputs), own_rows(family, inputs)
    tokens = entry["inputs_embeds"][0, places.flatten(1)]
    told: list[Frames] = []
    with patched(family.model, PatchConfig(frames=Asking(scorer=Scorer(kind="tower"), told=told))):
        family.logits(inputs)
    (frames,) = told
    torch.testing.assert_close(frames.patches, tokens, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(frames.features, tokens.mean(dim=1), atol=1e-5, rtol=1e-4)
    # What follows the video, without special tokens, which for a tiny tokenizer are known by their ids.
    assert frames.relevance is not None and frames.relevance.shape == (places.shape[0],)
    assert frames.relevance.abs().max() <= 1


def test_relevance_is_that_of_the_question_alone(family: Family) -> None:
    """Text before the video does not count, and each sample of a batch has its own question."""
    told: list[Frames] = []
    with patched(family.model, PatchConfig(frames=Asking(scorer=Scorer(kind="tower"), told=told))):
        family.logits(family.inputs(["Look:", VIDEO, QUESTION]))
        family.logits(family.inputs(["Listen:", VIDEO, QUESTION], [VIDEO, "Why?"]))
    one, same, other = (frames.relevance for frames in told)
    assert one is not None and same is not None and other is not None
    torch.testing.assert_close(one, same, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(same, other, atol=1e-4)
    assert torch.equal(question_similarity(torch.ones(3, 2), torch.ones(1, 2)), torch.zeros(3))


def test_question_needs_a_processor_beside_clip(family: Family) -> None:
    config = PatchConfig(frames=Asking(scorer=Scorer(kind="clip"), told=[]))
    with pytest.raises(ValueError, match="'asking' with the scorer 'clip' reads the question: pass .*processor="):
        patch_model(family.model, config)
    assert "_spatiotoken" not in family.model.__dict__


def test_times_are_seconds_where_the_model_is_told(family: Family) -> None:
    inputs = family.inputs([VIDEO, QUESTION])
    told: list[Frames] = []
    with patched(family.model, PatchConfig(frames=Asking(scorer=Scorer(kind="tower"), told=told))):
        family.logits(inputs)
        family.generate(inputs, new=1)
    given = inputs.get("second_per_grid_ts")
    step = 1.0 if given is None else float(given[0])
    for frames in told:
        assert frames.timestamps.tolist() == pytest.approx([step * unit for unit in range(frames.num_frames)])


def test_placement_of_parts() -> None:
    """A 1 x 5 grid of three frames and a newline: the second at three fifths, the last a share of the first."""
    item = Item.of_grid((3, 1, 5))
    mixing = torch.tensor([[0.6, 0.0, 0.4], [0.0, 1.0, 0.0]])
    parts = parts_of(FrameChoice((0, 1), scales=(1.0, 0.6), mixing=mixing))
    found = placement([item], [parts], 1, torch.device("cpu"))
    assert found.place.tolist() == [0, 1, 2, 3, 4, 5, 7, 9, 15]
    assert found.bearers.tolist() == [0, 1, 2, 3, 4, 5, 5, 6, 6, 7, 0, 1, 2, 3, 4, 8]
