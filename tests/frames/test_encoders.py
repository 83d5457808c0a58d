"""Encoders give what their models give, whatever the batches, and read the question as the models were trained to."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoProcessor

from spatiotoken import patch_model, patched, unpatch_model
from spatiotoken.frames import Scorer
from spatiotoken.frames.encoders import (
    Described,
    FrameEncoder,
    PixelEncoder,
    TowerEncoder,
    describe_stream,
    open_encoder,
)
from spatiotoken.frames.relevance import question_similarity
from spatiotoken.patches.adapter import find_adapter
from spatiotoken.video.features import frame_features
from tests.conftest import QUESTION, Family
from tests.frames.conftest import KINDS, QUESTIONS, TEXT_LENGTH, coloured, pictures

READERS = [name for name in KINDS if KINDS[name] != "dinov2"]
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def opened(scorer_models: dict[str, Path], name: str, **settings: Any) -> Any:
    return open_encoder(Scorer(kind=KINDS[name], model=str(scorer_models[name]), **settings))


def arrays(frames: Tensor) -> list[Any]:
    """Frames as most people give them to processors."""
    return [frame.permute(1, 2, 0).numpy() for frame in frames]


# ---------------------------------------------------------------------------------------------------------- pixels


def test_pixels_are_the_cheap_features_of_the_video_package() -> None:
    frames = pictures(5)
    described = PixelEncoder(batch=2).describe(frames, patches=True)
    assert torch.equal(described.features, frame_features(frames))
    assert described.patches is not None and described.patches.shape == (5, 256, 3)
    for row, column, channel in ((0, 0, 0), (3, 7, 1), (15, 15, 2)):
        expected = described.features[:, channel * 256 + row * 16 + column]
        assert torch.equal(described.patches[:, row * 16 + column, channel], expected)
    assert PixelEncoder().describe(frames).patches is None


def test_pixels_read_no_text() -> None:
    encoder = open_encoder(Scorer())
    with pytest.raises(ValueError, match="reads no text.*clip, siglip2, tower"):
        encoder.relevance(encoder.describe(pictures()).features, QUESTION)


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(2, 3, 8, 8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
        torch.zeros(2, 3, 0, 8, dtype=torch.uint8),
    ],
    ids=["float", "one frame", "channels last", "empty"],
)
def test_other_than_frames_is_refused(frames: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \[T, 3, h, w\], not"):
        PixelEncoder().describe(frames)


# ------------------------------------------------------------------------------------------------- models of their own


def described_directly(directory: Path, name: str, frames: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the models' own classes, all frames at once."""
    model = AutoModel.from_pretrained(directory).eval()
    inputs = AutoImageProcessor.from_pretrained(directory)(images=arrays(frames), return_tensors="pt")
    with torch.no_grad():
        if KINDS[name] == "dinov2":
            hidden = model(**inputs).last_hidden_state
            return hidden[:, 0], hidden[:, 4 if name == "registers" else 1 :]
        output = model.vision_model(**inputs)
        if name == "clip":
            return model.visual_projection(output.pooler_output), output.last_hidden_state[:, 1:]
        if name == "naflex":
            return output.pooler_output, output.last_hidden_state[:, inputs["pixel_attention_mask"][0].bool()]
        return output.pooler_output, output.last_hidden_state


@pytest.mark.parametrize("name", KINDS)
def test_features_are_the_models(scorer_models: dict[str, Path], name: str) -> None:
    frames = pictures(5)
    features, patches = described_directly(scorer_models[name], name, frames)
    described = opened(scorer_models, name).describe(frames, patches=True)
    torch.testing.assert_close(described.features, features, **CLOSE)
    torch.testing.assert_close(described.patches, patches, **CLOSE)
    assert features.std(dim=0).mean() > 0.05  # the frames are told apart at all


