"""What the benchmark of sparse prefill runs and reports; never how long anything took."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from spatiotoken import attention_benchmark
from spatiotoken.attention.kernels import density
from spatiotoken.attention.recall import mass_recall, measure, oracle_pairs
from spatiotoken.attention_benchmark import (
    PATTERNS_PER,
    PROBE_SETTINGS,
    RECALL_LENGTH,
    RECALL_SETTINGS,
    EngineTiming,
    Layout,
    Rounds,
    chosen_density,
    dense_paths,
    engine_tables,
    median_times,
    methods_with,
    preset_methods,
    random_pattern,
    recall_tables,
    recalls,
    static_densities,
    static_method,
    time_engine,
    time_estimates,
    video_prompt,
)
from spatiotoken.registry import METHODS
from tests.benchmarking import run_script, tables

CPU = torch.device("cpu")
TINY = Layout(4, 2, 16)
ONCE = Rounds(repeats=1)


@pytest.fixture(autouse=True)
def no_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles for many seconds."""
    monkeypatch.setattr(attention_benchmark, "unavailable", lambda name, device: "no" if name == "flex" else None)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_random_patterns_have_the_density_asked_for(share: float) -> None:
    pattern = random_pattern(2000, 3, share, (32, 16))
    assert pattern.blocks.shape == (1, 3, 63, 125)
    assert density(pattern, 2000, 2000) == pytest.approx(share, abs=0.02)
    query = torch.arange(63)
    assert pattern.blocks[:, :, query, query * 2].all(), "the diagonal"
    assert not pattern.blocks[:, :, query[:-1], query[:-1] * 2 + 2].any(), "nothing of the future"
    assert share == 1 or not torch.equal(pattern.blocks[0, 0], pattern.blocks[0, 1])


def test_densities_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="density 0.1 is not possible at 256 tokens: it must be from 0.253"):
        random_pattern(256, 1, 0.1, (64, 64))
    with pytest.raises(ValueError, match=r"density 1.5"):
        random_pattern(256, 1, 1.5, (64, 64))


def test_dense_paths_are_dense_attention() -> None:
    inputs = video_prompt(96, TINY)
    logits = inputs.query @ inputs.key.repeat_interleave(2, dim=0).transpose(1, 2) * inputs.scale
    weights = logits.masked_fill(torch.ones(96, 96).triu(1).bool(), -torch.inf).softmax(dim=-1)
    expected = weights @ inputs.value.repeat_interleave(2, dim=0)
    paths = dense_paths(inputs.query[None], inputs.key[None], inputs.value[None], inputs.scale)
    assert paths.keys() == {"flash", "math"}
    for path in paths.values():
        torch.testing.assert_close(path()[0], expected, atol=1e-4, rtol=1e-4)


def test_engine_times_every_pattern() -> None:
    threads = torch.get_num_threads()
    timings = list(time_engine([1, 2], [128, 256], [0.5], layout=TINY, blocks=(16, 16), rounds=ONCE))
    assert torch.get_num_threads() == threads
    cells = [(one.threads, one.length, one.per) for one in timings]
    assert cells == [(count, length, per) for count in (1, 2) for length in (128, 256) for per in PATTERNS_PER]
    for one in timings:
        assert one.density == pytest.approx(0.5, abs=0.15)
        assert one.dense_ms.keys() == {"flash", "math"} and one.sparse_ms.keys() == {"gather"} and not one.failed
        assert min(*one.dense_ms.values(), *one.sparse_ms.values()) > 0
    dense, sparse = tables(engine_tables(timings, TINY, (16, 16)))
    assert dense[0] == ["threads", "tokens", "flash, ms", "math, ms", "best"] and len(dense) == 5
    assert sparse[0] == ["threads", "tokens", "a pattern per", "density", "gather / dense"] and len(sparse) == 9


