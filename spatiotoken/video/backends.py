"""Which reader opens a file."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from .decord import DecordReader
from .pyav import PyAVReader
from .reader import BackendUnavailableError, NotExactError, VideoReader
from .torchcodec import TorchCodecReader
from .types import read_error

logger = logging.getLogger(__name__)

_READERS: dict[str, Callable[[str], VideoReader]] = {
    "pyav": PyAVReader,
    "torchcodec": TorchCodecReader,
    "decord": DecordReader,
}


def open_reader(path: str | os.PathLike[str], backend: str) -> VideoReader:
    """Open the best video stream of a file: the one with most pixels, then most frames; never cover art.

    Args:
        path: a local file.
        backend: "pyav", "torchcodec", "decord", or "auto": PyAV, which is exact on every file and sees damage within
            one; where it is not installed, torchcodec for the files it is exact on; decord only if neither is there.

    Raises:
        ValueError: unknown backend.
        ImportError: the backend, or any at all, is not installed; the message names the package to install.
        VideoReadError: the file cannot be read.
    """
    if backend != "auto" and backend not in _READERS:
        raise ValueError(f"unknown video backend {backend!r}; supported: 'auto', {', '.join(map(repr, _READERS))}")
    path = os.fsdecode(path)
    if not os.path.exists(path):
        raise read_error(path, "no such file")
    if os.path.isdir(path):
        raise read_error(path, "it is a directory, not a video file")
    if not os.path.isfile(path):
        raise read_error(path, "it is not a regular file")
    if os.path.getsize(path) == 0:
        raise read_error(path, "the file is empty")
    # Absolute, since FFmpeg would take what stands before a colon for a protocol.
    path = os.path.abspath(path)
    try:
        return _READERS[backend](path) if backend != "auto" else _open_auto(path)
    except OSError as error:
        raise read_error(path, error) from error


def _open_auto(path: str) -> VideoReader:
    missing: list[str] = []
    for name, reader in _READERS.items():
        try:
            return reader(path)
        except BackendUnavailableError as error:
            missing.append(str(error))
            logger.debug("not reading with %s: %s", name, error)
        except NotExactError as error:
            if name == "torchcodec":
                # decord is exact on still fewer files.
                raise read_error(path, f"{error} (PyAV reads such files: pip install av)") from error
            raise
    raise BackendUnavailableError("no video backend can be loaded: " + "; ".join(missing))
