"""What the benchmarks of stages, of memory and of reading report, and their pictures; never how long anything took."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from spatiotoken import memory_benchmark, reader_benchmark
from spatiotoken.benchmark import UNPATCHED
from spatiotoken.benchmark_chart import bar_chart
from spatiotoken.benchmark_models import FAMILIES, Workload
from spatiotoken.config import load_config, presets
from spatiotoken.frame_benchmark import write_long_video
from spatiotoken.memory_benchmark import MEMORY_CONFIGS, compare_memory, memory_configs, memory_table
from spatiotoken.reader_benchmark import BACKENDS, WAYS, compare_readers, reader_table
from spatiotoken.request_benchmark import HALF
from spatiotoken.stage_benchmark import (
    STAGE_PRESETS,
    STAGES,
    _default_configs,
    compare_stages,
    stage_table,
    stage_timing,
)
from spatiotoken.video import BackendUnavailableError
from tests.benchmarking import cells, run_script, tables
from tests.test_request_benchmark import VISUAL, built


def tiny(model_type: str, **other: Any) -> Workload:
    settings = {"size": "tiny", "frames": 8, "dtype": torch.float32, "device": "cpu", "attention": "sdpa", "threads": 1}
    return Workload(model_type, **settings | other)


def here(job: Any, *arguments: Any) -> Any:
    """In place of a process of its own."""
    return job(*arguments)


# ------------------------------------------------------------------------------------------------------------- stages


def test_medians_are_of_each_stage_and_of_the_sums() -> None:
    rounds = [dict(zip(STAGES, row, strict=True)) for row in ((1, 2, 3, 4, 5, 6, 7), (3, 2, 1, 0, 9, 6, 1), (9,) * 7)]
    timing = stage_timing("dense", rounds)
    assert list(timing.stages.values()) == [3, 2, 3, 4, 9, 6, 7] and list(timing.stages) == list(STAGES)
    assert timing.first_token_ms == 21 and timing.total_ms == 28, "of 21, 21 and 54; of 28, 22 and 63"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_stages(model_type: str) -> None:
    (found,) = compare_stages([tiny(model_type)], ["dense", "divprune"], repeats=2, new_tokens=3)
    assert [one.config for one in found.timings] == [UNPATCHED, "dense", "divprune"]
    assert found.file == "H.264, 96 x 64, 32 pictures" and found.prompt_tokens > 60
    for one in found.timings:
        assert len(one.rounds) == 2 and list(one.stages) == list(STAGES)
        assert all(value > 0 for stage, value in one.stages.items() if stage != "reduction")
        assert one.first_token_ms < one.total_ms
    assert found.timings[2].stages["reduction"] > found.timings[0].stages["reduction"] >= 0
    header, *rows = cells(stage_table(found))
    assert header == ["config", *STAGES, "first token", "3 tokens"] and [row[0] for row in rows][2] == "divprune"


def test_default_configs() -> None:
    model, _ = built("qwen2_5_vl")
    configs = _default_configs(model, 8)
    towers = {name for name, config in presets().items() if "vision" in config.methods()}
    assert {*STAGE_PRESETS, HALF, *towers} <= configs.keys() and "random" not in configs


# ------------------------------------------------------------------------------------------------------------- memory


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks are of the job that each config is given; how large they are is for a process of its own to tell."""
    peaks = iter((200 * 2**20, 210 * 2**20, 50 * 2**20))
    ran = []

    def grown(call: Any, device: torch.device) -> int:
        ran.append(call())
        return next(peaks)

    monkeypatch.setattr(memory_benchmark, "in_process", here)
    monkeypatch.setattr(memory_benchmark, "peak_growth", grown)
    (found,) = compare_memory([tiny("qwen2_5_vl")], ["dense", "random"])
    assert [(one.config, one.visual_kept) for one in found.peaks] == [(UNPATCHED, 64), ("dense", 64), ("random", 16)]
    assert [one.ratio for one in found.peaks] == [1, 1.05, 0.25] and not found.unusable
    assert len(ran) == 3 and len({answer.shape for answer in ran}) == 1, "one new token each"
    header, *rows = cells(memory_table(found))
    assert header[2:] == ["peak above the weights, MiB", "share of unpatched"] and rows[2][2:] == ["50.0", "0.25"]


def test_memory_without_anything_to_compare_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_benchmark, "in_process", lambda job, workload, config: (0 if config is None else 5, 64))
    (found,) = compare_memory([tiny("qwen2_5_vl")], ["dense"])
    assert [one.ratio for one in found.peaks] == [1, None]
    assert [row[-1] for row in cells(memory_table(found))[1:]] == ["1.00", "-"]


def test_configs_that_a_model_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def job(_: Any, workload: Workload, config: Mapping[str, Any] | None) -> tuple[int, int]:
        if config is not None:
            raise ValueError("it has\nno such thing")
        return 10, 64

    monkeypatch.setattr(memory_benchmark, "in_process", job)
    (found,) = compare_memory([tiny("qwen2_5_vl")], ["evs"])
    assert len(found.peaks) == 1 and found.unusable == {"evs": "it has no such thing"}


def test_memory_configs() -> None:
    configs = memory_configs()
    assert set(MEMORY_CONFIGS) <= configs.keys() and load_config("divprune-25") == configs["divprune-25"]
    own = [configs[name].tokens for name in MEMORY_CONFIGS]
    assert {tokens.model_dump()["retention"] for tokens in own if tokens} == {0.25}
    towers = {name for name, config in presets().items() if "vision" in config.methods()}
    assert configs.keys() == {*MEMORY_CONFIGS, *towers}


