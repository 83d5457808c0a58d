"""Thumbnails beside videos, and the times of frames between their tokens."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BatchFeature

from spatiotoken import last_report, patch_model, patched
from spatiotoken.prompts import inject_timestamps, thumbnail_inputs
from spatiotoken.tokens.ts_llava_tokens import ts_llava_tokens_count
from tests.conftest import QUESTION, Family

SECONDS = [[0.0, 0.5, 1.25, 62.0], [3.0, 4.04, 5.0, 6.0]]


def placeholders(family: Family, ids: Tensor, kind: str = "video") -> Tensor:
    return ids == getattr(family.model.config, f"{kind}_token_id")


def texts(family: Family, inputs: dict[str, Tensor]) -> list[str]:
    """Each row without padding, its runs of placeholders written as their numbers."""
    video = family.processor.tokenizer.convert_ids_to_tokens(family.model.config.video_token_id)
    rows = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    found = [family.processor.tokenizer.decode(row) for row in rows]
    return [re.sub(f"(?:{re.escape(video)})+", lambda run: f"[{run[0].count(video)}]", text) for text in found]


def two_prompts(family: Family) -> list[tuple[Any, ...]]:
    return [(("video", "nasa", 4), QUESTION), (("video", "pancake", 4), "Who?")]


def injected(family: Family, *samples: tuple[Any, ...], seconds: list[list[float]]) -> dict[str, Tensor]:
    return inject_timestamps(family.inputs(*samples), family.processor, family.model.config, seconds)


# -- thumbnails --


@pytest.mark.parametrize("preset", ["ts_llava_tokens", "ts_llava"])
def test_thumbnail_stays_whole_while_tokens_are_sampled(family: Family, preset: str) -> None:
    frames, metadata = family.video("nasa", 8)
    inputs = thumbnail_inputs(family.processor, frames, QUESTION, metadata)
    images, videos = (int(placeholders(family, inputs["input_ids"], kind).sum()) for kind in ("image", "video"))
    patch_model(family.model, preset)
    family.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    report = last_report(family.model)
    grid = report.stages["tokens"].tokens_in
    newlines = videos - grid
    assert newlines == (family.name == "llava_onevision")
    kept = ts_llava_tokens_count(grid, 0.1)
    assert report.stages["tokens"].tokens_out == kept < grid
    assert report.visual_tokens == images + videos
    assert report.visual_kept == images + kept + newlines


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision"])
def test_thumbnail_is_an_image_of_few_frames(families: dict[str, Family], name: str) -> None:
    family = families[name]
    frames, metadata = family.video("nasa", 8)
    frames = torch.arange(8, dtype=torch.uint8)[:, None, None, None].mul(30).expand_as(frames).contiguous()
    shown: list[Tensor] = []

    class Seen:
        apply_chat_template = staticmethod(family.processor.apply_chat_template)
        video_processor = family.processor.video_processor

        def __call__(self, images: list[Tensor], **kwargs: Any) -> Any:
            shown.extend(images)
            return family.processor(images=images, **kwargs)

    def order(inputs: Any) -> list[str]:
        ids = inputs["input_ids"][0]
        at = {kind: int(placeholders(family, ids, kind).nonzero()[0]) for kind in ("image", "video")}
        return sorted(at, key=at.__getitem__)

    assert order(thumbnail_inputs(Seen(), frames, QUESTION, metadata)) == ["image", "video"]
    assert order(thumbnail_inputs(Seen(), frames, QUESTION, metadata, thumbnail_first=False)) == ["video", "image"]
    thumbnail_inputs(Seen(), frames[:3], QUESTION, metadata | {"frames_indices": metadata["frames_indices"][:3]})
    assert all(picture.shape == frames.shape[1:] for picture in shown)
    assert shown[0].unique().tolist() == [0, 30, 90, 120, 180, 210]  # frames 0, 1, 3, 4, 6 and 7
    assert shown[2].unique().tolist() == [0, 30, 60]


# -- times --


def test_times_stand_before_their_frames(llava: Family) -> None:
    inputs = llava.inputs(*two_prompts(llava))
    plain = texts(llava, inputs)
    timed = texts(llava, inject_timestamps(inputs, llava.processor, llava.model.config, SECONDS))
    newline = int(llava.name == "llava_onevision")
    for before, after, times in zip(plain, timed, SECONDS, strict=True):
        stamps = "".join(f"<{time:.1f}s>[9]" for time in times)
        assert after == before.replace(f"[{36 + newline}]", f"{stamps[:-3]}[{9 + newline}]")
    assert "<62.0s>" in timed[0]


def test_only_text_is_added(llava: Family) -> None:
    inputs = llava.inputs(*two_prompts(llava))
    inputs["mm_token_type_ids"] = 2 * placeholders(llava, inputs["input_ids"]).long()
    inputs["marks"] = torch.arange(inputs["input_ids"].numel()).view_as(inputs["input_ids"]) + 1
    before = {name: value.clone() for name, value in inputs.items()}
    out = inject_timestamps(inputs, llava.processor, llava.model.config, SECONDS)
    assert type(out) is dict and list(out) == list(inputs)
    assert all(torch.equal(inputs[name], before[name]) for name in before), "the inputs are left alone"
    assert out["pixel_values_videos"] is inputs["pixel_values_videos"]
    for row in range(2):
        valid, kept = out["attention_mask"][row].bool(), out["marks"][row] > 0
        original = inputs["attention_mask"][row].bool()
        for name in ("input_ids", "mm_token_type_ids", "marks"):
            assert torch.equal(out[name][row][kept], inputs[name][row][original])
        added = valid & ~kept
        assert not out["mm_token_type_ids"][row][added].any()
        stamps = "".join(f"<{time:.1f}s>" for time in SECONDS[row])
        assert llava.processor.tokenizer.decode(out["input_ids"][row][added]) == stamps
        assert bool((valid.long().diff() >= 0).all()), "padding is on the left"
        assert (out["input_ids"][row][~valid] == llava.processor.tokenizer.pad_token_id).all()
    assert out["attention_mask"][0].all(), "no more padding than is needed"


def test_rows_padded_on_the_right_come_out_padded_on_the_left(llava: Family) -> None:
    timed = [
        inject_timestamps(
            llava.inputs(*two_prompts(llava), padding_side=side), llava.processor, llava.model.config, SECONDS
        )
        for side in ("left", "right")
    ]
    assert torch.equal(timed[0]["input_ids"], timed[1]["input_ids"])
    assert torch.equal(timed[0]["attention_mask"], timed[1]["attention_mask"])


def test_several_videos_and_an_image_in_a_prompt(llava: Family) -> None:
    clip = ("video", "nasa", 2)
    samples = [(("image", "pancake"), clip, "first", clip, "then?"), (clip, "what?")]
    seconds = [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    inputs = llava.inputs(*samples)
    out = injected(llava, *samples, seconds=seconds)
    for kind in ("image", "video"):
        counts = [placeholders(llava, value["input_ids"], kind).sum(1).tolist() for value in (inputs, out)]
        assert counts[0] == counts[1]
    stamps = [re.findall(r"<(\d\.\d)s>", text) for text in texts(llava, out)]
    assert stamps == [["0.0", "1.0", "2.0", "3.0"], ["4.0", "5.0"]]


def test_videos_side_by_side(llava: Family) -> None:
    """No text between them, so that their placeholders are one run."""
    inputs = llava.inputs((("video", "nasa", 2), ("video", "vp9", 2), "Which?"))
    video = placeholders(llava, inputs["input_ids"])[0]
    first, last = video.nonzero()[[0, -1], 0].tolist()
    gap = torch.arange(video.shape[0])
    keep = video | (gap < first) | (gap > last)
    packed = {
        name: value[:, keep] if value.shape == inputs["input_ids"].shape else value for name, value in inputs.items()
    }
    out = inject_timestamps(packed, llava.processor, llava.model.config, [[0, 1], [2, 3]])
    newline = int(llava.name == "llava_onevision")
    assert f"<0.0s>[9]<1.0s>[{9 + newline}]<2.0s>[9]<3.0s>[{9 + newline}]" in texts(llava, out)[0]


def test_one_frame(llava: Family) -> None:
    (text,) = texts(llava, injected(llava, (("video", "nasa", 1), "?"), seconds=[[7.0]]))
    assert f"<7.0s>[{9 + (llava.name == 'llava_onevision')}]" in text


@pytest.mark.parametrize("config", ["dense", {"tokens": {"method": "random", "retention": 0.3}}])
def test_models_run_on_it_and_a_batch_equals_singles(llava: Family, config: Any) -> None:
    prompts = two_prompts(llava)
    batch = injected(llava, *prompts, seconds=SECONDS)
    singles = [injected(llava, prompt, seconds=[times]) for prompt, times in zip(prompts, SECONDS, strict=True)]
    plain = llava.generate(batch).sequences
    with patched(llava.model, config):
        together = llava.generate(batch)
        report = last_report(llava.model)
        for row, single in enumerate(singles):
            alone = llava.generate(single)
            new = slice(single["input_ids"].shape[1], None)
            assert torch.equal(alone.sequences[0, new], together.sequences[row, batch["input_ids"].shape[1] :])
            for ours, theirs in zip(alone.scores, together.scores, strict=True):
                torch.testing.assert_close(ours[0], theirs[row], rtol=1e-4, atol=1e-4)
    if config == "dense":
        assert torch.equal(together.sequences, plain)
    newline = int(llava.name == "llava_onevision")
    assert report.visual_tokens == 2 * (36 + newline)
    assert report.prompt_tokens == int(batch["attention_mask"].sum())
    assert report.visual_kept == 2 * ((36 if config == "dense" else 11) + newline)


@pytest.mark.parametrize("config", [{"layers": {"method": "fastv", "layer": 2, "retention": 0.5}}, "ts_llava_tokens"])
def test_other_stages_count_visual_tokens_alone(llava: Family, config: Any) -> None:
    batch = injected(llava, *two_prompts(llava), seconds=SECONDS)
    patch_model(llava.model, config)
    llava.generate(batch, new=2)
    report = last_report(llava.model)
    newline = int(llava.name == "llava_onevision")
    text = int(batch["attention_mask"].sum()) - 2 * (36 + newline)
    assert report.text_tokens == text and report.visual_tokens == 2 * (36 + newline)
    kept = [sum(seen) for seen in report.seen or ()]
    assert sum(kept) == report.layer_tokens[-1] - text
    assert 0 < min(kept) and max(kept) < 36


def test_the_model_sees_the_times(llava: Family) -> None:
    prompt = two_prompts(llava)[0]
    here, there = (llava.logits(injected(llava, prompt, seconds=[times]))[:, -1] for times in SECONDS)
    assert not torch.allclose(here, there, atol=1e-3)


def test_values_go_to_the_same_placeholders(llava: Family) -> None:
    """Embeddings of the picture are those of the plain prompt, each before the text of the next frame."""
    prompt = two_prompts(llava)[0]
    inputs, seen = llava.inputs(prompt), []
    timed = injected(llava, prompt, seconds=[SECONDS[0]])
    hook = llava.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        for value in (inputs, timed):
            llava.logits(value)
    finally:
        hook.remove()
    plain, new = (x[placeholders(llava, value["input_ids"])] for x, value in zip(seen, (inputs, timed), strict=True))
    assert torch.equal(plain, new)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_families_that_tell_the_time_are_refused(families: dict[str, Family], name: str) -> None:
    family = families[name]
    inputs = family.inputs((("video", "nasa", 4), QUESTION))
    with pytest.raises(ValueError, match=f"{name} tells the time by itself.*llava_next_video, llava_onevision"):
        inject_timestamps(inputs, family.processor, family.model.config, [[0.0, 1.0, 2.0, 3.0]])


def test_times_must_belong_to_the_videos(llava: Family) -> None:
    inputs = llava.inputs(*two_prompts(llava))
    for seconds in (SECONDS[:1], [times[:3] for times in SECONDS], []):
        with pytest.raises(ValueError, match=r"where the videos have \[4, 4\]"):
            inject_timestamps(inputs, llava.processor, llava.model.config, seconds)
    with pytest.raises(ValueError, match="video tokens do not belong to 2 videos of 4 frames"):
        cut = {name: value[:, 40:] if value.ndim == 2 else value for name, value in inputs.items()}
        inject_timestamps(cut, llava.processor, llava.model.config, SECONDS)
    with pytest.raises(ValueError, match=r"where the videos have \[\]"):
        text = llava.inputs(("Hello?",))
        inject_timestamps(text, llava.processor, llava.model.config, [])


def test_processor_output_stays_one(llava: Family) -> None:
    inputs = llava.inputs(two_prompts(llava)[0])
    out = inject_timestamps(BatchFeature(inputs), llava.processor, llava.model.config, SECONDS[:1])
    assert isinstance(out, BatchFeature) and out.to("cpu")["input_ids"].shape[1] > inputs["input_ids"].shape[1]
