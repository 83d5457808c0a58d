"""Tiny random models of the scorers' families, with their real processors, in directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

SIDE, PATCH, WIDTH = 32, 8, 16
TEXT_LENGTH = {"clip": 24, "siglip2": 20, "naflex": 20}
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
QUESTIONS = ("where is the red ball", "who wears green shoes", "is the blue car parked")
COLOURS = ((220, 30, 30), (20, 200, 40), (30, 40, 230))
KINDS = {"clip": "clip", "siglip2": "siglip2", "naflex": "siglip2", "dinov2": "dinov2", "registers": "dinov2"}
"""Kind of scorer that each of the tiny models is for."""


def pictures(count: int = 5, height: int = 40, width: int = 56, seed: int = 0) -> Tensor:
    """Smooth random frames, all different."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 5, generator=generator) * 255
    return nn.functional.interpolate(coarse, size=(height, width), mode="bilinear").to(torch.uint8)


def coloured(height: int = 40, width: int = 56) -> Tensor:
    """A frame for each question, of the colour that it asks for."""
    return torch.tensor(COLOURS, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, height, width).contiguous()


def build_scorer_model(name: str, directory: Path) -> Path:
    """Save a tiny model and its processor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = {"dinov2": _dinov2, "registers": _registers, "clip": _clip}.get(name, _siglip)(name)
    with torch.no_grad():
        for parameter in model.parameters():  # the released initialisations make all frames nearly alike
            if parameter.ndim >= 2:
                parameter.mul_(3)
    processor.save_pretrained(directory)
    model.save_pretrained(directory)
    return directory


def _dinov2(name: str) -> tuple[Any, Any]:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(**_vision(), mlp_ratio=2)), _dinov2_pictures()


def _registers(name: str) -> tuple[Any, Any]:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(**_vision(), mlp_ratio=2, num_register_tokens=3)
    return Dinov2WithRegistersModel(config), _dinov2_pictures()


def _dinov2_pictures() -> Any:
    from transformers import BitImageProcessor

    return BitImageProcessor(size={"shortest_edge": SIDE + PATCH}, crop_size={"height": SIDE, "width": SIDE})


def _vision() -> dict[str, Any]:
    return {**TOWER, "image_size": SIDE, "patch_size": PATCH}


def _alphabet(*special: str, ending: str = "") -> dict[str, int]:
    """One token for each character, and those that end a word."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("?!.▁Ġ")
    tokens = [*special, *letters, *(letter + ending for letter in letters if ending)]
    return {token: index for index, token in enumerate(tokens)}


def _clip(name: str) -> tuple[Any, Any]:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    vocab = _alphabet("<|startoftext|>", "<|endoftext|>", ending="</w>")
    text = {**TOWER, "vocab_size": len(vocab), "max_position_embeddings": TEXT_LENGTH[name]}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config=_vision(), projection_dim=12)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    return CLIPModel(config), CLIPProcessor(CLIPImageProcessor(**size), CLIPTokenizer(vocab=vocab, merges=[]))


def _siglip(name: str) -> tuple[Any, Any]:
    import transformers
    from transformers import GemmaTokenizer

    vocab = _alphabet("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    # As the released checkpoints have it: no lower case by itself, and an end but no beginning.
    tokenizer = GemmaTokenizer(vocab=vocab, merges=[], add_bos_token=False, add_eos_token=True, padding_side="right")
    text = {**TOWER, "vocab_size": len(vocab), "max_position_embeddings": TEXT_LENGTH[name], "projection_size": WIDTH}
    text |= {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    if name == "siglip2":
        config = transformers.SiglipConfig(text_config=text, vision_config=_vision())
        pictures = transformers.SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
        return transformers.SiglipModel(config), transformers.SiglipProcessor(pictures, tokenizer)
    vision = {**TOWER, "patch_size": PATCH, "num_patches": (SIDE // PATCH) ** 2}
    config = transformers.Siglip2Config(text_config=text, vision_config=vision)
    pictures = transformers.Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=(SIDE // PATCH) ** 2)
    return transformers.Siglip2Model(config), transformers.Siglip2Processor(pictures, tokenizer)


@pytest.fixture(scope="session")
def scorer_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of the tiny models, by the names in ``KINDS``."""
    root = tmp_path_factory.mktemp("tiny-scorers")
    return {name: build_scorer_model(name, root / name) for name in KINDS}