@pytest.mark.parametrize("name", KINDS)
def test_batches_do_not_matter(scorer_models: dict[str, Path], name: str) -> None:
    frames, encoder = pictures(5), opened(scorer_models, name, batch=2)
    together = encoder.describe(frames, patches=True)
    singles = [encoder.describe(frame[None], patches=True) for frame in frames]
    torch.testing.assert_close(together.features, torch.cat([one.features for one in singles]), **CLOSE)
    torch.testing.assert_close(together.patches, torch.cat([one.patches for one in singles]), **CLOSE)
    alone = encoder.describe(frames)
    assert alone.patches is None and torch.equal(alone.features, together.features)


@pytest.mark.parametrize("name", ["pixels", *KINDS])
def test_descriptions_own_little_memory(scorer_models: dict[str, Path], name: str) -> None:
    encoder = PixelEncoder() if name == "pixels" else opened(scorer_models, name)
    described = encoder.describe(pictures(3), patches=True)
    for values in (described.features, described.patches):
        assert values.dtype == torch.float32 and values.device.type == "cpu" and not values.requires_grad
        assert values.untyped_storage().nbytes() == 4 * values.numel()


@pytest.mark.parametrize("name", ["pixels", *KINDS])
def test_no_frames(scorer_models: dict[str, Path], name: str) -> None:
    encoder = PixelEncoder() if name == "pixels" else opened(scorer_models, name)
    one, none = encoder.describe(pictures(1), patches=True), encoder.describe(pictures(1)[:0], patches=True)
    assert none.features.shape == (0, one.features.shape[1])
    assert none.patches.shape == (0, *one.patches.shape[1:])
    if name in READERS:
        assert encoder.relevance(none.features, QUESTION).shape == (0,)


@pytest.mark.parametrize("name", READERS)
def test_relevance_is_the_models_cosine(scorer_models: dict[str, Path], name: str) -> None:
    frames, question = pictures(5), "is it red?"
    model = AutoModel.from_pretrained(scorer_models[name]).eval()
    processor = AutoProcessor.from_pretrained(scorer_models[name])
    # As the documentation of these models says.
    padding = {"padding": "max_length", "max_length": TEXT_LENGTH[name]} if name != "clip" else {}
    pixels = processor.image_processor(images=arrays(frames), return_tensors="pt")
    ids = processor.tokenizer([question], return_tensors="pt", **padding)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids, **pixels).logits_per_image[:, 0]
        cosine = (logits - getattr(model, "logit_bias", 0)) / model.logit_scale.exp()
    encoder = opened(scorer_models, name, batch=3)
    relevance = encoder.relevance(encoder.describe(frames).features, question)
    torch.testing.assert_close(relevance, cosine, **CLOSE)
    assert relevance.dtype == torch.float32 and relevance.std() > 0.01
    encoder.tokenizer.padding_side = "left"  # as SigLIP 2's tokenizer has it where the checkpoint says nothing
    assert torch.equal(relevance, encoder.relevance(encoder.describe(frames).features, "Is it RED?"))


@pytest.mark.parametrize("name", READERS)
def test_relevance_is_a_cosine(scorer_models: dict[str, Path], name: str) -> None:
    encoder = opened(scorer_models, name)
    features = encoder.describe(pictures(40)).features
    relevance = encoder.relevance(torch.cat([features, 1e4 * features, 0 * features]), QUESTION)
    assert relevance.abs().max() <= 1 and torch.isfinite(relevance).all()
    torch.testing.assert_close(relevance[:40], relevance[40:80])
    assert not relevance[80:].any()


@torch.no_grad()
def fit_text(directory: Path, name: str, target: Path) -> Path:
    """A copy of a model whose text tower gives each of ``QUESTIONS`` the features of the frame it is about."""
    shutil.copytree(directory, target)
    encoder = open_encoder(Scorer(kind=KINDS[name], model=str(directory)))
    images = encoder.describe(coloured()).features
    images = images - images.mean(dim=0)  # else all frames are nearly parallel
    model = encoder.model
    head = model.text_projection if name == "clip" else model.text_model.head
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for question in QUESTIONS:
        encoder.relevance(images, question)
    handle.remove()
    head.weight.copy_((torch.linalg.pinv(torch.cat(seen)) @ images).T)
    if head.bias is not None:
        head.bias.zero_()
    model.save_pretrained(target)
    return target


