"""Tiny, randomly initialised video LLMs with their real processors.

They have the structural features of the released models (M-RoPE, grouped-query attention, windowed vision attention,
deepstack, anyres images, a CLS token, timestamps as text) in about a megabyte, so that the plugin can be tested and
benchmarked where no model hub can be reached. `transformers` is imported only when a model is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spatiotoken.probe.building import (
    LLAVA_ONEVISION_PROMPT,
    QWEN_PROMPT,
    VICUNA,
    Architecture,
    Config,
    build_config,
    build_processor,
    build_tokenizer,
    end_tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

HEADS, KV_HEADS = 4, 2  # grouped-query attention, like the released checkpoints
VISION_HIDDEN, VISION_LAYERS, VISION_HEADS = 32, 3, 2
PATCH, QWEN3_PATCH = 14, 16
LLAVA_IMAGE = 6 * PATCH  # 6x6 patches, pooled to 3x3 tokens for each video frame
LLAVA_PINPOINTS = [[LLAVA_IMAGE * h, LLAVA_IMAGE * w] for h, w in ((1, 1), (1, 2), (2, 1), (2, 2))]
QWEN_MIN_TOKENS, QWEN_MAX_TOKENS = 4, 40  # merged tokens of one image, or of one temporal patch of a video
QWEN3_BUDGET_FRAMES = 16  # Qwen3-VL's pixel budget is for the whole video, the others' is for each frame
TEXT_VOCAB = 512
# Weights have a standard deviation of GAIN / sqrt(fan in) at any hidden size. More than 1 makes attention peaked, so
# that the few tokens a query attends to, and with them the pixels, matter to the answer.
GAIN = 2.0

CORPUS = """\
A man walks across the street while a red car waits at the light. The dog runs after the ball and catches it.
What is happening in this video? Describe the scene in detail, and say what the person does after the door opens.
First the woman cuts the onion, then she puts it in the pan. How many people are there in the room? There are three.
The camera moves slowly from left to right over the water. Which object is on the table before the cup falls down?
At <0.5 seconds> the blue square moves to the corner; at <12.0 seconds> it stops. Answer with one word: yes or no.
The ball is thrown up, it comes back down, and the children laugh. Is the second clip longer than the first one?
"""

# -------------------------------------------------------------------------------------------------------- the families


def _qwen(name: str, video_name: str, patch: int, budget_frames: int, *, text: Config, vision: Config) -> Architecture:
    layout = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    token_pixels = (2 * patch) ** 2

    def pixels(frames: int) -> Config:
        return {
            "shortest_edge": QWEN_MIN_TOKENS * token_pixels * frames,
            "longest_edge": QWEN_MAX_TOKENS * token_pixels * frames,
        }

    return Architecture(
        processor=f"{name}Processor",
        image_processor="Qwen2VLImageProcessor",
        video_processor=f"{video_name}VideoProcessor",
        **QWEN_PROMPT,
        text=text,
        vision={
            "depth": VISION_LAYERS,
            "num_heads": VISION_HEADS,
            "patch_size": patch,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **vision,
        },
        image_kwargs={**layout, "size": pixels(1)},
        # `cap_pixels_per_frame` is at its default, and given only because these versions warn where it is not
        video_kwargs={**layout, "size": pixels(budget_frames), "cap_pixels_per_frame": False},
    )


def _mrope(hidden: int, side: float, **extra: Any) -> Config:
    """M-RoPE whose height and width each have `side` of the frequencies, as in the family's released models."""
    half = hidden // HEADS // 2
    share = int(half * side)
    section = [half - 2 * share, share, share]
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section, **extra}}


def _qwen2_vl(hidden: int) -> Architecture:
    vision = {"embed_dim": VISION_HIDDEN, "hidden_size": hidden, "mlp_ratio": 2}
    return _qwen("Qwen2VL", "Qwen2VL", PATCH, 1, text=_mrope(hidden, 3 / 8), vision=vision)


def _qwen2_5_vl(hidden: int) -> Architecture:
    vision = {
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": 2 * VISION_HIDDEN,
        "out_hidden_size": hidden,
        "window_size": 4 * PATCH,  # 2x2 merged tokens: less than a frame, so that the windows matter
        "fullatt_block_indexes": [VISION_LAYERS - 1],
        "tokens_per_second": 4,
    }
    return _qwen("Qwen2_5_VL", "Qwen2VL", PATCH, 1, text=_mrope(hidden, 3 / 8), vision=vision)


