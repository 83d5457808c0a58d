"""Commands of the ``attention`` stage: what a method sees of the true attention, and the search for its heads."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from spatiotoken.cli_common import (
    DEFAULT_FRAMES,
    PROBE_MODEL,
    USAGE_ERROR,
    JsonFlag,
    Settings,
    bad_input,
    load,
    quiet_libraries,
    read_video,
    resolve,
    status,
    stdout,
    video_errors,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spatiotoken.attention.base import PrefillInputs
    from spatiotoken.attention.recall import HeadRecall
    from spatiotoken.config import PatchConfig

_Model = Annotated[str, typer.Option(help="model id or directory; by default a small one that comes along")]
_Question = Annotated[str, typer.Option(help="what is asked about the video")]
_NumFrames = Annotated[
    int | None, typer.Option(min=1, help=f"frames to read, at equal distances; by default {DEFAULT_FRAMES}, or all")
]
_Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16")]
_Device = Annotated[str, typer.Option(help="auto (the first GPU, else the CPU), cpu, cuda or cuda:N")]


def attn(
    video: Annotated[str, typer.Option(help="video file")],
    config: Annotated[str, typer.Option(help="a preset with an attention method, or the path of a .yaml file")],
    settings: Settings = None,
    question: _Question = "Describe the video.",
    model: _Model = PROBE_MODEL,
    num_frames: _NumFrames = None,
    out: Annotated[Path | None, typer.Option(help="picture file for maps of layers and heads")] = None,
    dtype: _Dtype = "auto",
    device: _Device = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Say how much of the true attention mass a sparse method sees, by layer and head, and how much it computes."""
    from spatiotoken.attention.observe import observed
    from spatiotoken.attention.recall import PromptTooLongError, measure

    resolved = resolve(config, settings)
    method = resolved.attention
    if method is None:
        raise USAGE_ERROR(f"config {config!r} has no attention method")
    layers: list[HeadRecall] = []

    def visit(inputs: PrefillInputs) -> None:
        layers.append(measure(method, inputs))

    with contextlib.redirect_stdout(sys.stderr):
        quiet_libraries()
        loaded, processor = _load(model, dtype, device, resolved)
        prompt = _prompt(loaded, processor, video, question, num_frames)
        with bad_input(PromptTooLongError), status("looking at the layers"):
            observed(loaded, prompt, visit, config=resolved, processor=processor)
        if not layers:
            raise USAGE_ERROR(f"model {model!r} has no layer with full attention to look at")
        if out is not None:
            _save_maps(layers, out)
    if as_json:
        document = {"config": {"name": config} | resolved.to_dict(), "model_type": loaded.config.model_type}
        print(json.dumps(document | {"layers": [_layer_json(one) for one in layers]}, indent=2))
    else:
        stdout().print(_recall_table(layers, config))


def calibrate(
    video: Annotated[list[str], typer.Option(help="video file; repeatable")],
    out: Annotated[Path, typer.Option(help="where to write the config, a .yaml file")],
    config: Annotated[
        str, typer.Option(help="a preset whose attention method tells kinds of heads apart, or a .yaml file")
    ] = "minference",
    settings: Settings = None,
    density: Annotated[float, typer.Option(help="share of the pairs that each head may compute")] = 0.1,
    question: _Question = "Describe the video.",
    model: _Model = PROBE_MODEL,
    num_frames: _NumFrames = None,
    dtype: _Dtype = "auto",
    device: _Device = "auto",
) -> None:
    """Search which kind of sparse attention suits each head of a model, on videos, and write a config that says so."""
    from spatiotoken.calibration import calibrated, method_with_heads

    resolved = resolve(config, settings)
    if not 0 < density <= 1:
        raise USAGE_ERROR(f"--density {density} is no share: it must be above 0 and at most 1")
    with contextlib.redirect_stdout(sys.stderr):
        quiet_libraries()
        with bad_input(ValueError):
            method_with_heads(resolved)
        loaded, processor = _load(model, dtype, device, resolved)
        prompts = (_prompt(loaded, processor, path, question, num_frames) for path in video)
        with bad_input(ValueError):
            found = calibrated(loaded, prompts, resolved, density=density, processor=processor)
    try:
        out.write_text(found.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise USAGE_ERROR(f"cannot write --out {str(out)!r}: {error}") from error
    stdout().print(_heads_table(found.to_dict()["attention"]["heads"], config))


def _load(model: str, dtype: str, device: str, config: PatchConfig) -> tuple[PreTrainedModel, Any]:
    """Refuses a config that does not fit the model."""
    from spatiotoken.patching import patched

    loaded, processor = load(model, dtype, device)
    with bad_input(ValueError), patched(loaded, config, processor=processor):
        return loaded, processor


def _prompt(
    model: PreTrainedModel, processor: Any, path: str, question: str, num_frames: int | None
) -> Mapping[str, Any]:
    from spatiotoken.answer import prepare_inputs, video_metadata

    with bad_input(ValueError, *video_errors()), status("reading the video"):
        video = read_video(path, num_frames)
        inputs = prepare_inputs(processor, video.frames, question, video_metadata(video))
    return inputs.to(model.device, model.dtype)


def _save_maps(layers: list[HeadRecall], path: Path) -> None:
    from spatiotoken.viz.attention_maps import save_attention_maps

    try:
        save_attention_maps(layers, path)
    except (OSError, ValueError) as error:
        raise USAGE_ERROR(f"cannot write --out {str(path)!r}: {error}") from error


def _layer_json(one: HeadRecall) -> dict[str, Any]:
    return {
        "layer": one.layer,
        "tokens": one.length,
        "recall": one.recall.tolist(),
        "density": one.density.tolist(),
    }


def _recall_table(layers: list[HeadRecall], config: str) -> Table:
    table = Table("layer", "tokens", "recall", "worst head", "density", title=f"config {config}", title_justify="left")
    for one in layers:
        worst = int(one.recall.argmin())
        row = (f"{one.recall.mean():.3f}", f"{one.recall[worst]:.3f} (head {worst})", f"{one.density.mean():.3f}")
        table.add_row(str(one.layer), str(one.length), *row)
    recall, density = (sum(float(getattr(one, name).mean()) for one in layers) for name in ("recall", "density"))
    table.caption = f"mean recall {recall / len(layers):.3f} at a density of {density / len(layers):.3f}"
    return table


def _heads_table(heads: list[list[str]], config: str) -> Table:
    kinds = sorted({head.split(":")[0] for layer in heads for head in layer})
    table = Table("layer", *kinds, title=f"config {config}", title_justify="left", caption="heads of each kind")
    for number, layer in enumerate(heads):
        counts = Counter(head.split(":")[0] for head in layer)
        table.add_row(str(number), *(str(counts[kind]) for kind in kinds))
    return table