@pytest.mark.parametrize("name", READERS)
def test_the_right_frame_wins(scorer_models: dict[str, Path], name: str, tmp_path: Path) -> None:
    directory = fit_text(scorer_models[name], name, tmp_path / "fitted")
    encoder = open_encoder(Scorer(kind=KINDS[name], model=str(directory), batch=2))
    features = encoder.describe(coloured(72, 50)).features
    centred = features - features.mean(dim=0)
    for index, question in enumerate(QUESTIONS):
        assert encoder.relevance(centred, question).argmax() == index
        assert encoder.relevance(centred, question)[index] > 0.9
    # Another size of the same frames; and the order is the frames'.
    assert encoder.relevance(centred.flip(0), QUESTIONS[0]).argmax() == 2


@pytest.mark.parametrize("name", READERS)
def test_long_questions_are_cut(scorer_models: dict[str, Path], name: str, caplog: pytest.LogCaptureFixture) -> None:
    encoder, limit = opened(scorer_models, name), TEXT_LENGTH[name]
    features = encoder.describe(pictures(5)).features
    own = limit - (2 if name == "clip" else 1)  # one token for each letter, but for those that begin and end the text
    with caplog.at_level(logging.INFO, "spatiotoken"):
        fits = encoder.relevance(features, "q" * own)
    assert not caplog.records
    with caplog.at_level(logging.INFO, "spatiotoken"):
        cut = encoder.relevance(features, "q" * own + " and so on" * 50)
    (record,) = caplog.records
    assert record.levelno == logging.INFO and f"reads {limit}" in record.getMessage()
    assert torch.equal(cut, fits)
    assert torch.equal(cut, encoder.relevance(features, "q" * own + " whatever" * 9))
    assert not torch.equal(cut, encoder.relevance(features, "q"))


def test_dinov2_reads_no_text(scorer_models: dict[str, Path]) -> None:
    encoder = opened(scorer_models, "dinov2")
    with pytest.raises(ValueError, match="DinoV2Encoder reads no text"):
        encoder.relevance(encoder.describe(pictures()).features, QUESTION)


# ------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("clip", "dinov2", "model type is 'dinov2', expected 'clip'"),
        ("clip", "siglip2", "model type is 'siglip', expected 'clip'"),
        ("siglip2", "clip", "model type is 'clip', expected 'siglip' or 'siglip2'"),
        ("dinov2", "clip", "model type is 'clip', expected 'dinov2' or 'dinov2_with_registers'"),
    ],
)
def test_models_of_another_kind_are_refused(
    scorer_models: dict[str, Path], kind: Any, name: str, expected: str
) -> None:
    directory = str(scorer_models[name])
    with pytest.raises(ValueError) as caught:
        open_encoder(Scorer(kind=kind, model=directory))
    assert str(caught.value) == f"cannot load scorer model {directory!r} of kind {kind!r}: its {expected}"


@pytest.mark.parametrize("kind", ["clip", "siglip2", "dinov2"])
def test_missing_directories_are_named(kind: Any, tmp_path: Path) -> None:
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match=f"cannot load scorer model '{missing}' of kind '{kind}': .") as caught:
            open_encoder(Scorer(kind=kind, model=str(missing)))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["clip", "siglip2", "dinov2"])
def test_hub_failures_are_named(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=f"cannot load scorer model .* of kind '{kind}': .") as caught:
        open_encoder(Scorer(kind=kind))
    assert "\n" not in str(caught.value)


