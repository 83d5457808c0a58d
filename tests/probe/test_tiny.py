"""The tiny models load like released ones and answer to what they are shown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from spatiotoken.probe import TINY_MODEL_TYPES, build_tiny

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
NEW_TOKENS = 8


def moving_block(seed: int = 0, frames: int = 16, height: int = 240, width: int = 426) -> Tensor:
    """uint8 [T, 3, H, W]: a bright block crosses a background of random tiles."""
    tiles = torch.randint(0, 120, (3, 12, 22), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    background = tiles.repeat_interleave(20, 1).repeat_interleave(20, 2)[:, :height, :width]
    video = background.repeat(frames, 1, 1, 1)
    for t, frame in enumerate(video):
        left = (80 * seed + 15 * t) % (width - 60)
        frame[:, 60:120, left : left + 60] = torch.tensor([250, 200, 30], dtype=torch.uint8)[:, None, None]
    return video


def metadata(video: Tensor, step: int = 6) -> dict[str, Any]:
    frames = len(video)
    return {"fps": 24.0, "frames_indices": [step * i for i in range(frames)], "total_num_frames": step * frames}


def prompt(processor: Any, *parts: str, question: str = "What is happening in this video?") -> str:
    content = [{"type": part} for part in parts] + [{"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def video_inputs(processor: Any, *videos: Tensor) -> Any:
    return processor(
        text=[prompt(processor, "video")] * len(videos),
        videos=list(videos),
        video_metadata=[metadata(video) for video in videos],
        do_sample_frames=False,
        padding=True,
        return_tensors="pt",
    )


def answer(model: Any, inputs: Any) -> Tensor:
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
    return output[:, inputs["input_ids"].shape[1] :]


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {model_type: build_tiny(model_type, root / model_type) for model_type in TINY_MODEL_TYPES}


@pytest.fixture(scope="session")
def loaded(directories: dict[str, Path]) -> dict[str, tuple[Any, Any]]:
    return {
        model_type: (AutoProcessor.from_pretrained(path), AutoModelForImageTextToText.from_pretrained(path).eval())
        for model_type, path in directories.items()
    }


@pytest.fixture(params=TINY_MODEL_TYPES)
def model_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def processor(loaded: dict[str, tuple[Any, Any]], model_type: str) -> Any:
    return loaded[model_type][0]


@pytest.fixture
def model(loaded: dict[str, tuple[Any, Any]], model_type: str) -> Any:
    return loaded[model_type][1]


def test_loaded_classes_are_the_familys_own(model_type: str, processor: Any, model: Any) -> None:
    assert model.config.model_type == model_type
    assert type(model).__name__.endswith("ForConditionalGeneration")
    family = type(model).__name__.removesuffix("ForConditionalGeneration")
    assert type(processor).__name__ == f"{family}Processor"
    text = model.config.get_text_config()
    assert text.num_attention_heads == 2 * text.num_key_value_heads
    assert len(model.model.language_model.layers) == 4
    assert model.config.image_token_id == processor.image_token_id
    assert model.config.video_token_id == processor.video_token_id


def test_tokenizer_round_trips_any_text(processor: Any) -> None:
    tokenizer = processor.tokenizer
    for text in ("What is the man doing?", "h\u00e9llo  \u4e16\u754c \U0001f600\n\t<b> a 's .", " \u0000e\u0301"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id is not None and tokenizer.eos_token_id is not None


def test_answers_depend_on_the_video(processor: Any, model: Any) -> None:
    answers = set()
    logits = []
    for seed in range(3):
        inputs = video_inputs(processor, moving_block(seed))
        tokens = answer(model, inputs)
        assert tokens.shape == (1, NEW_TOKENS)
        assert len(set(tokens[0].tolist())) > 1
        answers.add(tuple(tokens[0].tolist()))
        with torch.no_grad():
            logits.append(model(**inputs).logits[0, -1])
    assert len(answers) == 3
    assert (logits[0] - logits[1]).abs().max() > 0.5
    assert torch.isfinite(torch.stack(logits)).all()


def test_video_token_counts(model_type: str, processor: Any) -> None:
    inputs = video_inputs(processor, moving_block())
    count = int((inputs["input_ids"] == processor.video_token_id).sum())
    if model_type in QWEN:
        assert inputs["video_grid_thw"].tolist() == [[8, 8, 16]]
        assert count == 8 * 4 * 8
    else:
        assert inputs["pixel_values_videos"].shape == (1, 16, 3, 84, 84)
        assert count == 16 * 9 + (model_type == "llava_onevision")  # the newline token


def test_image_and_video(processor: Any, model: Any) -> None:
    video = moving_block()
    inputs = processor(
        text=[prompt(processor, "image", "video")],
        images=[moving_block(5, frames=1)[0]],
        videos=[video],
        video_metadata=[metadata(video)],
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert (inputs["input_ids"] == processor.image_token_id).sum() > 4
    assert answer(model, inputs).shape == (1, NEW_TOKENS)


def test_text_only(processor: Any, model: Any) -> None:
    inputs = processor(text=[prompt(processor)], return_tensors="pt")
    assert answer(model, inputs).shape == (1, NEW_TOKENS)


def test_answers_have_no_special_tokens(processor: Any, model: Any) -> None:
    inputs = video_inputs(processor, moving_block(3))
    output = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
    assert len(output) == 64
    assert not set(output.tolist()) & set(processor.tokenizer.all_special_ids)
    assert not {processor.image_token_id, processor.video_token_id} & set(output.tolist())


def test_padded_batch_answers_like_single_samples(model_type: str, processor: Any, model: Any) -> None:
    # LLaVA stacks the frames of all videos into one tensor, so there the videos must have the same length.
    videos = [moving_block(0), moving_block(1, frames=8 if model_type in QWEN else 16)]
    batch = answer(model, video_inputs(processor, *videos))
    for row, video in zip(batch, videos, strict=True):
        assert row.tolist() == answer(model, video_inputs(processor, video))[0].tolist()


def test_chat_template_tokenizes_messages(processor: Any) -> None:
    video = moving_block()
    text = {"type": "text", "text": "What is happening in this video?"}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video", "video": video}, text]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"video_metadata": [metadata(video)], "do_sample_frames": False},
    )
    expected = video_inputs(processor, video)
    assert inputs.keys() == expected.keys()
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()


def test_qwen3_writes_timestamps(loaded: dict[str, tuple[Any, Any]]) -> None:
    processor, _ = loaded["qwen3_vl"]
    text = processor.tokenizer.decode(video_inputs(processor, moving_block())["input_ids"][0])
    assert "<0.1 seconds>" in text and "<3.6 seconds>" in text


def weights(path: Path) -> dict[str, Tensor]:
    return AutoModelForImageTextToText.from_pretrained(path).state_dict()


def test_seed_decides_the_weights(model_type: str, directories: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    same = build_tiny(model_type, tmp_path / "same")
    other = build_tiny(model_type, tmp_path / "other", seed=1)
    assert torch.equal(before, torch.get_rng_state())

    first = weights(directories[model_type])
    again, different = weights(same), weights(other)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    matrices = [name for name in first if first[name].ndim >= 2]
    assert not any(torch.equal(first[name], different[name]) for name in matrices)


def test_other_sizes(model_type: str, tmp_path: Path) -> None:
    path = build_tiny(model_type, tmp_path, hidden_size=128, num_layers=2)
    processor, model = AutoProcessor.from_pretrained(path), AutoModelForImageTextToText.from_pretrained(path)
    assert len(model.model.language_model.layers) == 2
    assert model.config.get_text_config().hidden_size == 128
    assert answer(model, video_inputs(processor, moving_block())).shape == (1, NEW_TOKENS)


def test_unknown_type_names_the_supported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nonsense.*qwen3_vl"):
        build_tiny("nonsense", tmp_path)
    with pytest.raises(ValueError, match="hidden_size"):
        build_tiny("qwen2_vl", tmp_path, hidden_size=50)


def test_import_is_light() -> None:
    code = "import sys, spatiotoken.probe; print([m for m in sys.modules if m.startswith('transformers')])"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert result.stdout.strip() == "[]"
