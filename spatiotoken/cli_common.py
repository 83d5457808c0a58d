"""What the commands share: options, how bad usage is reported, and how a config, a video and a model are read."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spatiotoken.config import PatchConfig
    from spatiotoken.video import Video

DEFAULT_FRAMES = 64
PROBE_MODEL = "qwen2_5_vl"

# Newer versions of typer bring a click of their own, so its errors are found through one that typer exports.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]


class Group(TyperGroup):
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
        except USAGE_ERROR as error:
            message = error.format_message()  # type: ignore[attr-defined]
            print(f"spatiotoken: error: {' '.join(message.split())}", file=sys.stderr)
            code = 2
        except typer.Abort:
            print("spatiotoken: aborted", file=sys.stderr)
            code = 1
        sys.exit(code)


ConfigName = Annotated[str, typer.Argument(help="a preset's name or the path of a .yaml file")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="STAGE.KEY=VALUE", help="change a key of the config; repeatable")
]
CandidateFps = Annotated[float, typer.Option(help="frames a second that a frames method chooses among in a file")]
KeyframesOnly = Annotated[
    bool,
    typer.Option("--keyframes-only", help="choose among the file's key frames, which is several times as fast"),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout and nothing else")]


def quiet_libraries() -> None:
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def status(text: str) -> Any:
    return Console(stderr=True, markup=False, highlight=False).status(text)


def video_errors() -> tuple[type[Exception], ...]:
    from spatiotoken.video import BackendUnavailableError, VideoReadError

    return VideoReadError, BackendUnavailableError


def read_video(path: str, num_frames: int | None) -> Video:
    from spatiotoken.video import load_video, probe_video

    return load_video(path, num_frames=num_frames or min(DEFAULT_FRAMES, probe_video(path).num_frames))


def load(model: str, dtype_name: str, device_name: str) -> tuple[PreTrainedModel, Any]:
    from spatiotoken.answer import ModelLoadError, resolve_device, resolve_dtype
    from spatiotoken.probe.evaluate import load_probe_model

    with bad_input(ValueError):
        dtype, device = resolve_dtype(dtype_name), resolve_device(device_name)
    with bad_input(ModelLoadError), status("loading the model"):
        return load_probe_model(model, dtype=dtype, device=device)


def resolve(config: str, settings: list[str] | None) -> PatchConfig:
    from spatiotoken.config import ConfigError, load_config

    overrides = parse_settings(settings)
    with bad_input(ConfigError):
        return load_config(config, **overrides)


def parse_settings(
    settings: list[str] | None, flag: str = "--set", form: str = "STAGE.KEY=VALUE, such as tokens.retention=0.25"
) -> dict[str, Any]:
    """What ``KEY=VALUE`` says, the values read as YAML."""
    import yaml

    found = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise USAGE_ERROR(f"{flag} {setting!r} is not {form}")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise USAGE_ERROR(f"{flag} {setting!r}: {value!r} is not a YAML value") from None
    return found


@contextlib.contextmanager
def bad_input(*errors: type[Exception]) -> Iterator[None]:
    """What these errors say is the caller's to mend, and not a bug."""
    try:
        yield
    except errors as error:
        raise USAGE_ERROR(str(error)) from error


def stdout() -> Console:
    return Console(markup=False, highlight=False)
