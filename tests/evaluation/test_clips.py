"""Frames of files, of parts of them and of directories of frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spatiotoken import load_video
from spatiotoken.config import load_config
from spatiotoken.evaluation.base import Question
from spatiotoken.evaluation.clips import read_clip, select_clip, spread_over
from spatiotoken.video import VideoReadError, probe_video
from tests.conftest import DATA

NASA = DATA / "nasa_13013_rotated.mp4"


def question(video: Path, **about: object) -> Question:
    return Question("1", video, "What?", "A", **about)  # type: ignore[arg-type]


@pytest.mark.parametrize("frames", [1, 2, 3, 7, 8, 32, 100])
@pytest.mark.parametrize("length", [1, 2, 5, 8, 97])
def test_frames_are_those_of_numpy(frames: int, length: int) -> None:
    """As lmms-eval takes them, where there are as many."""
    found = spread_over(frames, 3, 3 + length - 1)
    assert found == (3 + np.linspace(0, length - 1, min(frames, length)).round().astype(int)).tolist()
    assert len(set(found)) == len(found) == min(frames, length)


def test_whole_file() -> None:
    about = probe_video(NASA)
    clip = read_clip(question(NASA), 5)
    assert clip.indices == tuple(spread_over(5, 0, about.num_frames - 1)) and clip.indices[-1] == about.num_frames - 1
    assert torch.equal(clip.frames, load_video(NASA, indices=clip.indices).frames)
    assert clip.duration == about.duration and list(clip.seconds) == sorted(clip.seconds)
    metadata = clip.metadata()
    assert metadata["fps"] == 1000 and metadata["frames_indices"] == [round(1000 * second) for second in clip.seconds]


def test_part_of_a_file() -> None:
    """Times are those of the whole video."""
    about = probe_video(NASA)
    clip = read_clip(question(NASA, span=(0.12, 0.42)), 4)
    assert clip.indices == (3, 6, 9, 12), "on screen at 0.12 and at 0.42 seconds"
    assert clip.seconds[0] == pytest.approx(0.1, abs=1e-3)
    assert read_clip(question(NASA, span=(0.2, 1e6)), 4).indices[-1] == about.num_frames - 1
    with pytest.raises(VideoReadError, match=r"1000000\.0 to 1000001\.0 seconds are no part of it"):
        read_clip(question(NASA, span=(1e6, 1e6 + 1)), 4)


def test_directory_of_frames(tmp_path: Path) -> None:
    for number in range(12):
        Image.fromarray(np.full((6, 8, 3), 10 * number, np.uint8)).save(tmp_path / f"frame_{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    clip = read_clip(question(tmp_path, fps=4.0), 4)
    assert clip.frames.shape == (4, 3, 6, 8) and clip.duration == 3.0
    assert clip.frames[:, 0, 0, 0].tolist() == [0, 40, 70, 110], "in the order of their numbers, not of their names"
    assert clip.indices == (0, 4, 7, 11) and clip.seconds == (0.0, 1.0, 1.75, 2.75)
    part = read_clip(question(tmp_path, fps=4.0, span=(1.0, 2.0)), 9)
    assert part.indices == (4, 5, 6, 7, 8)
    (tmp_path / "frame_4.png").write_bytes(b"no picture")
    with pytest.raises(VideoReadError, match=r"frame_4\.png"):
        read_clip(question(tmp_path), 4)
    Image.new("RGB", (8, 9)).save(tmp_path / "frame_4.png")
    with pytest.raises(VideoReadError, match="another size"):
        read_clip(question(tmp_path), 4)


def test_bad_videos(tmp_path: Path) -> None:
    with pytest.raises(VideoReadError, match="there are no pictures"):
        read_clip(question(tmp_path), 4)
    for bad in (DATA / "corrupted.mp4", tmp_path / "missing.mp4"):
        with pytest.raises(VideoReadError, match=bad.name):
            read_clip(question(bad), 4)


def test_frames_that_a_method_chooses() -> None:
    selector = load_config("kmeans", **{"frames.num_frames": 3}).frames
    assert selector is not None and selector.selects_while_decoding
    clip = select_clip(question(NASA), selector, 1.0)
    video = load_video(NASA, selector=selector, question="What?", candidate_fps=1.0)
    assert clip.indices == video.indices and len(clip.indices) == 3 and torch.equal(clip.frames, video.frames)
    with pytest.raises(VideoReadError, match="leave --candidate-fps out"):
        select_clip(question(NASA, span=(1.0, 2.0)), selector, 1.0)
