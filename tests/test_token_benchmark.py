"""What the benchmark of token methods runs and reports; never how long anything took."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from spatiotoken.registry import METHODS
from spatiotoken.structures import VideoFeatures
from spatiotoken.token_benchmark import (
    TOWER_DEPTH,
    Subject,
    compare_subjects,
    layer_subjects,
    preset_reducers,
    reducer_subject,
    synthetic_video,
    view_for,
)
from spatiotoken.tokens.divprune import DivPrune
from spatiotoken.tokens.evs import EVS
from tests.benchmarking import SCRIPTS, run_script

ONCE: dict[str, Any] = {"repeats": 1, "warmup": 0}


@pytest.fixture(scope="module")
def video() -> VideoFeatures:
    return synthetic_video((16, 6, 6), 32)


@pytest.fixture
def authors(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("authors")


def write(root: Path, file: str, text: str) -> None:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(inspect.cleandoc(text))


def test_video_has_every_field(video: VideoFeatures) -> None:
    tokens = 16 * 6 * 6
    shapes = {
        field.name: tuple(value.shape)
        for field in fields(video)
        if isinstance(value := getattr(video, field.name), Tensor)
    }
    assert shapes == {
        "embeddings": (tokens, 32),
        "saliency": (TOWER_DEPTH, tokens),
        "hidden": (tokens, 1152),
        "keys": (tokens, 72),
        "frame_features": (16, 1152),
        "question": (12, 32),
    }
    assert torch.equal(video.embeddings, synthetic_video((16, 6, 6), 32).embeddings)
    assert not torch.equal(video.embeddings, synthetic_video((16, 6, 6), 32, seed=1).embeddings)


def test_video_has_something_to_find() -> None:
    frames = synthetic_video((16, 14, 14), 256).frames
    alike = cosine_similarity(frames[1:], frames[:-1], dim=-1)
    within = torch.cat([alike[:7], alike[8:]])
    assert within.quantile(0.9) > 0.95, "still places"
    assert within.quantile(0.1) < 0.7, "moving ones"
    assert alike[7].mean() < within.mean() - 0.3, "a cut after eight frames"


def test_a_method_sees_what_it_asks_for(video: VideoFeatures) -> None:
    class Asking(EVS):
        needs = frozenset({"saliency", "keys"})

        def saliency_layers(self, depth: int) -> tuple[int, ...]:
            return (3, depth - 1)

    seen = view_for(Asking(), video)
    assert torch.equal(seen.needed("saliency"), video.needed("saliency")[[3, TOWER_DEPTH - 1]])
    assert seen.keys is video.keys
    assert seen.hidden is None and seen.frame_features is None and seen.question is None
    assert view_for(EVS(), video).saliency is None


def test_every_method_runs(video: VideoFeatures) -> None:
    reducers = preset_reducers()
    assert reducers.keys() == METHODS["tokens"].items().keys()
    assert reducers["divprune"] == DivPrune(retention=0.098), "not its preset"
    subjects = {name: reducer_subject(reducer) for name, reducer in reducers.items()} | layer_subjects()
    comparison = compare_subjects(subjects, {}, video, **ONCE)
    assert [timing.method for timing in comparison.timings] == list(subjects)
    for timing in comparison.timings:
        assert 1 <= timing.kept <= video.num_tokens, timing.method
        assert len(timing.milliseconds) == 1 and timing.ratio is None


def test_rounds_alternate_on_fresh_copies(video: VideoFeatures) -> None:
    runs = []

    def ours(tokens: Tensor) -> Tensor:
        runs.append(("ours", tokens.clone()))
        return tokens[:5]

    def theirs(tokens: Tensor) -> Tensor:
        runs.append(("theirs", tokens.clone()))
        return tokens.zero_()[:7]

    def embeddings(video: VideoFeatures) -> tuple[Tensor]:
        return (video.embeddings,)

    comparison = compare_subjects(
        {"method": Subject(ours, embeddings)},
        {"method": Subject(theirs, embeddings)},
        video,
        repeats=4,
        warmup=2,
        notes={"method": "a remark"},
    )
    (timing,) = comparison.timings
    # Theirs once more, before all, to see whether it works.
    assert [name for name, _ in runs] == ["theirs", *["ours", "theirs"] * 6]
    assert all(torch.equal(tokens, video.embeddings) for _, tokens in runs)
    assert (timing.kept, timing.authors_kept, timing.note) == (5, 7, "a remark")
    assert len(timing.milliseconds) == len(timing.authors_milliseconds) == 4
    assert timing.ratio is not None and timing.ratio_interval is not None and timing.authors_median_ms is not None
    assert timing.ratio == pytest.approx(timing.median_ms / timing.authors_median_ms)
    assert timing.ratio_interval[0] <= timing.ratio <= timing.ratio_interval[1]
    assert comparison.grid == (16, 6, 6) and comparison.channels == 32


def test_slow_methods_run_three_times(video: VideoFeatures) -> None:
    comparison = compare_subjects({"random": reducer_subject(preset_reducers()["random"])}, {}, video, seconds=1e-9)
    assert len(comparison.timings[0].milliseconds) == 3


def test_authors_failures_are_notes(video: VideoFeatures) -> None:
    def broken(video: VideoFeatures) -> Tensor:
        raise RuntimeError("no kernel")

    subjects = {name: reducer_subject(EVS()) for name in ("one", "two")}
    comparison = compare_subjects(subjects, {"one": Subject(broken), "two": "never published"}, video, **ONCE)
    assert [timing.note for timing in comparison.timings] == ["failed: RuntimeError: no kernel", "never published"]
    assert [timing.authors_kept for timing in comparison.timings] == [None, None]


@pytest.mark.parametrize("setting", [{"repeats": 0}, {"warmup": -1}, {"seconds": 0}])
def test_bad_settings(video: VideoFeatures, setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        compare_subjects({}, {}, video, **setting)


def test_loading_parts_of_files(authors: ModuleType, tmp_path: Path) -> None:
    write(
        tmp_path,
        "a/model.py",
        """
        import a_module_that_nobody_has

        class Model:
            @unknown
            def outer(self, x: Unknown):
                waste = x.to("nowhere")
                for i in range(2):
                    waste[i] = 0
                def inner(y):
                    return helper(y) + offset
                print("noise")
                return inner(x)

        def helper(y):
            return F.relu(y)

        def released_as_it_is(x)
            # first
            y = 2 * x
            z = y + 1
            return z
        """,
    )
    checkout = authors.Checkout(tmp_path)
    code = checkout.functions("a/model.py", "outer", "helper", "inner", without="waste", offset=10)
    assert code.outer(None, torch.tensor([-1.0, 1.0])).tolist() == [10.0, 11.0]
    assert code.inner(torch.tensor([3.0])).tolist() == [13.0]
    block = checkout.lines("a/model.py", "y = 2", "z =", "x", "(y, z)")
    assert block(5) == (10, 11)
    with pytest.raises(LookupError, match="no gone in a/model.py"):
        checkout.functions("a/model.py", "outer", "gone")
    with pytest.raises(LookupError, match="no lines from 'y' to 'w'"):
        checkout.lines("a/model.py", "y", "w", "x", "y")
    with pytest.raises(LookupError, match="no file b.py"):
        checkout.module("b.py")


def test_loading_modules(authors: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "package/__init__.py", "raise RuntimeError('imports whole models')")
    write(tmp_path, "package/sibling.py", "NUMBER = 3")
    write(tmp_path, "package/code.py", "from .sibling import NUMBER")
    assert authors.Checkout(tmp_path).module("package/code.py").NUMBER == 3


def test_table_of_authors_fits_ours(authors: ModuleType) -> None:
    reducers = preset_reducers()
    assert authors.ORIGINALS.keys() <= reducers.keys() | layer_subjects().keys()
    for name, original in authors.ORIGINALS.items():
        if isinstance(original, str) or name not in reducers:
            continue
        tree = ast.parse(inspect.getsource(original.load))
        settings = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "reducer"
        }
        missing = settings - type(reducers[name]).model_fields.keys()
        assert not missing, f"{name} has no {', '.join(missing)}"


def test_missing_checkouts(authors: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    subjects, remarks = authors.load_originals(tmp_path, {"evs": EVS(), "divprune": DivPrune(), "unheard": EVS()})
    assert subjects["evs"] == "vllm-project/vllm (written for 094f1178): no file vllm/multimodal/evs.py"
    assert subjects["divprune"] == "no checkout of vbdi/divprune"
    assert subjects["unheard"] == "no code of the authors known here"
    assert remarks == {}


def test_script_times_the_authors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write(
        tmp_path,
        "vllm-project+vllm/vllm/multimodal/evs.py",
        """
        import torch

        def compute_retention_mask(video_embeds, video_size_thw, spatial_merge_size, q):
            return torch.arange(video_embeds.shape[0]) < 5
        """,
    )
    size = ("--grid", "4", "3", "3", "--channels", "16", "--repeats", "2", "--warmup", "0")
    methods = ("--methods", "evs", "random", "sttm")
    run_script(monkeypatch, "--suite", "tokens", *methods, "--authors", str(tmp_path), *size, "--json")
    data = json.loads(capsys.readouterr().out)
    assert data.keys() == {"suite", "machine", "grid", "channels", "timings"}
    assert data["suite"] == "tokens" and data["grid"] == [4, 3, 3] and data["channels"] == 16
    assert data["machine"]["torch_threads"] == 1
    evs, random, sttm = data["timings"]
    assert (evs["method"], evs["kept"], evs["authors_kept"], evs["note"]) == ("evs", 9, 5, "")
    assert (random["kept"], random["authors_kept"], random["note"]) == (9, None, "a baseline of ours")
    assert sttm["note"] == "no checkout of HYUNJS/STTM"

    run_script(monkeypatch, "--suite", "tokens", *methods, *size, "--markdown")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and {line.count("|") for line in lines} == {9}
    assert lines[2].startswith("| evs | 9 | ")


@pytest.mark.parametrize(
    "args", [("--methods", "nonsense"), ("--authors", "/nowhere"), ("--repeats", "0"), ("--grid", "0", "3", "3")]
)
def test_script_refuses_bad_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_script(monkeypatch, "--suite", "tokens", "--channels", "8", "--grid", "2", "2", "2", *args)
    assert args[-1] in capsys.readouterr().err
