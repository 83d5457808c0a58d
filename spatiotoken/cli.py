"""The command line. Torch and transformers are imported inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from spatiotoken import __version__

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from spatiotoken.answer import Answer, Dtype
    from spatiotoken.config import PatchConfig
    from spatiotoken.video import Video

DEFAULT_FRAMES = 64

# Newer versions of typer bring a click of their own, so its errors are found through one that typer exports.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]


class _Group(TyperGroup):
    """Reports bad usage in one line on stderr, with exit code 2; any other exception gives its traceback."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except _USAGE_ERROR as error:
            message = error.format_message()  # type: ignore[attr-defined]
            print(f"spatiotoken: error: {' '.join(message.split())}", file=sys.stderr)
            code = 2
        except typer.Abort:
            print("spatiotoken: aborted", file=sys.stderr)
            code = 1
        sys.exit(code)


app = typer.Typer(
    cls=_Group, help="Cheaper video LLMs, without training.", add_completion=False, pretty_exceptions_enable=False
)

_Config = Annotated[str, typer.Argument(help="a preset's name or the path of a .yaml file")]
_Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="STAGE.KEY=VALUE", help="change a key of the config; repeatable")
]
_Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout and nothing else")]


def main() -> None:
    """Entry point of the ``spatiotoken`` command."""
    app(prog_name="spatiotoken")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"spatiotoken {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version and exit")
    ] = False,
) -> None: ...


@app.command("list")
def list_(as_json: _Json = False) -> None:
    """List stages with their methods and parameters, presets and supported models."""
    from spatiotoken.catalog import available

    catalog = available()
    if as_json:
        print(json.dumps(catalog, indent=2))
        return
    console = _stdout()
    for stage, methods in catalog["methods"].items():
        table = Table("method", "summary", "parameters", "arXiv", title=f"stage {stage}", title_justify="left")
        for method in methods:
            parameters = "\n".join(f"{entry['name']}={entry['default']}" for entry in method["parameters"])
            table.add_row(method["name"], method["summary"], parameters, method["paper"] or "")
        console.print(table)
    table = Table("preset", "description", title="presets", title_justify="left")
    for preset in catalog["configs"]:
        table.add_row(preset["name"], preset["description"])
    console.print(table)
    console.print("models: " + ", ".join(catalog["models"]))


@app.command()
def show(config: _Config, settings: _Set = None, as_json: _Json = False) -> None:
    """Print the resolved config, as YAML or JSON."""
    resolved = _resolve(config, settings)
    print(json.dumps(resolved.to_dict(), indent=2) if as_json else resolved.to_yaml(), end="\n" if as_json else "")


@app.command()
def schema() -> None:
    """Print the JSON schema of config files, for editors."""
    from spatiotoken.config import config_schema

    print(json.dumps(config_schema(), indent=2))


@app.command()
def run(
    video: Annotated[str, typer.Option(help="video file")],
    question: Annotated[str, typer.Option(help="what to ask about it")],
    model: Annotated[
        str | None,
        typer.Option(help="model id or directory; without it a tiny one with random weights, which answers gibberish"),
    ] = None,
    config: Annotated[str, typer.Option(help="a preset's name or the path of a .yaml file")] = "balanced",
    settings: _Set = None,
    num_frames: Annotated[
        int | None,
        typer.Option(min=1, help=f"frames to read; by default {DEFAULT_FRAMES}, or all if the video has fewer"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="length of the answer at most")] = 64,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto (the first GPU, else the CPU), cpu, cuda or cuda:N")] = "auto",
    as_json: _Json = False,
) -> None:
    """Ask a question about a video."""
    resolved = _resolve(config, settings)
    # Libraries that print do it on stderr: stdout is for the result alone.
    with contextlib.redirect_stdout(sys.stderr):
        answer, model_type = _answer(resolved, video, question, model, num_frames, max_new_tokens, dtype, device)
    if as_json:
        print(json.dumps(_answer_json(answer, {"name": config} | resolved.to_dict(), model_type), indent=2))
        return
    print(answer.text)
    _stdout().print(_report_table(answer, config))


