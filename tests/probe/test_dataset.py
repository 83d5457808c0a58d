"""Probe videos as examples, as a Hugging Face dataset and as files are the same videos."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from spatiotoken import load_video
from spatiotoken.probe.dataset import (
    SPLITS,
    Example,
    examples,
    probe_dataset,
    scene_seed,
    write_video,
    write_videos,
)
from spatiotoken.probe.render import render
from spatiotoken.probe.scenes import FAMILIES, FPS, SIDE, sample_scenes


def drawn(boxes: list[dict[str, int]], num_frames: int) -> Tensor:
    """``[T, 64, 64]`` bool: the pixels in those boxes."""
    picture = torch.zeros(num_frames, SIDE, SIDE, dtype=torch.bool)
    for box in boxes:
        picture[box["frame"], box["top"] : box["bottom"], box["left"] : box["right"]] = True
    return picture


def shown(example: Example) -> Tensor:
    """The same of an example's evidence."""
    picture = torch.zeros(len(example.frames), SIDE, SIDE, dtype=torch.bool)
    for thing in example.evidence.tolist():
        for frame, (top, left, bottom, right) in zip(picture, thing, strict=True):
            frame[top:bottom, left:right] = True
    return picture


def check_description(found: dict[str, Any], example: Example) -> None:
    for name in ("sample", "family", "question", "answer"):
        assert found[name] == getattr(example, name)
    assert tuple(found["options"]) == example.options
    assert found["fps"] == FPS
    assert torch.equal(drawn(found["evidence"], len(example.frames)), shown(example))
    assert len(found["evidence"]) == example.evidence.any(dim=-1).sum()


def test_splits_share_no_seed() -> None:
    seeds = [scene_seed(seed, split) for seed in range(-5, 20) for split in SPLITS]
    assert len(set(seeds)) == len(seeds)
    assert [scene_seed(0, split) for split in SPLITS] == [0, 1, 2]  # training on seed 0 takes scene seed 0


def test_splits_share_no_video() -> None:
    videos = [example.frames for split in SPLITS for example in examples(split, 21, num_frames=8)]
    assert len({video.numpy().tobytes() for video in videos}) == 63


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_examples_are_the_scenes_whatever_the_batch(batch: int) -> None:
    found = list(examples("test", 9, seed=3, num_frames=8, batch=batch))
    scenes = sample_scenes(11, torch.arange(9), num_frames=8)
    assert torch.equal(torch.stack([example.frames for example in found]), render(scenes))
    assert [example.sample for example in found] == list(range(9))
    assert [example.family for example in found] == [*FAMILIES, *FAMILIES[:2]]
    assert all(example.answer in example.options for example in found)
    assert all(example.evidence.shape[1:] == (8, 4) for example in found)


def test_examples_are_made_as_they_are_taken() -> None:
    first = next(iter(examples("train", 10**12, num_frames=8, families=["needle"], batch=2)))
    assert first.frames.untyped_storage().nbytes() == first.frames.numel()


def test_families_take_turns() -> None:
    found = list(examples("validation", 36, num_frames=8, families=["detail", "order", "motion"]))
    assert [example.family for example in found[:4]] == ["motion", "order", "detail", "motion"]
    assert set(Counter(example.family for example in found).values()) == {12}
    assert Counter(example.answer for example in found if example.family == "detail").keys() == set(found[2].options)
    unrestricted = {example.sample: example for example in examples("validation", 84, num_frames=8)}
    for example in found:
        same = unrestricted[example.sample]
        assert same.question == example.question and torch.equal(same.frames, example.frames)


def test_dataset_has_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    # More rows than are converted at a time.
    table = probe_dataset("test", 70, seed=1, num_frames=8)
    assert table.column_names == ["sample", "family", "question", "answer", "options", "fps", "evidence", "video"]
    assert len(table) == 70 and table.split == "test"
    assert table.features["video"] == datasets.Array4D((8, 3, SIDE, SIDE), "uint8")
    assert table.cache_files == [] and not any(tmp_path.iterdir())
    for row, example in enumerate(examples("test", 70, seed=1, num_frames=8)):
        if row in (0, 1, 5, 63, 64, 69):
            check_description(table[row], example)
            assert torch.equal(torch.tensor(table[row]["video"], dtype=torch.uint8), example.frames)