def test_ratios() -> None:
    """Against the best path, and against flash attention in either layout of the keys."""
    dense = {"flash": 5.0, "flash, grouped": 4.0, "cudnn": 2.0}
    timing = EngineTiming(1, 4096, "key head", 0.25, dense, {"triton": 1.0}, {"flex": "RuntimeError: no"})
    assert timing.ratio("triton") == 2.0 and timing.ratio("triton", "flash") == 1.0
    assert timing.ratio("flex") is None and timing.ratio("triton", "efficient") is None
    paths, sparse = tables(engine_tables([timing], Layout(), (128, 64)))
    assert paths[1] == ["1", "4096", "5.00", "4.00", "2.00", "cudnn"]
    assert sparse[0][4:] == ["triton / dense", "triton / flash", "flex / dense", "flex / flash"]
    assert sparse[1][4:] == ["2.000", "1.000", "RuntimeError: no", "RuntimeError: no"]


def test_failures_do_not_take_the_rest_along() -> None:
    def broken() -> None:
        raise RuntimeError("no\n  kernel")

    calls: list[str] = []
    runs = {"first": lambda: calls.append("first"), "broken": broken, "last": lambda: calls.append("last")}
    times, failed = median_times(runs, CPU, Rounds(repeats=2, warmup=2))
    assert times.keys() == {"first", "last"} and failed == {"broken": "RuntimeError: no kernel"}
    assert calls == ["first", "last"] * 4, "in turns"


def test_slow_things_run_three_times() -> None:
    calls: list[int] = []
    median_times({"slow": lambda: calls.append(1)}, CPU, Rounds(repeats=9, seconds=1e-9))
    assert len(calls) == 4


def test_video_prompts() -> None:
    for length in (64, 300, 2048):
        inputs = video_prompt(length, TINY)
        visual = inputs.needed("coordinates")[:, 0] >= 0
        assert inputs.length == length and visual.sum() >= length / 2
    with pytest.raises(ValueError, match="at least 64, not 63"):
        video_prompt(63, TINY)


def test_every_method_has_its_settings() -> None:
    """Such as leave something out at the length that they are for."""
    names = METHODS["attention"].items().keys()
    assert preset_methods().keys() == names
    for settings, length in ((RECALL_SETTINGS, RECALL_LENGTH), (PROBE_SETTINGS, 144)):
        assert settings.keys() == names
        methods = methods_with(settings)
        assert [name for name, method in methods.items() if method.is_dense(length, 0, 6)] == []


def test_estimates_of_every_method() -> None:
    methods = methods_with(PROBE_SETTINGS)
    inputs = video_prompt(192, TINY)
    timings = time_estimates(methods, inputs, threads=1, rounds=ONCE)
    assert [one.method for one in timings] == list(methods)
    for one in timings:
        assert not one.failed and one.backend in ("gather", "dense"), one
        assert one.density is not None and 0 < one.density <= 1
        assert one.estimate is not None and one.attend is not None and 0 < one.estimate


def test_chosen_density_is_that_of_what_runs() -> None:
    inputs = video_prompt(192, TINY)
    for name, method in methods_with(PROBE_SETTINGS).items():
        attended = method.model_copy(update={"backend": "gather"}).attend(inputs)
        assert chosen_density(method.parts(inputs), inputs) == pytest.approx(attended.density), name


def test_dense_methods_take_their_time_too() -> None:
    """Where all would be computed there is no estimate, and dense attention counts."""
    inputs = video_prompt(192, TINY)
    (one,) = time_estimates({"minference": preset_methods()["minference"]}, inputs, threads=1, rounds=ONCE)
    assert (one.density, one.estimate, one.backend) == (None, None, "dense")
    assert one.attend is not None and one.attend > 1


def test_a_broken_method_is_a_row() -> None:
    inputs = replace(video_prompt(192, TINY), coordinates=None)
    methods = {name: methods_with(PROBE_SETTINGS)[name] for name in ("hip", "mminference")}
    hip, mminference = time_estimates(methods, inputs, threads=1, rounds=ONCE)
    assert not hip.failed and "coordinates" in mminference.failed and mminference.attend is None


