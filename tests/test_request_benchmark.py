"""What the benchmarks of whole requests run and report; never how long anything took."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from spatiotoken import request_benchmark
from spatiotoken.benchmark import UNPATCHED
from spatiotoken.benchmark_models import FAMILIES, Workload, build_model, build_request, moving_pictures
from spatiotoken.benchmark_timing import (
    Rows,
    Shares,
    Times,
    counted_rows,
    generate,
    host_waits,
    native_features,
    native_prompt,
    predicted_first_token,
    shares_left,
    timed_request,
)
from spatiotoken.config import ConfigError, load_config, presets
from spatiotoken.patching import last_report, patched
from spatiotoken.request_benchmark import (
    RequestComparison,
    compare_requests,
    median_times,
    request_configs,
    request_table,
)
from tests.benchmarking import cells, run_script, tables

CONFIGS = ("dense", "random", "divprune", "fastv", "uniform")
VISUAL = {"qwen2_5_vl": 4 * 16, "llava_onevision": 8 * 9 + 1}  # frames in pairs; a newline


def tiny(model_type: str) -> Workload:
    return Workload(model_type, "tiny", 8, torch.float32, "cpu", "sdpa", 1)


@cache
def built(model_type: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    model, processor = build_model(tiny(model_type))
    return model, build_request(tiny(model_type), model, processor)


@cache
def compared(model_type: str) -> RequestComparison:
    (found,) = compare_requests([tiny(model_type)], CONFIGS, repeats=2, new_tokens=3)
    return found


@pytest.fixture(params=FAMILIES)
def model_type(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_rng_state()
    yield request.param
    assert torch.equal(torch.get_rng_state(), before), "the global random state was changed"


@pytest.mark.parametrize(("model_type", "parameters"), [("qwen2_5_vl", 8292166656), ("llava_onevision", 8030348832)])
def test_released_shapes(model_type: str, parameters: int) -> None:
    """8.29 and 8.03 billion parameters, as Qwen2.5-VL-7B and LLaVA-OneVision-7B have."""
    model, _ = build_model(Workload(model_type, "7b", 32, torch.bfloat16, "meta", "sdpa", 1))
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    text = model.config.get_text_config()
    assert (text.num_hidden_layers, text.hidden_size, text.vocab_size) == (28, 3584, 152064)


def test_requests_are_the_same_each_time(model_type: str) -> None:
    model, inputs = built(model_type)
    again, processor = build_model(tiny(model_type))
    second = build_request(tiny(model_type), again, processor)
    assert all(torch.equal(inputs[key], second[key]) for key in inputs) and inputs.keys() == second.keys()
    answer = generate(model, inputs, 5)
    assert torch.equal(answer, generate(again, second, 5)) and answer.shape[1] == inputs["input_ids"].shape[1] + 5
    assert (inputs["input_ids"] == model.config.video_token_id).sum() == VISUAL[model_type]


def test_pictures_stand_still_on_the_left_and_change_with_the_scene() -> None:
    frames = torch.stack(list(moving_pictures(16, 40, 60, 8))).float()
    still = frames[:, :, :, :10]
    assert torch.equal(still[2], still[7]) and not torch.equal(still[7], still[10])
    assert not torch.equal(still[0], still[2]), "the square is there first"
    right = frames[:, :, :, 45:]
    assert not torch.equal(right[0], right[1])


def test_prediction() -> None:
    """Of 100 ms, 40 are the tower's, 10 the projector's and 30 the decoder layers'."""
    dense = Times(100.0, 150.0, 40.0, 10.0, 0.0, 30.0, 0.0)
    assert predicted_first_token(dense, Shares()) == 100
    # 20 of the tower, 10 of the projector, 3 of the layers, and 20 that stay.
    assert predicted_first_token(dense, Shares(0.5, 1.0, 0.1)) == pytest.approx(53)
    assert predicted_first_token(dense, Shares(0.25, 0.5, 1.0)) == pytest.approx(65)
    assert (dense.prefill, dense.after_tower, dense.further) == (50, 50, 50)