@pytest.mark.slow
def test_memory_in_processes() -> None:
    """2,048 tokens fewer leave the decoder's states of a prompt smaller."""
    (found,) = compare_memory([tiny("llava_onevision", frames=512)], ["random"])
    dense, random = found.peaks
    assert dense.visual_kept == 512 * 9 + 1 and random.visual_kept == round(512 * 9 / 4) + 1
    assert 2**20 < random.peak_bytes < dense.peak_bytes


# ------------------------------------------------------------------------------------------------------------- reader


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "short.mp4"
    write_long_video(path, 0.2, height=48, width=64)  # 288 frames in 12 seconds
    return path


def test_readers(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_benchmark, "in_process", here)
    found = compare_readers(video, repeats=2)
    frames = {(one.backend, one.way): one.frames for one in found.timings}
    for backend in BACKENDS:
        if backend in found.unusable:
            continue
        read = [frames.get((backend, way)) for way in WAYS]
        assert read[:3] == [288, 32, 12] and (read[3] is None) == (f"{backend}, key frames" in found.unusable)
    assert frames["pyav", "key frames, small"] == 2, "one every 250"
    for one in found.timings:
        assert len(one.seconds) == 2
        assert one.frames_per_second == pytest.approx(2 * one.frames / sum(one.seconds)), "the median of two"
    assert found.video == {"codec": "h264", "size": "64x48", "frames": 288}
    header, *rows = cells(reader_table(found))
    assert header[:3] == ["backend", "read", "frames"] and len(rows) == len(found.timings)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_that_are_made_smaller(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "large.mp4"
    write_long_video(path, 0.05, height=256, width=320)  # 3 seconds
    try:
        frames, seconds, _ = reader_benchmark._read(path, backend, "one a second, small", 1)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    assert frames == 3 and seconds > 0


def test_backends_that_are_not_installed(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = reader_benchmark.open_reader

    def open_reader(path: Path, backend: str) -> Any:
        if backend != "pyav":
            raise BackendUnavailableError(f"no {backend} here")
        return own(path, backend)

    monkeypatch.setattr(reader_benchmark, "open_reader", open_reader)
    monkeypatch.setattr(reader_benchmark, "in_process", here)
    found = compare_readers(video, repeats=1)
    assert {one.backend for one in found.timings} == {"pyav"}
    assert "Left out: decord (no decord here)." in reader_table(found)


# ----------------------------------------------------------------------------------------------- pictures and script


def test_chart() -> None:
    rows = {"dense": {"a": 30.0, "b": 10.0}, "less <5 %": {"a": 20.0}}
    root = ElementTree.fromstring(bar_chart("bars & such", "ms", rows))
    name = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in root.iter(f"{name}text")]
    assert texts == ["bars & such", "dense", "40 ms", "less <5 %", "20 ms", "a", "b"]
    boxes = [element for element in root.iter(f"{name}rect")][1:4]
    widths = [float(box.attrib["width"]) for box in boxes]
    assert widths[0] == 3 * widths[1] == 1.5 * widths[2], "to scale"
    assert float(boxes[1].attrib["x"]) == pytest.approx(float(boxes[0].attrib["x"]) + widths[0], abs=0.2)
    assert boxes[0].attrib["fill"] == boxes[2].attrib["fill"] != boxes[1].attrib["fill"]
    right = max(float(box.attrib["x"]) + float(box.attrib["width"]) for box in boxes)
    assert right < float(root.attrib["width"])


def test_charts_of_nothing() -> None:
    for rows in ({"a": {}}, {"a": {"x": -1.0}}, {"a": {str(part): 1.0 for part in range(8)}}):
        with pytest.raises(ValueError, match="a chart has 1 to 7 parts"):
            bar_chart("title", "ms", rows)


def test_script(
    video: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for module in (reader_benchmark, memory_benchmark):
        monkeypatch.setattr(module, "in_process", here)
    size = ("--size", "tiny", "--models", "llava_onevision", "--configs", "dense", "--threads", "1")
    save = ("--save", str(tmp_path), "--json")
    run_script(monkeypatch, "--suite", "stages", *size, "--repeats", "1", "--new-tokens", "2", *save)
    run_script(monkeypatch, "--suite", "memory", *size, *save)
    run_script(monkeypatch, "--suite", "reader", "--video", str(video), "--repeats", "1", *save)
    printed = capsys.readouterr().out
    for suite in ("stages", "memory", "reader"):
        stem = suite if suite == "reader" else f"{suite}-tiny"
        text = (tmp_path / f"{stem}.json").read_text()
        data = json.loads(text)
        assert text in printed and data["suite"] == suite and data["command"].startswith("python benchmark.py --suite")
        assert {"torch", "transformers", "commit", "cpu"} <= data["machine"].keys()
        (table,) = tables((tmp_path / f"{stem}.md").read_text())
        name = "files" if suite == "reader" else "llava_onevision-tiny-8"
        picture = ElementTree.parse(tmp_path / f"{suite}-{name}.svg")
        assert picture.getroot().tag.endswith("svg") and len(table) > 2
    (peaks,) = json.loads((tmp_path / "memory-tiny.json").read_text())["comparisons"]
    assert peaks["visual_tokens"] == VISUAL["llava_onevision"]
