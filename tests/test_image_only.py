"""Families that take images only: images reduced one by one, or those of a prompt as the frames of one video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from spatiotoken import last_report, load_config, patch_model, patched, unpatch_model
from spatiotoken.answer import answer_video, load_model
from spatiotoken.config import PatchConfig
from spatiotoken.prompts import inject_timestamps, thumbnail_inputs
from spatiotoken.tokens.ts_llava_tokens import ts_llava_tokens_count
from spatiotoken.video import load_video
from tests.cases import KEEP_ALL, REDUCED, REPRESENTATIVE, replayed
from tests.conftest import DATA, QUESTION, Family

PROMPT = [("video", "pancake", 6), QUESTION]
OTHER = [("image", "nasa"), ("video", "vp9", 4), "Which object is on the table?"]


def methods(table: dict[tuple[str, str], dict[str, Any]]) -> list[Any]:
    """The rows of what works inside such a family; by default those that also stand for the others elsewhere."""
    few = (*REPRESENTATIVE, "holitom", "ts_llava_tokens")
    return [
        pytest.param(
            load_config({"images": "frames", stage: {"method": method, **settings}}),
            id=f"{stage}-{method}",
            marks=[pytest.mark.slow] if method not in few else [],
        )
        for (stage, method), settings in table.items()
        if stage != "frames"
    ]


@pytest.mark.parametrize("config", methods(KEEP_ALL))
def test_keep_all_is_identical(image_family: Family, config: PatchConfig) -> None:
    inputs = image_family.inputs(PROMPT, OTHER)
    expected = image_family.generate(inputs)
    with patched(image_family.model, config):
        actual = image_family.generate(inputs)
        report = last_report(image_family.model)
    assert torch.equal(torch.stack(actual.scores), torch.stack(expected.scores))
    assert report.visual_kept == report.visual_tokens > 0


@pytest.mark.parametrize("config", methods(REDUCED))
def test_reduced(image_family: Family, config: PatchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` with a cache equals recomputation, a batch equals its samples, and nothing stays behind."""
    single = image_family.inputs(PROMPT)
    before = image_family.logits(single)
    patch_model(image_family.model, config)
    with replayed(monkeypatch):
        cached = image_family.generate(single)
        fed = {**single, "input_ids": cached.sequences, "attention_mask": torch.ones_like(cached.sequences)}
        again = image_family.logits(fed, use_cache=False)[:, -len(cached.scores) - 1 : -1]
    torch.testing.assert_close(torch.stack(cached.scores, dim=1), again, atol=2e-4, rtol=1e-4)
    report = last_report(image_family.model)
    if config.vision is not None:
        assert min(report.tower_rows) < report.stages["vision"].tokens_in
    elif config.attention is None:
        assert min(report.layer_tokens) < report.prompt_tokens
    else:
        assert all(entry.density < 1 for entry in report.attention)

    for side in ("left", "right"):
        batch = image_family.inputs(PROMPT, OTHER, padding_side=side)
        together = image_family.logits(batch)
        for row, prompt in enumerate((PROMPT, OTHER)):
            alone = image_family.logits(image_family.inputs(prompt))[0]
            torch.testing.assert_close(
                together[row][batch["attention_mask"][row].bool()][-1], alone[-1], atol=2e-4, rtol=1e-4
            )
    unpatch_model(image_family.model)
    assert torch.equal(image_family.logits(single), before)


def test_images_of_a_prompt_are_one_video_or_each_by_itself(image_family: Family) -> None:
    inputs = image_family.inputs(PROMPT, OTHER)
    grids: dict[Any, list[tuple[int, int, int]]] = {}
    method = type(load_config("divprune").tokens)
    for images in (True, "frames"):
        seen = grids.setdefault(images, [])

        class Spy(method):  # type: ignore[misc, valid-type]
            def reduce(self, video: Any) -> Any:
                seen.append(video.grid)  # noqa: B023
                return super().reduce(video)

        with patched(image_family.model, PatchConfig(images=images, tokens=Spy(retention=0.5))):
            image_family.logits(inputs)
    assert grids == {True: [(1, 6, 6)] * 11, "frames": [(6, 6, 6), (5, 6, 6)]}


