"""The commands of the attention stage, on the tiny model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from spatiotoken import last_report, load_config, load_video, patched
from spatiotoken.answer import load_model, prepare_inputs, video_metadata
from spatiotoken.attention import PrefillInputs
from spatiotoken.attention.observe import observed
from spatiotoken.attention.recall import HeadRecall, measure, seen_pairs
from spatiotoken.calibration import calibrated
from spatiotoken.config import PatchConfig
from spatiotoken.probe import build_tiny, evaluate
from spatiotoken.viz.attention_maps import attention_maps
from tests.cases import REDUCED
from tests.test_cli import PANCAKE, SHORT, assert_refused, invoke

SETTINGS = [f"--set=attention.{key}={value}" for key, value in REDUCED["attention", "sliding_vertical"].items()]
SMALL = ("--set=attention.block=8", "--set=attention.sink=2", "--set=attention.local=4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("qwen2_5_vl", tmp_path_factory.mktemp("model"))


def prompt(model: Path, frames: int) -> tuple[Any, Any, Any]:
    loaded, processor = load_model(model)
    video = load_video(PANCAKE, num_frames=frames)
    return loaded, processor, prepare_inputs(processor, video.frames, "What?", video_metadata(video))


# -------------------------------------------------------------------------------------------------------------- attn


def test_attn_json(model: Path) -> None:
    args = ("--model", str(model), "--video", PANCAKE, "--num-frames", "4", "--question", "What?", "--json")
    result = invoke("attn", "--config", "sliding_vertical", *SETTINGS, *args)
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    config = load_config("sliding_vertical", **{f"attention.{k}": v for k, v in _reduced().items()})
    assert data.keys() == {"config", "model_type", "layers"} and data["model_type"] == "qwen2_5_vl"
    assert data["config"] == {"name": "sliding_vertical"} | config.to_dict()

    loaded, _, inputs = prompt(model, 4)
    layers: list[HeadRecall] = []
    assert config.attention is not None
    method = config.attention
    observed(loaded, inputs, lambda one: layers.append(measure(method, one)))
    assert len(data["layers"]) == loaded.config.text_config.num_hidden_layers
    for row, one in zip(data["layers"], layers, strict=True):
        assert row.keys() == {"layer", "tokens", "recall", "density"} and len(row["recall"]) == 4
        assert (row["layer"], row["tokens"]) == (one.layer, inputs["input_ids"].shape[1])
        assert row["recall"] == pytest.approx(one.recall.tolist(), abs=1e-5)
        assert row["density"] == pytest.approx(one.density.tolist())
        assert all(0.05 < share < 0.999 for share in row["recall"] + row["density"])


def test_attn_reduces_tokens_as_the_config_says(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    attention = {"method": "sliding_vertical", **_reduced()}
    path.write_text(PatchConfig(tokens={"method": "evs", "retention": 0.5}, attention=attention).to_yaml())
    args = ("--model", str(model), "--video", PANCAKE, "--num-frames", "8", "--json")
    result = invoke("attn", "--config", str(path), *args)
    assert result.exit_code == 0, result.stderr
    lengths = {row["tokens"] for row in json.loads(result.stdout)["layers"]}
    whole = json.loads(invoke("attn", "--config", str(path), *args, "--set=tokens=null").stdout)["layers"]
    assert lengths == {whole[0]["tokens"] - 64}


def test_attn_table_and_maps(model: Path, tmp_path: Path) -> None:
    """The picture has a cell for each layer and head, as dark as the density is."""
    path = tmp_path / "maps.png"
    args = ("--model", str(model), "--video", PANCAKE, "--num-frames", "4", "--question", "What?", "--out", str(path))
    result = invoke("attn", "--config", "sliding_vertical", *SETTINGS, *args)
    assert result.exit_code == 0, result.stderr
    assert "worst head" in result.stdout and "mean recall" in result.stdout
    loaded, _, inputs = prompt(model, 4)
    method = load_config("sliding_vertical", **{f"attention.{k}": v for k, v in _reduced().items()}).attention
    assert method is not None
    layers: list[HeadRecall] = []
    observed(loaded, inputs, lambda one: layers.append(measure(method, one)))
    for one in layers:
        assert f"{one.recall.mean():.3f}" in result.stdout and f"(head {int(one.recall.argmin())})" in result.stdout
    assert np.array_equal(np.array(Image.open(path)), np.array(attention_maps(layers)))


def test_maps() -> None:
    """More density is darker, and the maps show which pairs were seen."""
    shares = torch.zeros(2, 2, 2)
    shares[:, 0, 0] = shares[:, 1, 1] = 1.0
    layers = [HeadRecall(i, 8, torch.tensor([0.5, 1.0]), torch.tensor([0.1, 0.9]), shares) for i in range(12)]
    picture = torch.from_numpy(np.array(attention_maps(layers).convert("L"))).int()
    cells = 12 * 14
    left, right = 12 + 34, 12 + picture.shape[1] // 2 + 34  # of recall and density
    rows = slice(12 + 14, 12 + 14 + cells)
    for start in (left, right):
        light, dark = picture[rows, start : start + 14], picture[rows, start + 14 : start + 28]
        assert (light == light[0, 0]).all() and (dark == dark[0, 0]).all() and light[0, 0] > dark[0, 0] + 50
    first = picture[cells + 2 * 12 + 2 * 14 :, 12 : 12 + 128][:128]
    quarters = [int(first[y, x]) for y in (32, 96) for x in (32, 96)]
    assert quarters[0] == quarters[3] < quarters[1] - 50 and quarters[1] == quarters[2]


@pytest.mark.parametrize(
    ("args", "culprits"),
    [
        (("--config", "divprune"), ("'divprune' has no attention method",)),
        (("--config", "nonsense"), ("'nonsense'",)),
        (("--config", "sliding_vertical", "--set", "attention.window=0"), ("attention.window",)),
        (("--config", "sliding_vertical", "--device", "tpu"), ("'tpu'",)),
    ],
)
def test_attn_refuses(args: Sequence[str], culprits: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "load_model", None)  # before a model is loaded
    assert_refused(invoke("attn", "--video", SHORT, *args), *culprits)


@pytest.mark.parametrize(
    ("args", "culprits"),
    [
        (("--out", "/no/such/folder/maps.png"), ("--out", "/no/such/folder/maps.png")),
        (("--out", "maps.nothing"), (".nothing",)),
        (("--video", "missing.mp4"), ("missing.mp4",)),
        (("--num-frames", "9"), ("9", "3")),
    ],
)
def test_attn_refuses_files(args: Sequence[str], culprits: Sequence[str], model: Path) -> None:
    video = () if "--video" in args else ("--video", SHORT)
    assert_refused(invoke("attn", "--config", "sliding_vertical", "--model", str(model), *video, *args), *culprits)


def test_attn_refuses_a_long_prompt(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spatiotoken.attention.recall.MAX_LENGTH", 100)
    args = ("--config", "sliding_vertical", "--model", str(model), "--video", PANCAKE, "--num-frames", "16")
    assert_refused(invoke("attn", *args), "at most 100 can be measured: use fewer frames")


# --------------------------------------------------------------------------------------------------------- calibrate


def test_calibrate_writes_a_config_that_patches_the_model(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    args = ("--model", str(model), "--video", PANCAKE, "--video", SHORT, "--num-frames", "3", "--density", "0.4")
    result = invoke("calibrate", *args, "--config", "minference", *SMALL, "--out", str(path))
    assert result.exit_code == 0, result.stderr
    assert "heads of each kind" in result.stdout

    written = load_config(path)
    before = load_config("minference", **{"attention.block": 8, "attention.sink": 2, "attention.local": 4})
    loaded, processor, inputs = prompt(model, 4)
    heads = written.to_dict()["attention"]["heads"]
    assert [len(layer) for layer in heads] == [4] * loaded.config.text_config.num_hidden_layers
    assert load_config(written, **{"attention.heads": []}) == before, "everything else is kept"
    with patched(loaded, str(path)), torch.inference_mode():
        loaded(**inputs)
        assert last_report(loaded).stages["attention"].method == "minference"

    # What the file says is used: the heads of a layer see what their patterns say.
    densities: list[float] = []
    method = written.attention
    assert method is not None

    def visit(one: PrefillInputs) -> None:
        densities.append(float(seen_pairs(method, one).sum()) / (4 * one.length * (one.length + 1) / 2))

    observed(loaded, inputs, visit)
    assert all(0 < density < 1 for density in densities)


def test_calibrated_takes_what_most_prompts_want(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, processor, inputs = prompt(model, 3)
    layers = loaded.config.text_config.num_hidden_layers
    answers = iter(["a_shape:1:2"] * layers + ["block_sparse:3"] * layers + ["a_shape:1:2"] * layers)
    asked: list[float] = []

    def search(one: PrefillInputs, density: float, *, method: Any) -> tuple[str, ...]:
        asked.append(density)
        return (next(answers),) * one.query.shape[0]

    monkeypatch.setattr("spatiotoken.calibration.search_heads", search)
    config = load_config("minference").model_copy(update={"images": True, "tokens": load_config("evs").tokens})
    found = calibrated(loaded, [inputs] * 3, config, density=0.3, processor=processor)
    assert found.to_dict()["attention"]["heads"] == [["a_shape:1:2"] * 4] * layers
    assert found.images and found.tokens == config.tokens and asked == [0.3] * 3 * layers
    with pytest.raises(ValueError, match="no prompts"):
        calibrated(loaded, [], config)


@pytest.mark.parametrize(
    ("args", "culprits"),
    [
        (("--config", "sliding_vertical"), ("'sliding_vertical'", "no field 'heads'")),
        (("--config", "divprune"), ("no attention method",)),
        (("--density", "0"), ("--density", "0")),
        (("--density", "1.5"), ("--density", "1.5")),
    ],
)
def test_calibrate_refuses(
    args: Sequence[str], culprits: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "load_model", None)
    path = tmp_path / "heads.yaml"
    assert_refused(invoke("calibrate", "--video", SHORT, "--out", str(path), *args), *culprits)
    assert not path.exists()


def test_calibrate_refuses_files(model: Path, tmp_path: Path) -> None:
    args = ("calibrate", "--model", str(model), "--num-frames", "3", *SMALL)
    assert_refused(invoke(*args, "--video", "missing.mp4", "--out", str(tmp_path / "heads.yaml")), "missing.mp4")
    assert_refused(invoke(*args, "--video", SHORT, "--out", "/no/such/heads.yaml"), "--out", "/no/such/heads.yaml")


def test_models_without_full_attention(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with windows of their own are not looked at; a model may have no others."""
    for module in ("spatiotoken.attention.observe", "spatiotoken.calibration"):
        monkeypatch.setattr(f"{module}.observed", lambda *args, **kwargs: None)
    args = ("--model", str(model), "--video", SHORT, "--num-frames", "3")
    assert_refused(invoke("attn", "--config", "sliding_vertical", *args), str(model), "no layer with full attention")
    path = tmp_path / "heads.yaml"
    assert_refused(invoke("calibrate", *args, "--out", str(path)), "no layers with full attention")
    assert not path.exists()


def _reduced() -> dict[str, Any]:
    return REDUCED["attention", "sliding_vertical"]
