"""Which reader opens a file."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from .decord import DecordReader
from .pyav import PyAVReader
from .reader import BackendUnavailableError, VideoReader
from .torchcodec import TorchCodecReader
from .types import VideoReadError, read_error

logger = logging.getLogger(__name__)

_READERS: dict[str, Callable[[str], VideoReader]] = {
    "torchcodec": TorchCodecReader,
    "pyav": PyAVReader,
    "decord": DecordReader,
}


def open_reader(path: str | os.PathLike[str], backend: str) -> VideoReader:
    """Open the best video stream of a file: the one with most pixels, then most frames; never cover art.

    Args:
        path: a local file.
        backend: "torchcodec", "pyav", "decord", or "auto": the first of torchcodec and PyAV that is installed and
            exact for this file, or decord if neither is installed.

    Raises:
        ValueError: unknown backend.
        ImportError: the backend, or any at all, is not installed; the message names the package to install.
        VideoReadError: the file cannot be read.
    """
    if backend != "auto" and backend not in _READERS:
        raise ValueError(f"unknown video backend {backend!r}; supported: 'auto', {', '.join(map(repr, _READERS))}")
    path = os.fspath(path)
    if not os.path.exists(path):
        raise read_error(path, "no such file")
    if os.path.isdir(path):
        raise read_error(path, "it is a directory, not a video file")
    if os.path.getsize(path) == 0:
        raise read_error(path, "the file is empty")
    try:
        return _READERS[backend](path) if backend != "auto" else _open_auto(path)
    except OSError as error:
        raise read_error(path, error) from error


def _open_auto(path: str) -> VideoReader:
    failures: list[VideoReadError] = []
    missing: list[BackendUnavailableError] = []
    try:
        for name, reader in _READERS.items():
            if name == "decord" and failures:
                break  # exact readers are there and could not read the file: decord is no remedy
            try:
                return reader(path)
            except BackendUnavailableError as error:
                missing.append(error)
            except VideoReadError as error:
                logger.debug("not reading with %s: %s", name, error)
                failures.append(error)
        if failures:
            # The last reader tried is the least restricted one, so its reason says most about the file.
            raise failures[-1]
        raise BackendUnavailableError("no video backend can be loaded: " + "; ".join(map(str, missing)))
    finally:
        # Kept errors hold this frame and with it themselves, so files would stay open until a garbage collection.
        failures.clear()
        missing.clear()