def _qwen3_vl(hidden: int) -> Architecture:
    vision = {
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": 2 * VISION_HIDDEN,
        "out_hidden_size": hidden,
        "num_position_embeddings": 6 * 6,  # not the grid of a frame, so that they are interpolated
        "deepstack_visual_indexes": [0, 1],
    }
    text = {**_mrope(hidden, 5 / 16, mrope_interleaved=True), "head_dim": hidden // HEADS}
    return _qwen("Qwen3VL", "Qwen3VL", QWEN3_PATCH, QWEN3_BUDGET_FRAMES, text=text, vision=vision)


def _llava(
    name: str, image_name: str, tower: str, *, text: Config, top: Config, size: Config, **others: Any
) -> Architecture:
    return Architecture(
        processor=f"{name}Processor",
        image_processor=f"{image_name}ImageProcessor",
        video_processor=f"{name}VideoProcessor",
        text=text,
        vision=_clip(tower),
        top={**top, "image_grid_pinpoints": LLAVA_PINPOINTS},
        image_kwargs={**size, "image_grid_pinpoints": LLAVA_PINPOINTS},
        video_kwargs=size,
        **others,
    )


def _llava_onevision(hidden: int) -> Architecture:
    select: Config = {"vision_feature_select_strategy": "full"}
    return _llava(
        "LlavaOnevision",
        "LlavaOnevision",
        "siglip_vision_model",
        **LLAVA_ONEVISION_PROMPT,
        text={"model_type": "qwen2"},
        top={**select, "vision_feature_layer": -1, "vision_aspect_ratio": "anyres_max_9"},
        size={"size": {"height": LLAVA_IMAGE, "width": LLAVA_IMAGE}},
        processor_kwargs={**select, "num_image_tokens": (LLAVA_IMAGE // PATCH) ** 2},
    )


def _llava_next_video(hidden: int) -> Architecture:
    select: Config = {"vision_feature_select_strategy": "default"}  # drops the CLS token
    return _llava(
        "LlavaNextVideo",
        "LlavaNext",
        "clip_vision_model",
        image_token="<image>",
        video_token="<video>",
        eos_token="</s>",
        pad_token="<pad>",
        chat={**VICUNA, "IMAGE": r"'<image>\n'", "VIDEO": r"'<video>\n'"},
        text={"model_type": "llama"},
        top={**select, "vision_feature_layer": -2, "spatial_pool_mode": "average", "spatial_pool_stride": 2},
        size={"size": {"shortest_edge": LLAVA_IMAGE}, "crop_size": {"height": LLAVA_IMAGE, "width": LLAVA_IMAGE}},
        processor_kwargs={**select, "patch_size": PATCH, "num_additional_image_tokens": 1},
    )


def _llava_1_5(hidden: int) -> Architecture:
    side = {"height": LLAVA_IMAGE, "width": LLAVA_IMAGE}
    select: Config = {"vision_feature_select_strategy": "default"}  # drops the CLS token
    return Architecture(
        processor="LlavaProcessor",
        image_processor="CLIPImageProcessor",
        video_processor=None,
        image_token="<image>",
        video_token=None,
        eos_token="</s>",
        pad_token="<pad>",
        chat={**VICUNA, "IMAGE": r"'<image>\n'", "VIDEO": "''"},
        text={"model_type": "llama"},
        vision=_clip("clip_vision_model"),
        top={**select, "vision_feature_layer": -2, "image_seq_length": (LLAVA_IMAGE // PATCH) ** 2},
        image_kwargs={"size": {"shortest_edge": LLAVA_IMAGE}, "crop_size": side},
        processor_kwargs={**select, "patch_size": PATCH, "num_additional_image_tokens": 1},
    )


def _clip(tower: str) -> Config:
    return {
        "model_type": tower,
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": 2 * VISION_HIDDEN,
        "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": VISION_HEADS,
        "image_size": LLAVA_IMAGE,
        "patch_size": PATCH,
    }


_FAMILIES: dict[str, Callable[[int], Architecture]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "llava_onevision": _llava_onevision,
    "llava_next_video": _llava_next_video,
    "llava": _llava_1_5,
}
TINY_IMAGE_MODEL_TYPES: tuple[str, ...] = ("llava",)
"""Families that take images only."""
TINY_MODEL_TYPES: tuple[str, ...] = tuple(name for name in _FAMILIES if name not in TINY_IMAGE_MODEL_TYPES)


# ---------------------------------------------------------------------------------------------------------- the builder


def build_tiny(
    model_type: str, directory: str | Path, *, seed: int = 0, hidden_size: int = 64, num_layers: int = 4
) -> Path:
    """Save a tiny model of that type and its processor in `directory`, for `AutoProcessor` and
    `AutoModelForImageTextToText` to load. The same seed gives the same weights; the global random state is kept.

    A greedy answer has no special tokens, so its length is always `max_new_tokens`.
    """
    if model_type not in _FAMILIES:
        raise ValueError(f"unknown model type {model_type!r}; supported: {', '.join(_FAMILIES)}")
    if hidden_size % (16 * HEADS):
        raise ValueError(f"hidden_size must be a multiple of {16 * HEADS} (M-RoPE sections), got {hidden_size}")
    family = _FAMILIES[model_type](hidden_size)
    tokenizer = build_tokenizer(family, CORPUS.splitlines(), TEXT_VOCAB)
    processor = build_processor(family, tokenizer)
    model = _build_model(model_type, family, tokenizer, seed, hidden_size, num_layers)
    directory = Path(directory)
    processor.save_pretrained(directory)
    model.save_pretrained(directory)
    return directory


def _build_model(
    model_type: str,
    family: Architecture,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    hidden_size: int,
    num_layers: int,
) -> PreTrainedModel:
    from transformers import AutoModelForImageTextToText

    text = {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }
    config = build_config(model_type, family, tokenizer, text)
    with torch.random.fork_rng(devices=[]):  # constructors draw weights, which are all replaced below
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    vocab = tokenizer.get_vocab()
    _draw_weights(model, seed, unspoken=[vocab[token] for token in family.special_tokens])
    model.generation_config.update(do_sample=False, **end_tokens(tokenizer))
    return model


@torch.no_grad()
def _draw_weights(model: PreTrainedModel, seed: int, unspoken: list[int]) -> None:
    """Draw all weights by the parameters' names and shapes, so that they depend on neither the `transformers` version
    nor a family's own scheme, most of which give nearly the same answer to every input at this size."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim >= 2:
            is_table = "embed" in name and "patch_embed" not in name  # rows are looked up, so there is no fan in
            std = 1.0 if is_table else GAIN / math.sqrt(parameter[0].numel())
            parameter.normal_(std=std, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1, generator=generator)
        elif "norm" not in name.lower() and "ln" not in name:  # e.g. image_newline, class_embedding
            parameter.normal_(generator=generator)
    # Never the largest logit: a model that answered with placeholders would break its own next turn.
    model.get_output_embeddings().weight[unspoken] = 0.0
