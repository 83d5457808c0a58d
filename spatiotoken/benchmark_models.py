"""Video LLMs of released shapes with random weights, smaller ones in proportion, and a request to them.

Nothing is downloaded: tokenizers are trained on a few sentences, processors are transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from spatiotoken.answer import prepare_inputs
from spatiotoken.probe.building import (
    LLAVA_ONEVISION_PROMPT,
    QWEN_PROMPT,
    Architecture,
    build_config,
    build_processor,
    build_tokenizer,
    end_tokens,
)
from spatiotoken.probe.tiny import CORPUS, TEXT_VOCAB
from spatiotoken.tower_benchmark import vision_settings

Size = Literal["tiny", "cpu", "7b"]
SIZES: tuple[Size, ...] = ("tiny", "cpu", "7b")
FRAMES: Mapping[Size, tuple[int, ...]] = {"tiny": (8,), "cpu": (32,), "7b": (32, 64, 256)}
"""By default."""
QUESTION = "What is happening in this video?"
FPS = 2.0
"""Frames a second, as a processor would sample them."""
SCENE = 8
"""Frames that a camera stays at one place."""

_WEIGHTS_SEED, _VIDEO_SEED = 1, 0


@dataclass(frozen=True)
class Family:
    """What the benchmarks want to know of a family.

    Attributes:
        tower, projector: modules of the core; of Qwen-VL the projector is in the tower.
        stacks_videos: the features of videos are one tensor ``[videos, tokens, D]``, else a tuple.
    """

    tower: str
    projector: str
    stacks_videos: bool


FAMILIES: Mapping[str, Family] = {
    "qwen2_5_vl": Family("visual", "visual.merger", False),
    "llava_onevision": Family("vision_tower", "multi_modal_projector", True),
}


@dataclass(frozen=True)
class Workload:
    """A model and the video that it is asked about. Two of the same workload are the same, in any process.

    Attributes:
        attention: transformers' name of the attention implementation.
    """

    model_type: str
    size: Size
    frames: int
    dtype: torch.dtype
    device: str
    attention: str
    threads: int

    @property
    def side(self) -> int:
        """Pixels of a square frame as the tower sees it."""
        return _side(self.model_type, self.size)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self) | {"dtype": str(self.dtype).removeprefix("torch.")}


_TEXT: Mapping[Size, Mapping[str, int]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "cpu": {
        "hidden_size": 512,
        "intermediate_size": 2704,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "vocab_size": 8192,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
}
"""Qwen2-7B, and the same in small."""
_DEPTHS: Mapping[Size, Mapping[str, int]] = {
    "tiny": {"qwen2_5_vl": 3, "llava_onevision": 3},
    "cpu": {"qwen2_5_vl": 8, "llava_onevision": 8},
    "7b": {"qwen2_5_vl": 32, "llava_onevision": 26},
}
_SMALLER_TOWERS: Mapping[Size, Mapping[str, Mapping[str, int]]] = {
    "tiny": {
        "qwen2_5_vl": {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "window_size": 56},
        "llava_onevision": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "image_size": 84,
        },
    },
    # Heads are as wide as the released ones. At 32 frames the towers take about the shares of the time to first token
    # that they have in 7B models on a GPU: Qwen's a half, LLaVA's more than a third. Frames have few tokens, since what
    # methods take beside the decoder grows with the number of tokens over the decoder's width times its depth.
    "cpu": {
        "qwen2_5_vl": {"hidden_size": 320, "intermediate_size": 856, "num_heads": 4},
        "llava_onevision": {
            "hidden_size": 288,
            "intermediate_size": 1076,
            "num_attention_heads": 4,
            "image_size": 140,
        },
    },
    "7b": {"qwen2_5_vl": {}, "llava_onevision": {}},
}
_QWEN_TOKENS: Mapping[Size, int] = {"tiny": 4, "cpu": 7, "7b": 20}
"""Rows and columns of a frame's tokens in the Qwen-VL families, whose towers take any size."""