def test_shares(model_type: str) -> None:
    model, inputs = built(model_type)
    dense, _ = counted_rows(model, inputs, None)
    patches, layers = {"qwen2_5_vl": (4 * 64, 3), "llava_onevision": (8 * 36, 3)}[model_type]
    assert dense == Rows(patches * layers, patches, dense.features)
    # In older versions of transformers the newline comes later.
    assert dense.features in {4 * 16, 8 * 9, 8 * 9 + 1} and VISUAL[model_type] - dense.features in {0, 1}
    half = 2 if model_type == "qwen2_5_vl" else 4
    rows, report = counted_rows(model, inputs, load_config("uniform", **{"frames.num_frames": half}))
    assert report is not None and (rows.tower, rows.projector) == (dense.tower // 2, dense.projector // 2)
    shares = shares_left(rows, dense, report)
    assert shares.tower == shares.projector == 0.5
    assert shares.layers == report.prefill_flops / report.prefill_flops_dense < 0.8


def test_times_add_up(model_type: str) -> None:
    model, inputs = built(model_type)
    times, report = timed_request(model, inputs, load_config("holitom"), 3)
    assert report is not None and report.decode_steps == 2
    assert all(value > 0 for value in vars(times).values())
    assert times.prefill >= times.layers and times.total > times.first_token
    assert times.reduction == times.method >= report.stages["tokens"].milliseconds
    assert times.tower + times.projector + times.reduction + times.prefill == pytest.approx(times.first_token)
    dense, none = timed_request(model, inputs, None, 1)
    assert none is None and dense.tower > 0 and dense.reduction < times.reduction
    between, report = timed_request(model, inputs, load_config("fastv"), 1)
    assert report is not None and between.method - between.reduction == report.stages["layers"].milliseconds > 0


def test_timers_leave_nothing_behind(model_type: str) -> None:
    model, inputs = built(model_type)

    def hooks() -> int:
        return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())

    before = hooks()
    answer = generate(model, inputs, 3)
    timed_request(model, inputs, load_config("divprune"), 1)
    counted_rows(model, inputs, load_config("divprune"))
    with native_features(model, 7):
        pass
    assert "get_video_features" not in vars(model.model) and hooks() == before
    assert torch.equal(answer, generate(model, inputs, 3))