def _answer(
    config: PatchConfig,
    path: str,
    question: str,
    model: str | None,
    num_frames: int | None,
    max_new_tokens: int,
    dtype_name: str,
    device_name: str,
) -> tuple[Answer, str]:
    from transformers.utils import logging

    from spatiotoken.answer import ModelLoadError, PromptError, answer_video, resolve_device, resolve_dtype
    from spatiotoken.patching import patch_model
    from spatiotoken.video import BackendUnavailableError, VideoReadError

    console = Console(stderr=True, markup=False, highlight=False)
    if not console.is_terminal:
        logging.disable_progress_bar()
    with _bad_input(ValueError):
        dtype, device = resolve_dtype(dtype_name), resolve_device(device_name)
    with _bad_input(VideoReadError, BackendUnavailableError), console.status("reading the video"):
        video = _read(path, num_frames)
    if model is None:
        print("no --model given: using a tiny one with random weights, so the answer is gibberish", file=sys.stderr)
    with _bad_input(ModelLoadError), console.status("loading the model"):
        loaded, processor = _load(model, dtype, device)
    with _bad_input(ValueError):
        patch_model(loaded, config)
    with _bad_input(PromptError), console.status("generating the answer"):
        answer = answer_video(loaded, processor, video, question, max_new_tokens=max_new_tokens)
    return answer, loaded.config.model_type


def _read(path: str, num_frames: int | None) -> Video:
    from spatiotoken.video import load_video, probe_video

    return load_video(path, num_frames=num_frames or min(DEFAULT_FRAMES, probe_video(path).num_frames))


def _load(model: str | None, dtype: Dtype, device: torch.device) -> tuple[PreTrainedModel, Any]:
    from spatiotoken.answer import load_model
    from spatiotoken.probe import build_tiny

    if model is not None:
        return load_model(model, dtype=dtype, device=device)
    with tempfile.TemporaryDirectory() as directory:
        return load_model(build_tiny("qwen2_5_vl", directory), dtype=dtype, device=device)


def _resolve(config: str, settings: list[str] | None) -> PatchConfig:
    import yaml

    from spatiotoken.config import ConfigError, load_config

    overrides = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise _USAGE_ERROR(f"--set {setting!r} is not STAGE.KEY=VALUE, such as tokens.retention=0.25")
        try:
            overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise _USAGE_ERROR(f"--set {setting!r}: {value!r} is not a YAML value") from None
    with _bad_input(ConfigError):
        return load_config(config, **overrides)


@contextlib.contextmanager
def _bad_input(*errors: type[Exception]) -> Iterator[None]:
    """What these errors say is the caller's to mend, and not a bug."""
    try:
        yield
    except errors as error:
        raise _USAGE_ERROR(str(error)) from error


def _answer_json(answer: Answer, config: dict[str, Any], model_type: str) -> dict[str, Any]:
    report = answer.report.to_dict()
    return {
        "answer": answer.text,
        "config": config,
        "model_type": model_type,
        "tokens": {
            "prompt": report["prompt_tokens"],
            "visual": report["visual_tokens"],
            "visual_kept": report["visual_kept"],
            "text": report["text_tokens"],
        },
        "stages": report["stages"],
        "prefill_ms": report["prefill_ms"],
        "decode_ms": report["decode_ms"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "frames": {"indices": list(answer.frame_indices), "seconds": list(answer.frame_seconds)},
    }


def _report_table(answer: Answer, config: str) -> Table:
    report = answer.report
    table = Table("", "tokens in", "tokens out", "ms", title=f"config {config}", title_justify="left")
    for stage, entry in report.stages.items():
        row = (str(entry.tokens_in), str(entry.tokens_out), f"{entry.milliseconds:.1f}")
        table.add_row(f"{stage}: {entry.method}", *row)
    prompt, kept = report.prompt_tokens, report.text_tokens + report.visual_kept
    table.add_row("prompt, its visual tokens reduced", str(prompt), str(kept), f"{report.prefill_ms:.1f}")
    table.add_row("decoding", "", str(report.decode_steps), f"{report.decode_ms:.1f}")
    table.caption = f"{len(answer.frame_indices)} frames seen, peak memory {report.peak_memory_bytes / 2**20:.0f} MiB"
    return table


def _stdout() -> Console:
    return Console(markup=False, highlight=False)


if __name__ == "__main__":
    main()
