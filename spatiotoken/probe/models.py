"""The probe models: small video LLMs of released architectures that are trained on the probe's questions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from spatiotoken.probe.building import (
    LLAVA_ONEVISION_PROMPT,
    QWEN_PROMPT,
    Architecture,
    Config,
    build_config,
    build_processor,
    build_tokenizer,
    end_tokens,
)
from spatiotoken.probe.questions import COUNTS
from spatiotoken.probe.scenes import COLOURS, DIRECTIONS, LETTERS, SHAPES, SIDE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

PATCH = 8  # pixels; 8 x 8 patches of a frame become 4 x 4 tokens in both models
TEXT_VOCAB = 512
TEXT: Config = {
    "hidden_size": 192,
    "intermediate_size": 640,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}
TOWER_WIDTH, TOWER_LAYERS, TOWER_HEADS, TOWER_MLP = 128, 4, 4, 384


def _qwen2_5_vl() -> Architecture:
    layout = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": SIDE * SIDE // 4, "longest_edge": SIDE * SIDE}
    return Architecture(
        processor="Qwen2_5_VLProcessor",
        image_processor="Qwen2VLImageProcessor",
        video_processor="Qwen2VLVideoProcessor",
        **QWEN_PROMPT,
        # With the released base of 1e6 a head this small could not tell neighbouring columns: they have its lowest
        # frequencies.
        text={"rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [8, 8, 8]}},
        vision={
            "depth": TOWER_LAYERS,
            "hidden_size": TOWER_WIDTH,
            "intermediate_size": TOWER_MLP,
            "num_heads": TOWER_HEADS,
            "out_hidden_size": TEXT["hidden_size"],
            "window_size": SIDE // 2,
            "fullatt_block_indexes": [1, 2, 3],
            "tokens_per_second": 2,
            "initializer_range": 0.05,
            **{"patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2},
        },
        image_kwargs={**layout, "size": size},
        video_kwargs={**layout, "size": size, "cap_pixels_per_frame": False},
    )


def _llava_onevision() -> Architecture:
    select: Config = {"vision_feature_select_strategy": "full"}
    pinpoints = [[SIDE * height, SIDE * width] for height, width in ((1, 1), (1, 2), (2, 1), (2, 2))]
    size = {"size": {"height": SIDE, "width": SIDE}}
    return Architecture(
        processor="LlavaOnevisionProcessor",
        image_processor="LlavaOnevisionImageProcessor",
        video_processor="LlavaOnevisionVideoProcessor",
        **LLAVA_ONEVISION_PROMPT,
        text={"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        vision={
            "model_type": "siglip_vision_model",
            "hidden_size": TOWER_WIDTH,
            "intermediate_size": TOWER_MLP,
            "num_hidden_layers": TOWER_LAYERS,
            "num_attention_heads": TOWER_HEADS,
            "image_size": SIDE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        top={
            **select,
            "vision_feature_layer": -1,
            "vision_aspect_ratio": "anyres_max_9",
            "image_grid_pinpoints": pinpoints,
        },
        image_kwargs={**size, "image_grid_pinpoints": pinpoints},
        video_kwargs=size,
        processor_kwargs={**select, "num_image_tokens": (SIDE // PATCH) ** 2},
    )


_ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "qwen2_5_vl": _qwen2_5_vl,
    "llava_onevision": _llava_onevision,
}
PROBE_MODEL_TYPES: tuple[str, ...] = tuple(_ARCHITECTURES)


def probe_checkpoint(model_type: str) -> Path:
    """Directory of the trained probe model of that type, for ``from_pretrained``.

    Raises:
        ValueError: there is none of that type.
    """
    _check(model_type)
    return Path(__file__).parent / "checkpoints" / model_type


def build_untrained(model_type: str, seed: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A probe model with random weights, in float32, and its processor. The global random state is kept.

    Raises:
        ValueError: there is no probe model of that type.
    """
    from transformers import AutoModelForImageTextToText

    _check(model_type)
    architecture = _ARCHITECTURES[model_type]()
    tokenizer = build_tokenizer(architecture, _corpus(), TEXT_VOCAB)
    config = build_config(model_type, architecture, tokenizer, TEXT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config.update(do_sample=False, **end_tokens(tokenizer))
    return model, build_processor(architecture, tokenizer)


def _check(model_type: str) -> None:
    if model_type not in _ARCHITECTURES:
        raise ValueError(f"no probe model of type {model_type!r}; there are: {', '.join(PROBE_MODEL_TYPES)}")


def _corpus() -> list[str]:
    """All words that questions and answers are made of, where they stand in them."""
    names = [f"{colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES)]
    lines = ["user", "assistant", *COLOURS, *SHAPES, *DIRECTIONS, *LETTERS, *COUNTS, "above", "below"] * 2
    for name in names:
        colour, shape = name.split()
        lines += [
            f"What colour is the {shape}?",
            f"What shape is the {colour} object?",
            f"Which way does the {name} move?",
            "What colour is the object that comes first?",
            "What colour is the object that comes last?",
            f"What colour is the object that comes just after the {name}?",
            f"What colour is the object that comes just before the {name}?",
            "How many coloured objects are there in all?",
            f"Is the {name} left or right of the {name}?",
            f"Is the {name} above or below the {name}?",
            "Which letter flashes up?",
            "What colour is the small dot?",
        ]
    return lines