def test_recall_beside_the_yardsticks() -> None:
    layers = [video_prompt(160, TINY), video_prompt(160, Layout(2, 1, 16))]
    method = static_method(3, 8)
    (row,) = recalls({"powerattention": method}, layers, 8)
    found = [measure(method, inputs) for inputs in layers]
    assert row.density == pytest.approx(float(found[0].density[0]))
    assert row.recall == pytest.approx(sum(float(one.recall.mean()) for one in found) / 2)
    oracles = [float(mass_recall(inputs, oracle_pairs(inputs, row.density)).mean()) for inputs in layers]
    assert row.oracle == pytest.approx(sum(oracles) / 2) and row.oracle > row.recall
    assert (row.static_density, row.static) == pytest.approx((row.density, row.recall)), "itself"
    assert row.settings == {"window": 3, "block": 8}


def test_static_densities() -> None:
    densities = static_densities(160, 8)
    assert list(densities) == list(range(1, 21)) and densities[20] == 1
    assert sorted(densities.values()) == list(densities.values()) and densities[1] < 0.5


def test_recall_on_the_probe_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_benchmark, "RECALL_LENGTH", 256)
    monkeypatch.setattr(attention_benchmark, "RECALL_LAYOUT", TINY)
    found = dict(recall_tables(["hip", "powerattention"], probe=True))
    assert [source.split(",")[0] for source in found] == [
        "256 made-up tokens",
        "the probe model qwen2_5_vl",
        "the probe model llava_onevision",
    ]
    for source, rows in found.items():
        assert [row.method for row in rows] == ["hip", "powerattention"]
        for row in rows:
            assert 0 < row.recall <= 1 and 0 < row.oracle <= 1
            assert "probe" not in source or 0.3 < row.density < 0.7


def test_script_prints_every_method(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(attention_benchmark, "RECALL_LENGTH", 128)
    monkeypatch.setattr(attention_benchmark, "RECALL_LAYOUT", TINY)
    engine = ("--lengths", "256", "--layout", "4", "2", "16", "--block", "16", "32", "--densities", "0.2", "0.3")
    estimates = ("--estimate-length", "192", "--estimate-layout", "4", "2", "16")
    run_script(monkeypatch, "--suite", "attention", "--threads", "1", *engine, *estimates, "--repeats", "1")
    output = capsys.readouterr().out
    dense, sparse, estimated, seen = tables(output)
    assert "blocks of 16 queries by 32 keys" in output and "torch_threads: 1" in output
    assert len(dense) == 2
    assert [row[:3] for row in sparse[1:]] == [["1", "256", per] for per in PATTERNS_PER for _ in range(2)]
    assert estimated[0] == ["method", "density chosen", "estimate", "in all", "backend"]
    names = sorted(METHODS["attention"].items())
    assert [row[0] for row in estimated[1:]] == names == [row[0] for row in seen[1:]]
    assert all(row[1] for row in seen[1:]), "a method without a setting"
    for row in seen[1:]:
        assert all(0 < float(number) <= 1 for number in row[2:]), row


def test_script_prints_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--lengths", "256", "--layout", "2", "1", "16", "--block", "16", "16", "--densities", "0.3")
    tables = ("--tables", "engine", "estimates", "--methods", "hip", "--estimate-length", "64")
    run_script(monkeypatch, "--suite", "attention", "--threads", "1", *size, *tables, "--repeats", "1", "--json")
    data = json.loads(capsys.readouterr().out)
    assert data.keys() == {"suite", "machine", "engine", "estimates"} and data["suite"] == "attention"
    assert [one["per"] for one in data["engine"]] == list(PATTERNS_PER)
    assert data["engine"][0]["sparse_ms"].keys() == {"gather"}
    assert [one["method"] for one in data["estimates"]] == ["hip"]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--methods", "nonsense"), "nonsense"),
        (("--repeats", "0"), "repeats"),
        (("--warmup", "0"), "warmup"),
        (("--threads", "0"), "--threads"),
        (("--dtype", "auto"), "--dtype auto"),
        (("--tables", "engine", "--lengths", "128", "--densities", "0.1"), "density 0.1"),
        (("--tables", "estimates", "--estimate-length", "10"), "at least 64"),
    ],
)
def test_script_refuses_bad_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], named: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_script(monkeypatch, "--suite", "attention", *args)
    assert named in capsys.readouterr().err


def test_other_suites_take_one_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_script(monkeypatch, "--suite", "tokens", "--threads", "1", "2")
    assert "attention suite only" in capsys.readouterr().err