def test_incomplete_models_are_refused(scorer_models: dict[str, Path], tmp_path: Path) -> None:
    broken = shutil.copytree(scorer_models["clip"], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights: visual_projection\.weight"):
        open_encoder(Scorer(kind="clip", model=str(broken)))
    (broken / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="cannot load scorer model"):
        open_encoder(Scorer(kind="clip", model=str(broken)))


def test_the_tower_is_not_opened_by_name() -> None:
    with pytest.raises(ValueError, match=r"belongs to the model that answers.*TowerEncoder\(model, processor\)"):
        open_encoder(Scorer(kind="tower"))


def test_scorers_name_models_of_their_kind_only() -> None:
    assert Scorer(kind="clip").model_name == "openai/clip-vit-base-patch32"
    assert Scorer(kind="clip", model="here").model_name == "here"
    for kind in ("pixels", "tower"):
        with pytest.raises(ValueError, match="has no model of its own"):
            _ = Scorer(kind=kind).model_name
        for name in ("model", "revision"):
            with pytest.raises(ValidationError, match=f"{kind!r} takes no model or revision; dinov2, clip, siglip2 do"):
                Scorer(kind=kind, **{name: "x"})


def test_identity_is_the_content_of_a_directory(scorer_models: dict[str, Path], tmp_path: Path) -> None:
    first = opened(scorer_models, "clip")
    moved = shutil.copytree(scorer_models["clip"], tmp_path / "moved", copy_function=shutil.copyfile)
    (moved / "README.md").write_text("nothing that matters")
    assert open_encoder(Scorer(kind="clip", model=str(moved), batch=3)).identity == first.identity
    weights = load_file(moved / "model.safetensors")
    weights["visual_projection.weight"][0, 0] += 1
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    assert open_encoder(Scorer(kind="clip", model=str(moved))).identity != first.identity
    identities = {opened(scorer_models, name).identity for name in KINDS} | {PixelEncoder().identity}
    assert len(identities) == len(KINDS) + 1


def offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))


@pytest.mark.parametrize("revision", [None, "a-branch"])
def test_identity_is_the_commit_of_a_hub_model(
    scorer_models: dict[str, Path], revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch, tmp_path)
    commit, repository = "0123456789abcdef" * 2 + "01234567", tmp_path / "models--somebody--tiny"
    shutil.copytree(scorer_models["dinov2"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / (revision or "main")).write_text(commit)
    encoder = open_encoder(Scorer(kind="dinov2", model="somebody/tiny", revision=revision))
    assert encoder.identity == f"dinov2/1/somebody/tiny@{commit}"
    frames = pictures(2)
    assert torch.equal(encoder.describe(frames).features, opened(scorer_models, "dinov2").describe(frames).features)


def test_nothing_heavy_is_imported_for_the_settings() -> None:
    code = (
        "import sys, spatiotoken.frames.encoders, spatiotoken.frames.cache, spatiotoken.frames.relevance; "
        "from spatiotoken.frames.encoders import *; open_encoder(spatiotoken.frames.Scorer()); "
        "sys.exit(', '.join({'transformers', 'torchvision', 'av', 'datasets'} & set(sys.modules)) or None)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# ------------------------------------------------------------------------------------------------------------- streams


class Counting(FrameEncoder):
    """Each frame's first value, and how many frames came at a time."""

    identity, batch = "counting", 4

    def __init__(self) -> None:
        self.calls: list[int] = []

    def _encode(self, pixels: Tensor, patches: bool) -> tuple[Tensor, Tensor | None]:
        self.calls.append(len(pixels))
        return pixels[:, :1, 0, 0], pixels[:, :, 0] if patches else None


def test_streams_are_described_batch_by_batch() -> None:
    frames, encoder = pictures(11), Counting()
    done: list[int] = []

    def batches() -> Iterator[Tensor]:
        for start in range(0, 11, 5):
            done.append(len(encoder.calls))
            yield frames[start : start + 5]

    streamed = describe_stream(encoder, batches(), patches=True)
    assert encoder.calls == [4, 1, 4, 1, 1] and done == [0, 2, 4]  # each batch is done with before the next is made
    whole = encoder.describe(frames, patches=True)
    assert torch.equal(streamed.features, whole.features) and whole.features.dtype == torch.float32
    assert streamed.patches is not None and torch.equal(streamed.patches, frames[:, :, 0].float())
    assert describe_stream(encoder, [frames]).patches is None


def test_streams_without_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="no frames to describe"):
        describe_stream(Counting(), [])


@pytest.mark.parametrize(
    ("features", "patches"),
    [(torch.zeros(3), None), (torch.zeros(3, 4), torch.zeros(3, 4)), (torch.zeros(3, 4), torch.zeros(2, 5, 4))],
)
def test_descriptions_fit_together(features: Tensor, patches: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"must be \[T, F\]|do not belong to 3 frames"):
        Described(features, patches)


# ------------------------------------------------------------------------------------------------ question similarity


def test_similarity_is_a_centred_cosine() -> None:
    generator = torch.Generator().manual_seed(0)
    features, question = torch.randn(6, 8, generator=generator), torch.randn(3, 8, generator=generator)
    centred = features - features.mean(dim=0)
    expected = torch.nn.functional.cosine_similarity(centred, question.mean(dim=0)[None])
    similarity = question_similarity(features, question)
    torch.testing.assert_close(similarity, expected)
    assert similarity.dtype == torch.float32
    # What all frames share, and the lengths of frames and words, change nothing.
    torch.testing.assert_close(question_similarity(3 * features + 50, 7 * question), expected, rtol=1e-3, atol=1e-4)
    halves = question_similarity(features.bfloat16(), question.bfloat16())
    torch.testing.assert_close(halves, expected, rtol=0, atol=0.02)


def test_similarity_of_the_frame_that_is_asked_for() -> None:
    features = torch.full((4, 5), 10.0) + torch.eye(4, 5)
    assert question_similarity(features, torch.eye(5)[2:3]).argmax() == 2
    plain = torch.nn.functional.cosine_similarity(features, torch.eye(5)[2:3])
    assert plain.max() - plain.min() < 0.1 < question_similarity(features, torch.eye(5)[2:3]).std()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 1000])