def test_embeddings_in_place_of_ids(image_family: Family) -> None:
    inputs = image_family.inputs(PROMPT)
    embeds = image_family.model.get_input_embeddings()(inputs["input_ids"]).detach()
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    with patched(image_family.model, "divprune", images=True):
        expected = image_family.logits(inputs)
        visual = last_report(image_family.model).visual_kept
        actual = image_family.logits({**rest, "inputs_embeds": embeds})
        assert last_report(image_family.model).visual_kept == visual
    assert torch.equal(actual, expected)


def test_what_cannot_be_is_refused(image_family: Family) -> None:
    model = image_family.model
    with pytest.raises(ValueError, match=r"llava takes images only, .*load_video\(path, selector="):
        patch_model(model, "kmeans")
    for preset in ("holitom", "fastv"):
        with pytest.raises(ValueError, match="set `images: true`.*or `images: frames`"):
            patch_model(model, preset)
    with pytest.raises(ValueError, match="images"):
        patch_model(model, "divprune", images="video")
    with pytest.raises(ValueError, match="llava takes images only: put text between them"):
        inject_timestamps(image_family.inputs(PROMPT), image_family.processor, model.config, [[0.0]])
    with (
        patched(model, "divprune", images="frames"),
        pytest.raises(ValueError, match="which images are in one prompt: call"),
    ):
        model.get_image_features(image_family.inputs(PROMPT)["pixel_values"])
    fresh = image_family.fresh().model
    fresh.config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="'full' is not supported; supported: CLIP"):
        patch_model(fresh, "dense")


def test_images_of_several_sizes_are_no_video(families: dict[str, Family]) -> None:
    qwen, onevision = families["qwen2_5_vl"], families["llava_onevision"]
    with patched(qwen.model, "divprune", images="frames"), pytest.raises(ValueError, match="in one size"):
        qwen.logits(qwen.inputs([("image", "pancake"), ("image", "nasa"), QUESTION]))
    with patched(onevision.model, "divprune", images="frames"), pytest.raises(ValueError, match="without tiles"):
        onevision.logits(onevision.inputs([("image", "pancake"), QUESTION]))
    with patched(qwen.model, "divprune", images="frames"):
        qwen.logits(qwen.inputs([("image", "pancake"), ("image", "pancake"), QUESTION]))
        assert last_report(qwen.model).stages["tokens"].tokens_out > 0


@pytest.mark.parametrize("first", [True, False])
def test_ts_llava_as_the_authors_have_it(image_family: Family, first: bool) -> None:
    """A thumbnail left whole, and tokens sampled over all frames."""
    frames, metadata = image_family.video("nasa", 8)
    inputs = thumbnail_inputs(image_family.processor, frames, QUESTION, metadata, thumbnail_first=first)
    assert len(inputs["pixel_values"]) == 9
    model = image_family.model
    patch_model(model, "ts_llava_tokens", images="frames", **{"tokens.thumbnail": "first" if first else "last"})
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    report = last_report(model)
    kept = ts_llava_tokens_count(8 * 36, 0.1)
    assert (report.visual_tokens, report.visual_kept) == (9 * 36, 36 + kept)
    layout = model.__dict__["_spatiotoken"].recorder.layouts["image"]
    (bearers,) = layout.bearers
    own = (bearers >= 0).nonzero()[:, 0].tolist()
    whole = range(36) if first else range(8 * 36, 9 * 36)
    assert set(whole) <= set(own)
    assert len(set(own) - set(whole)) == kept


def test_answers_about_a_video(image_family: Family, tmp_path: Path) -> None:
    """The loading path of `spatiotoken run`: frames of a file are images of the prompt."""
    image_family.model.save_pretrained(tmp_path)
    image_family.processor.save_pretrained(tmp_path)
    model, processor = load_model(tmp_path)
    assert isinstance(model, type(AutoModelForImageTextToText.from_pretrained(tmp_path)))
    video = load_video(DATA / "flipping_a_pancake.mkv", num_frames=4, backend="pyav")
    patch_model(model, "holitom", images="frames")
    answer = answer_video(model, processor, video, QUESTION, max_new_tokens=4)
    assert answer.frame_indices == video.indices
    assert answer.report.visual_tokens == 4 * 36 > answer.report.visual_kept
