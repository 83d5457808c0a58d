"""Tiny models of every family, real clips, and prompts made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from spatiotoken import load_video, unpatch_model
from spatiotoken.patching import HANDLE
from spatiotoken.probe import TINY_IMAGE_MODEL_TYPES, TINY_MODEL_TYPES, build_tiny
from spatiotoken.video import Video

DATA = Path(__file__).parent / "data"
GOLDEN = Path(__file__).parent / "golden"
QUESTION = "What is happening in this video?"

# The models are so small that a second thread costs more than it gives, above all beside another test process.
torch.set_num_threads(1)


@dataclass
class Family:
    """A tiny model with its processor, and how prompts for it are made."""

    name: str
    model: PreTrainedModel
    processor: Any
    clips: dict[str, Video]
    # Prompts, and what the unpatched model makes of them, are the same in hundreds of tests.
    prepared: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    answered: dict[str, tuple[Any, Tensor]] = field(default_factory=dict)

    def fresh(self) -> Family:
        """The same family with a model of its own, which a test may leave in any state."""
        model = AutoModelForImageTextToText.from_pretrained(self.model.config._name_or_path).eval()
        return replace(self, model=model)

    @property
    def stacks_videos(self) -> bool:
        """LLaVA processors stack videos, so all in a batch have as many frames."""
        return self.name.startswith("llava")

    def video(self, name: str, frames: int) -> tuple[Tensor, dict[str, Any]]:
        """``frames`` frames of a clip, with the metadata that processors want."""
        clip = self.clips[name]
        step = len(clip.indices) // frames
        return clip.frames[::step][:frames], {
            "fps": clip.metadata.fps,
            "frames_indices": list(clip.indices[::step][:frames]),
            "total_num_frames": clip.metadata.num_frames,
        }

    def inputs(self, *samples: Sequence[Any], padding_side: str = "left") -> dict[str, Tensor]:
        """Processor output for a batch; a sample lists texts, ``("video", clip, frames)`` and ``("image", clip)``.

        Families that take images only get a video's frames as images.
        """
        key = repr((samples, padding_side))
        if key not in self.prepared:
            self.prepared[key] = self._prepare(samples, padding_side)
        return {name: value.clone() for name, value in self.prepared[key].items()}

    def unpatched(self, *samples: Sequence[Any], new: int = 4) -> tuple[Any, Tensor]:
        """What the unpatched model of the family generates, and the logits of the prompt."""
        key = repr((samples, new))
        if key not in self.answered:
            assert HANDLE not in self.model.__dict__ and self.model.dtype == torch.float32
            inputs = self.inputs(*samples)
            self.answered[key] = self.generate(inputs, new=new), self.logits(inputs)
        return self.answered[key]

    def _prepare(self, samples: Sequence[Sequence[Any]], padding_side: str) -> dict[str, Tensor]:
        texts, videos, metadata, images = [], [], [], []
        for sample in samples:
            content = []
            for part in sample:
                if isinstance(part, str):
                    content.append({"type": "text", "text": part})
                    continue
                if part[0] == "video" and self.name in TINY_IMAGE_MODEL_TYPES:
                    frames, _ = self.video(part[1], part[2])
                    content += [{"type": "image"}] * len(frames)
                    images += list(frames)
                    continue
                content.append({"type": part[0]})
                if part[0] == "video":
                    frames, described = self.video(part[1], part[2])
                    videos.append(frames)
                    metadata.append(described)
                else:
                    images.append(self.clips[part[1]].frames[0])
            message = [{"role": "user", "content": content}]
            texts.append(self.processor.apply_chat_template(message, add_generation_prompt=True))
        pictures: dict[str, Any] = {}
        if videos:
            pictures |= {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
        if images:
            pictures["images"] = images
        self.processor.tokenizer.padding_side = padding_side
        try:
            return dict(self.processor(text=texts, padding=True, return_tensors="pt", **pictures))
        finally:
            self.processor.tokenizer.padding_side = "left"

    def generate(self, inputs: dict[str, Tensor], new: int = 4, **kwargs: Any) -> Any:
        return self.model.generate(
            **inputs,
            max_new_tokens=new,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            **kwargs,
        )

    def logits(self, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
        with torch.inference_mode():
            return self.model(**inputs, **kwargs).logits


@pytest.fixture(scope="session")
def clips() -> dict[str, Video]:
    """Frames of real footage, small enough to be quick."""
    chosen = {"pancake": "flipping_a_pancake.mkv", "nasa": "nasa_13013_rotated.mp4", "vp9": "testsrc2_vp9.webm"}
    return {name: load_video(DATA / file, num_frames=16, backend="pyav") for name, file in chosen.items()}


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory, clips: dict[str, Video]) -> dict[str, Family]:
    root = tmp_path_factory.mktemp("tiny-models")
    loaded = {}
    for name in (*TINY_MODEL_TYPES, *TINY_IMAGE_MODEL_TYPES):
        directory = build_tiny(name, root / name)
        model = AutoModelForImageTextToText.from_pretrained(directory).eval()
        loaded[name] = Family(name, model, AutoProcessor.from_pretrained(directory), clips)
    return loaded


def lent(family: Family) -> Iterator[Family]:
    """The family for one test, after which its model has to be what the next test expects."""

    def weights() -> list[tuple[int, int]]:
        tensors = [*family.model.parameters(), *family.model.buffers()]
        return [(tensor.data_ptr(), tensor._version) for tensor in tensors]

    before = weights()
    yield family
    unpatch_model(family.model)
    assert weights() == before, "the test changed a model that all tests share; it should use family.fresh()"


@pytest.fixture(params=[name for name in TINY_MODEL_TYPES if name.startswith("llava")])
def llava(request: pytest.FixtureRequest, families: dict[str, Family]) -> Iterator[Family]:
    """Each family without M-RoPE, whose parts of a prompt can be run one after the other by plain forwards."""
    yield from lent(families[request.param])


@pytest.fixture(params=[name for name in TINY_MODEL_TYPES if name.startswith("qwen")])
def qwen(request: pytest.FixtureRequest, families: dict[str, Family]) -> Iterator[Family]:
    """Each family with M-RoPE, whose tower takes pictures of any size."""
    yield from lent(families[request.param])


@pytest.fixture(params=TINY_IMAGE_MODEL_TYPES)
def image_family(request: pytest.FixtureRequest, families: dict[str, Family]) -> Iterator[Family]:
    """Each family that takes images only."""
    yield from lent(families[request.param])


@pytest.fixture(params=TINY_MODEL_TYPES)
def family(request: pytest.FixtureRequest, families: dict[str, Family]) -> Iterator[Family]:
    """Each family that takes videos in turn; its model is left unpatched."""
    yield from lent(families[request.param])