def test_similarity_of_equal_frames_is_zero(count: int) -> None:
    frame = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    frames = frame.expand(count, -1)
    assert torch.equal(question_similarity(frames, frame), torch.zeros(count))
    noise = 1e-7 * torch.randn(count, 64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(question_similarity(frames + noise, frame), torch.zeros(count))


def test_similarity_to_nothing_is_zero() -> None:
    features = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for question in (torch.zeros(0, 8), torch.zeros(3, 8)):
        assert torch.equal(question_similarity(features, question), torch.zeros(4))
    assert torch.equal(question_similarity(torch.zeros(4, 8), torch.ones(1, 8)), torch.zeros(4))


# --------------------------------------------------------------------------------------- the tower of the model itself


def test_tower_tokens_are_the_models(family: Family) -> None:
    frames = family.clips["pancake"].frames[:3]
    encoder = TowerEncoder(family.model, family.processor, batch=2)
    described = encoder.describe(frames, patches=True)
    adapter, core = encoder.adapter, family.model.model
    for index, frame in enumerate(frames):
        video = frame.expand(adapter.frames_per_unit(core), -1, -1, -1)
        prompt = family.processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])
        about = {"fps": 1.0, "frames_indices": list(range(len(video))), "total_num_frames": len(video)}
        inputs = family.processor(
            text=prompt, videos=[video], video_metadata=[about], do_sample_frames=False, return_tensors="pt"
        )
        encoding = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw") if name in inputs}
        (item,) = adapter.items(core, "video", encoding)
        with torch.no_grad():
            rows = adapter.read(core.get_video_features(*encoding.values(), return_dict=True))[0][: item.size]
        torch.testing.assert_close(described.patches[index], rows, **CLOSE)
    torch.testing.assert_close(described.features, described.patches.mean(dim=1))
    assert described.features.shape == (3, family.model.config.get_text_config().hidden_size)