def build_model(workload: Workload) -> tuple[PreTrainedModel, Any]:
    """The model, made on its device, and its processor."""
    family = _architecture(workload)
    tokenizer = build_tokenizer(family, CORPUS.splitlines(), TEXT_VOCAB)
    text = {"max_position_embeddings": 131072, "tie_word_embeddings": False}
    config = build_config(workload.model_type, family, tokenizer, text)
    device = torch.device(workload.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(_WEIGHTS_SEED)
        model = AutoModelForImageTextToText.from_config(
            config, dtype=workload.dtype, attn_implementation=workload.attention
        )
    # Answers have a fixed length: nothing ends them.
    ends = end_tokens(tokenizer) | {"eos_token_id": None}
    model.generation_config.update(do_sample=False, **ends)
    return model.eval(), build_processor(family, tokenizer)


def build_request(workload: Workload, model: PreTrainedModel, processor: Any) -> dict[str, Tensor]:
    """What the processor makes of the video and the question, on the model's device."""
    frames = torch.stack(list(moving_pictures(workload.frames, workload.side, workload.side, SCENE)))
    metadata = {"fps": FPS, "frames_indices": list(range(len(frames))), "total_num_frames": len(frames)}
    return dict(prepare_inputs(processor, frames, QUESTION, metadata).to(model.device, model.dtype))


def moving_pictures(count: int, height: int, width: int, scene: int) -> Iterator[Tensor]:
    """uint8 ``[3, H, W]``: the left half stands still, the right half drifts, a square crosses both.

    Args:
        scene: pictures after which all that changes.
    """
    generator = torch.Generator().manual_seed(_VIDEO_SEED)
    square, middle = height // 4, width // 2
    for number in range(count):
        place = number % scene
        if place == 0:
            coarse = torch.rand(1, 3, 12, 24, generator=generator) * 200
            wide = torch.nn.functional.interpolate(coarse, (height, 2 * width), mode="bicubic").clamp(0, 255)
            canvas = wide[0].to(torch.uint8)
            across = int(torch.randint(height - square, (), generator=generator))
        picture = canvas[:, :, :width].clone()
        shift = width * place // (2 * scene)
        picture[:, :, middle:] = canvas[:, :, middle + shift : width + shift]
        left = (width - square) * place // scene
        picture[:, across : across + square, left : left + square] = 240
        yield picture


def _architecture(workload: Workload) -> Architecture:
    name, size = workload.model_type, workload.size
    if name not in FAMILIES:
        raise ValueError(f"unknown model type {name!r}; there are {', '.join(FAMILIES)}")
    vision = {**vision_settings(name, _DEPTHS[size][name]), **_SMALLER_TOWERS[size][name]}
    text: dict[str, Any] = dict(_TEXT[size])
    pixels = {"shortest_edge": workload.side**2, "longest_edge": workload.side**2}
    if name == "qwen2_5_vl":
        half = text["hidden_size"] // text["num_attention_heads"] // 2
        share = 3 * half // 8
        section = [half - 2 * share, share, share]
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
        layout = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "size": pixels}
        return Architecture(
            processor="Qwen2_5_VLProcessor",
            image_processor="Qwen2VLImageProcessor",
            video_processor="Qwen2VLVideoProcessor",
            **QWEN_PROMPT,
            text=text,
            vision={**vision, "out_hidden_size": text["hidden_size"], "tokens_per_second": 2},
            image_kwargs=layout,
            # at its default, and given only because transformers warns where it is not
            video_kwargs={**layout, "cap_pixels_per_frame": False},
        )
    square = {"size": {"height": workload.side, "width": workload.side}}
    select = {"vision_feature_select_strategy": "full"}
    return Architecture(
        processor="LlavaOnevisionProcessor",
        image_processor="LlavaOnevisionImageProcessor",
        video_processor="LlavaOnevisionVideoProcessor",
        **LLAVA_ONEVISION_PROMPT,
        text={"model_type": "qwen2", **text, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        vision=vision,
        top={**select, "vision_feature_layer": -1, "vision_aspect_ratio": "anyres_max_9"},
        image_kwargs=square,
        video_kwargs=square,
        processor_kwargs={**select, "num_image_tokens": (workload.side // 14) ** 2},
    )


def _side(model_type: str, size: Size) -> int:
    if model_type == "llava_onevision":
        vision = {**vision_settings(model_type, 1), **_SMALLER_TOWERS[size][model_type]}
        return int(vision["image_size"])
    return 28 * _QWEN_TOKENS[size]
