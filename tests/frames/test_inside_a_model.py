"""Encoders of their own that describe frames inside a patched model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from spatiotoken import last_report, patch_model, patched
from spatiotoken.config import PatchConfig
from spatiotoken.frames import ScoredSelector, Scorer
from spatiotoken.frames.encoders import ClipEncoder, DinoV2Encoder, open_encoder
from spatiotoken.structures import FrameChoice, Frames
from tests.conftest import QUESTION, Family
from tests.test_frame_choice import adapter_of, video_encoding

VIDEO = ("video", "pancake", 8)


class Asking(ScoredSelector):
    """Keeps what it was told, and the first two frames."""

    name: ClassVar[str] = "asking"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "patches", "relevance"})
    told: Any = None

    def select(self, frames: Frames) -> FrameChoice:
        self.told.append(frames)
        return FrameChoice((0, 1))


class Describing(Asking):
    name: ClassVar[str] = "describing"
    needs: ClassVar[frozenset[str]] = frozenset({"features"})


class Scoring(Asking):
    name: ClassVar[str] = "scoring"
    needs: ClassVar[frozenset[str]] = frozenset({"score"})


def scorer(kind: str, models: dict[str, Path], **more: Any) -> Scorer:
    return Scorer(kind=kind, model=str(models[kind]), **{"cache": None, **more})


def test_frames_and_question_are_those_of_the_prompt(
    family: Family, scorer_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the encoder is shown are the frames as the processor made them, and the question without the template."""
    asked: list[str] = []
    relevance = ClipEncoder.relevance
    monkeypatch.setattr(
        ClipEncoder, "relevance", lambda self, features, text: (asked.append(text), relevance(self, features, text))[1]
    )
    inputs, told = family.inputs(["Look:", VIDEO, QUESTION], [VIDEO, "Why?"]), []
    clip = scorer("clip", scorer_models)
    with patched(family.model, PatchConfig(frames=Asking(scorer=clip, told=told)), processor=family.processor):
        family.logits(inputs)
        assert last_report(family.model).frames == ((0, 1), (0, 1))
    assert asked == [QUESTION, "Why?"]
    encoder = open_encoder(clip)
    pictures = adapter_of(family).pictures(family.model.model, video_encoding(family, inputs))
    for frames, shown, text in zip(told, pictures, asked, strict=True):
        described = encoder.describe(shown, patches=True)
        torch.testing.assert_close(frames.features, described.features)
        torch.testing.assert_close(frames.patches, described.patches)
        torch.testing.assert_close(frames.relevance, relevance(encoder, described.features, text))


def test_single_scores_describe_single_frames(
    family: Family, scorer_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, counts = family.inputs([VIDEO, QUESTION]), []
    describe = ClipEncoder.describe

    def counting(self: ClipEncoder, pixels: torch.Tensor, **kwargs: Any) -> Any:
        counts.append(len(pixels))
        return describe(self, pixels, **kwargs)

    monkeypatch.setattr(ClipEncoder, "describe", counting)
    told: list[Frames] = []
    clip = scorer("clip", scorer_models)
    with patched(family.model, PatchConfig(frames=Scoring(scorer=clip, told=told)), processor=family.processor):
        family.logits(inputs)
        assert counts == []
    with patched(family.model, PatchConfig(frames=Asking(scorer=clip, told=told)), processor=family.processor):
        family.logits(inputs)
    lazy, whole = told
    assert lazy.score is not None and whole.relevance is not None
    torch.testing.assert_close(lazy.score([3, 1]), whole.relevance[[3, 1]])


def test_descriptions_are_kept(
    family: Family, scorer_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same frames are described once, whatever is asked; DINOv2 needs no processor."""
    counts: list[int] = []
    encode = DinoV2Encoder._encode

    def counting(self: DinoV2Encoder, pixels: torch.Tensor, patches: bool) -> Any:
        counts.append(len(pixels))
        return encode(self, pixels, patches)

    monkeypatch.setattr(DinoV2Encoder, "_encode", counting)
    told: list[Frames] = []
    config = PatchConfig(frames=Describing(scorer=scorer("dinov2", scorer_models, cache=str(tmp_path)), told=told))
    patch_model(family.model, config)
    for question in (QUESTION, "Why?"):
        family.logits(family.inputs([VIDEO, question]))
    assert sum(counts) == told[0].num_frames and len(list(tmp_path.iterdir())) == 1
    assert torch.equal(told[0].features, told[1].features)
    family.logits(family.inputs([("video", "nasa", 8), QUESTION]))
    assert sum(counts) == told[0].num_frames + told[2].num_frames