def test_tower_batches_do_not_matter(family: Family) -> None:
    frames = pictures(5, 90, 120)
    together = TowerEncoder(family.model, family.processor).describe(frames, patches=True)
    for batch in (1, 2):
        parts = TowerEncoder(family.model, family.processor, batch=batch).describe(frames, patches=True)
        torch.testing.assert_close(parts.features, together.features, **CLOSE)
        torch.testing.assert_close(parts.patches, together.patches, **CLOSE)
    assert together.features.untyped_storage().nbytes() == 4 * together.features.numel()
    assert TowerEncoder(family.model, family.processor).describe(frames[:0]).features.shape[0] == 0


def test_the_towers_right_frame_wins(family: Family) -> None:
    other = family.fresh()
    encoder = TowerEncoder(other.model, other.processor)
    features = encoder.describe(pictures(5, 90, 120)).features
    ids = other.processor.tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    table: Any = other.model.get_input_embeddings()
    for wanted in (1, 3):
        with torch.no_grad():
            table.weight[ids] = features[wanted] - features.mean(dim=0)
        relevance = encoder.relevance(features, QUESTION)
        assert relevance.argmax() == wanted and relevance[wanted] > 0.999 and relevance.abs().max() <= 1
    assert torch.equal(relevance, question_similarity(features, table(torch.tensor(ids)).detach()))


def test_tower_relevance_of_one_frame_or_no_question_is_zero(family: Family) -> None:
    encoder = TowerEncoder(family.model, family.processor)
    features = encoder.describe(pictures(1, 90, 120).expand(3, -1, -1, -1)).features
    assert torch.equal(encoder.relevance(features[:1], QUESTION), torch.zeros(1))
    assert torch.equal(encoder.relevance(features, QUESTION), torch.zeros(3))
    assert torch.equal(encoder.relevance(encoder.describe(pictures(3, 90, 120)).features, ""), torch.zeros(3))


def test_patched_towers_are_refused(family: Family) -> None:
    encoder = TowerEncoder(family.model, family.processor)
    with patched(family.model, {"tokens": {"method": "random", "retention": 0.5}}):
        with pytest.raises(ValueError, match="call unpatch_model first"):
            TowerEncoder(family.model, family.processor)
        with pytest.raises(ValueError, match="call unpatch_model first"):
            encoder.describe(pictures(1))
    patch_model(family.model, {"tokens": {"method": "random", "retention": 0.5}})
    unpatch_model(family.model)
    assert TowerEncoder(family.model, family.processor).describe(pictures(1, 90, 120)).features.isfinite().all()


def test_tower_identity_is_its_weights_and_sizes(family: Family) -> None:
    identity = TowerEncoder(family.model, family.processor).identity
    other = family.fresh()
    assert TowerEncoder(other.model, other.processor, batch=3).identity == identity
    adapter = find_adapter(other.model)
    with torch.no_grad():
        next(iter(adapter.language_model(other.model).parameters())).add_(1)
        assert TowerEncoder(other.model, other.processor).identity == identity
        next(iter(adapter.tower_layers(other.model.model)[0].parameters())).add_(1)
    assert TowerEncoder(other.model, other.processor).identity != identity
    processor = AutoProcessor.from_pretrained(family.model.config._name_or_path)
    processor.video_processor.image_mean = [0.1, 0.2, 0.3]
    assert TowerEncoder(family.model, processor).identity != identity
    assert TowerEncoder(family.fresh().model.bfloat16(), family.processor).identity != identity


def test_towers_of_other_models_are_refused(scorer_models: dict[str, Path], families: dict[str, Family]) -> None:
    clip = opened(scorer_models, "clip").model
    with pytest.raises(ValueError, match="no language-model head|supported"):
        TowerEncoder(clip, None)
    some = families["qwen2_vl"]
    with pytest.raises(ValueError, match="has no video processor"):
        TowerEncoder(some.model, some.processor.tokenizer)
    with pytest.raises(ValueError, match="batch must be at least 1"):
        TowerEncoder(some.model, some.processor, batch=0)