def test_native_prompt_has_what_the_patched_model_kept(model_type: str) -> None:
    model, inputs = built(model_type)
    with patched(model, "random"):
        generate(model, inputs, 1)
        report = last_report(model)
    prompt = native_prompt(model, inputs, report.visual_kept)
    assert (prompt["input_ids"] == model.config.video_token_id).sum() == report.visual_kept < VISUAL[model_type]
    assert prompt["input_ids"].numel() == report.text_tokens + report.visual_kept == report.layer_tokens[0]
    text = inputs["input_ids"][inputs["input_ids"] != model.config.video_token_id]
    assert torch.equal(prompt["input_ids"][prompt["input_ids"] != model.config.video_token_id], text)
    later = VISUAL[model_type] - counted_rows(model, inputs, None)[0].features
    lengths = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, args, arguments: lengths.append((args[0] if args else arguments["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    with native_features(model, report.visual_kept - later):
        times, _ = timed_request(model, prompt, None, 2)
    hook.remove()
    assert lengths == [report.layer_tokens[0], 1], "the decoder sees as much as the patched model's"
    assert times.tower == 0 and times.projector < times.prefill


def test_comparison(model_type: str) -> None:
    found = compared(model_type)
    kept = {one.config: one.visual_kept for one in found.timings}
    names = [UNPATCHED, *CONFIGS, "random as divprune", "downsample as divprune"]
    assert list(kept) == names and found.visual_tokens == VISUAL[model_type]
    assert kept["dense"] == kept["fastv"] == VISUAL[model_type] and kept["random as divprune"] == kept["divprune"]
    # `downsample` leaves at least a token of each frame.
    assert kept["downsample as divprune"] <= kept["divprune"] + 1 < kept["random"]
    unpatched = found.timings[0]
    for one in found.timings:
        assert len(one.times) == 2 and one.total_ms > one.first_token_ms > 0
        assert one.realised == pytest.approx(unpatched.first_token_ms / one.first_token_ms)
        assert one.whole == pytest.approx(unpatched.total_ms / one.total_ms)
        assert one.reached == one.realised / one.predicted and one.waits is None
        dense = median_times(unpatched.times)
        assert one.predicted == pytest.approx(dense.first_token / predicted_first_token(dense, one.left))
        if one.config == "fastv":
            assert one.native_ms is one.bound is one.bound_interval is None
            continue
        after = median_of([times.after_tower for times in one.times])
        assert one.native_ms is not None and one.bound == pytest.approx(after / one.native_ms)
    assert unpatched.left == found.timings[1].left == Shares() and unpatched.predicted == 1
    assert not found.unusable


def median_of(values: list[float]) -> float:
    return sum(sorted(values)[(len(values) - 1) // 2 : len(values) // 2 + 1]) / (2 - len(values) % 2)


def test_rounds_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []

    def timed(model: Any, inputs: Any, config: Any, new_tokens: int) -> Any:
        ran.append(new_tokens if config is None else config.to_dict()["description"][:6])
        return timed_request(model, inputs, config, 1)

    monkeypatch.setattr(request_benchmark, "timed_request", timed)
    list(compare_requests([tiny("qwen2_5_vl")], ["dense", "random"], repeats=2, warmup=1, new_tokens=2))
    there, back = [2, 1, "Nothin", 1, "A rand", 1], ["A rand", 1, "Nothin", 1, 2, 1]
    assert ran == [*there, *back, *there], "each with its native prompt behind it"


def test_default_configs() -> None:
    model, _ = built("qwen2_5_vl")
    configs = request_configs(model, 8)
    assert set(request_benchmark.PRESETS) < configs.keys()
    half = configs["half the frames"].frames
    assert half is not None and half.model_dump()["num_frames"] == 2, "of four temporal units"
    merged = configs["half the frames, evs-10"]
    assert merged.tokens == load_config("evs-10").tokens and merged.frames == half
    towers = {name for name, config in presets().items() if "vision" in config.methods()}
    assert towers <= configs.keys()
    for name in towers:
        if presets()[name].tokens is None:
            assert configs[f"{name}, evs-10"].methods().keys() >= {"vision", "tokens"}


def test_configs_that_a_model_cannot_use() -> None:
    clips = {"tokens": {"method": "fastvid", "attention": "cls"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request_benchmark, "load_config", lambda config, **changes: load_config(clips))
        (found,) = compare_requests([tiny("qwen2_5_vl")], ["cls"], repeats=1, new_tokens=1)
    assert [one.config for one in found.timings] == [UNPATCHED] and "'cls'" in found.unusable["cls"]
    assert f"Not for this model: cls: {found.unusable['cls']}" in request_table(found)


def test_table(model_type: str) -> None:
    found = compared(model_type)
    text = request_table(found)
    header, *rows = cells(text)
    assert [row[0] for row in rows] == [one.config for one in found.timings] and all(all(row) for row in rows)
    fastv = rows[CONFIGS.index("fastv") + 1]
    assert fastv[header.index("after the tower / native")] == "-"
    assert "Goals: at most 1.1 after the tower over native, most " in text and "dense at most 1.03" in text
    waiting = replace(found, timings=tuple(replace(one, waits=4) for one in found.timings))
    header, *rows = cells(request_table(waiting))
    assert header[-1] == "host waits" and {row[-1] for row in rows} == {"4"}


def test_waits_are_counted_on_a_gpu_only() -> None:
    model, inputs = built("qwen2_5_vl")
    assert host_waits(model, inputs, None) is None


def test_bad_settings() -> None:
    for wrong in ({"repeats": 0}, {"warmup": -1}, {"new_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            list(compare_requests([tiny("qwen2_5_vl")], **wrong))
    with pytest.raises(ConfigError, match="nonsense"):
        list(compare_requests([tiny("qwen2_5_vl")], ["nonsense"]))
    with pytest.raises(ValueError, match="unknown model type 'llava'; there are qwen2_5_vl, "):
        build_model(tiny("llava"))


def test_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = ("--suite", "e2e", "--size", "tiny", "--threads", "1", "--repeats", "1", "--new-tokens", "2")
    run_script(monkeypatch, *run, "--configs", "dense", "evs", "--save", str(tmp_path))
    out = capsys.readouterr().out
    assert out.startswith("`python benchmark.py --suite e2e --size tiny ") and ", commit: " in out
    rows = [UNPATCHED, "dense", "evs", "random as evs", "downsample as evs"]
    assert [[row[0] for row in table[1:]] for table in tables(out)] == [rows, rows]
    assert (tmp_path / "e2e-tiny.md").read_text() == out.rstrip("\n") + "\n"
    names = {f"e2e-{name}-tiny-8.svg" for name in FAMILIES}
    assert {path.name for path in tmp_path.iterdir()} == {"e2e-tiny.json", "e2e-tiny.md", *names}
    saved = json.loads((tmp_path / "e2e-tiny.json").read_text())

    run_script(monkeypatch, *run, "--configs", "dense", "--models", "qwen2_5_vl", "--json")
    data = json.loads(capsys.readouterr().out)
    assert data.keys() == saved.keys() == {"suite", "command", "machine", "comparisons"}
    assert [one["workload"]["model_type"] for one in saved["comparisons"]] == list(FAMILIES)
    (one,) = data["comparisons"]
    assert one["workload"]["dtype"] == "float32" and [row["config"] for row in one["timings"]] == [UNPATCHED, "dense"]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--configs", "nonsense"), "nonsense"),
        (("--frames", "6"), "[6]"),
        (("--device", "tpu"), "'tpu'"),
        (("--dtype", "auto"), "auto"),
        (("--threads", "0"), "not 0"),
        (("--models", "llava"), "llava"),
        (("--repeats", "0"), "not 0"),
    ],
)
def test_script_refuses_bad_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], named: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_script(monkeypatch, "--suite", "e2e", "--size", "tiny", *args)
    assert named in capsys.readouterr().err
