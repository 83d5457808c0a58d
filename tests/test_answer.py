"""What `spatiotoken run` is made of, without the command line."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spatiotoken import load_video, patched
from spatiotoken.answer import ModelLoadError, PromptError, answer_video, load_model, prepare_inputs, video_metadata
from tests.conftest import DATA, QUESTION, Family


def test_models_are_told_the_true_times(families: dict[str, Family]) -> None:
    """Processors compute times from indices and a rate, which a varying rate would make wrong."""
    video = load_video(DATA / "flipping_a_pancake.mkv", num_frames=4)
    times = torch.tensor([0.1, 0.3, 4.0, 9.0], dtype=torch.float64)
    video = replace(video, timestamps=times, metadata=replace(video.metadata, duration=10.0))
    processor = families["qwen3_vl"].processor
    inputs = prepare_inputs(processor, video.frames, QUESTION, video_metadata(video))
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert "<0.2 seconds>" in text and "<6.5 seconds>" in text
    seconds = prepare_inputs(families["qwen2_5_vl"].processor, video.frames, QUESTION, video_metadata(video))
    assert float(seconds["second_per_grid_ts"][0]) == pytest.approx(2 * 10.0 / 4)


def test_checkpoints_with_missing_weights_are_refused(families: dict[str, Family], tmp_path: Path) -> None:
    folder = Path(families["qwen2_vl"].model.config._name_or_path)
    shutil.copytree(folder, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    lost = [name for name in weights if "layers.2." in name]
    save_file(
        {k: v for k, v in weights.items() if k not in lost}, tmp_path / "broken" / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelLoadError, match=f"lacks {len(lost)} weights"):
        load_model(tmp_path / "broken")


@pytest.mark.parametrize(
    ("file", "text"),
    [("config.json", '{"model_type": "qwen2_vl", "text_config": {"hidden_size": "abc"}}'), ("tokenizer.json", "{}")],
)
def test_damaged_folders_are_refused(families: dict[str, Family], tmp_path: Path, file: str, text: str) -> None:
    shutil.copytree(families["qwen2_vl"].model.config._name_or_path, tmp_path / "broken")
    (tmp_path / "broken" / file).write_text(text)
    with pytest.raises(ModelLoadError, match="cannot load model .*broken") as error:
        load_model(tmp_path / "broken")
    assert "\n" not in str(error.value)


def test_placeholders_in_the_question_are_refused(families: dict[str, Family]) -> None:
    family = families["qwen2_vl"]
    video = load_video(DATA / "video_90.mov")
    with patched(family.model, "dense"), pytest.raises(PromptError, match="refuses this prompt"):
        answer_video(family.model, family.processor, video, "What is <|video_pad|>?")