def test_dataset_follows_its_arguments() -> None:
    tables = [
        probe_dataset("test", 3, num_frames=8),
        probe_dataset("train", 3, num_frames=8),
        probe_dataset("test", 3, num_frames=8, seed=1),
        probe_dataset("test", 3, num_frames=9),
        probe_dataset("test", 3, num_frames=8, families=["needle"]),
    ]
    assert len({json.dumps(table[2]["video"]) for table in tables}) == len(tables)
    assert set(tables[-1]["family"]) == {"needle"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``questions.jsonl`` of a few videos on disk."""
    folder = tmp_path_factory.mktemp("videos") / "new" / "folder"
    return write_videos(folder, "test", 4, num_frames=12, families=["attribute", "needle", "detail"])


def test_files_hold_the_videos(written: Path) -> None:
    lines = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    made = list(examples("test", 4, num_frames=12, families=["attribute", "needle", "detail"]))
    assert written.name == "questions.jsonl"
    assert [line["file"] for line in lines] == ["000000.mp4", "000005.mp4", "000006.mp4", "000007.mp4"]
    assert {path.name for path in written.parent.iterdir()} == {line["file"] for line in lines} | {written.name}
    for line, example in zip(lines, made, strict=True):
        check_description(line, example)
        assert line["side"] == SIDE
        video = load_video(written.parent / line["file"], backend="pyav")
        assert video.frames.shape == (12, 3, 4 * SIDE, 4 * SIDE)
        assert torch.allclose(video.timestamps, torch.arange(12, dtype=torch.float64) / FPS)
        assert (video.metadata.fps, video.metadata.codec) == (FPS, "h264")
        error = functional.avg_pool2d(video.frames.float(), 4) - example.frames.float()
        assert error.abs().mean(dim=(1, 2, 3)).max() < 3
        assert error.abs().max() < 32  # a colour or letter is not lost


def test_files_are_the_same_each_time(written: Path, tmp_path: Path) -> None:
    again = write_videos(tmp_path, "test", 4, num_frames=12, families=["attribute", "needle", "detail"])
    for path in written.parent.iterdir():
        assert (
            hashlib.sha256(path.read_bytes()).digest()
            == hashlib.sha256((again.parent / path.name).read_bytes()).digest()
        )


def test_interrupted_writing_leaves_no_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_short(*args: Any, **kwargs: Any) -> Any:
        yield from islice(examples(*args, **kwargs), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr("spatiotoken.probe.dataset.examples", cut_short)
    with pytest.raises(KeyboardInterrupt):
        write_videos(tmp_path, "test", 4, num_frames=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.mp4", "000001.mp4"]
    with pytest.raises(FileExistsError, match="is not empty"):
        write_videos(tmp_path, "test", 4, num_frames=8)


@pytest.mark.parametrize(
    ("split", "size", "change", "message"),
    [
        ("dev", 1, {}, "unknown split 'dev'; known are train, validation, test"),
        ("test", 0, {}, "size and batch must be at least 1, got 0"),
        ("test", 1, {"num_frames": 7}, "at least 8 frames, got 7"),
        ("test", 1, {"families": ["needle", "colour"]}, "some of attribute, .*, detail, got colour"),
        ("test", 1, {"families": []}, "got none"),
    ],
)
def test_wrong_arguments_are_refused_at_once(
    split: str, size: int, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        examples(split, size, **change)
    with pytest.raises(ValueError, match=message):
        probe_dataset(split, size, **change)
    with pytest.raises(ValueError, match=message):
        write_videos(tmp_path / "new", split, size, **change)
    assert not (tmp_path / "new").exists()


def test_a_wrong_batch_or_scale_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 1 and 0"):
        examples("test", 1, batch=0)
    with pytest.raises(ValueError, match="scale must be at least 1, got 0"):
        write_videos(tmp_path / "new", "test", 1, scale=0)
    assert not (tmp_path / "new").exists()


def test_files_go_to_an_empty_directory_only(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="is not empty; videos are written to a new or empty directory only"):
        write_videos(tmp_path, "test", 1)
    with pytest.raises(FileExistsError):
        write_videos(tmp_path / "mine.txt", "test", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_one_video_of_any_size_and_rate(tmp_path: Path) -> None:
    ramp = torch.arange(0, 250, 10, dtype=torch.uint8)[:24].view(1, 1, 1, 24).expand(5, 3, 10, 24)
    write_video(tmp_path / "clip.mp4", ramp, fps=30000 / 1001, scale=1)
    video = load_video(tmp_path / "clip.mp4", backend="pyav")
    assert video.frames.shape == ramp.shape and video.metadata.fps == pytest.approx(30000 / 1001)
    assert (video.frames.int() - ramp.int()).abs().max() < 6
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].average_rate * 1001 == 30000


@pytest.mark.parametrize(
    ("frames", "fps", "scale", "message"),
    [
        (torch.zeros(2, 3, 8, 8), 4.0, 1, "uint8"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), 4.0, 1, r"\[2, 8, 8, 3\]"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), 4.0, 1, r"\[0, 3, 8, 8\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 0.0, 1, "fps must be positive"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 4.0, 0, "scale must be at least 1"),
        (torch.zeros(2, 3, 8, 7, dtype=torch.uint8), 4.0, 3, "odd"),
    ],
)
def test_what_cannot_be_a_video_is_refused(
    frames: Tensor, fps: float, scale: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "clip.mp4", frames, fps, scale)
    assert not (tmp_path / "clip.mp4").exists()


def test_passing_over_examples() -> None:
    for families in (None, ("motion", "needle")):
        whole = list(examples("test", 9, families=families))
        (ninth,) = examples("test", 1, first=8, families=families)
        assert ninth.sample == whole[8].sample and torch.equal(ninth.frames, whole[8].frames)
    with pytest.raises(ValueError, match="first"):
        examples("test", 1, first=-1)
