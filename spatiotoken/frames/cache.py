"""Descriptions of frames that outlive the process, for the next question about the same video."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from spatiotoken.frames.encoders import Described
from spatiotoken.frames.keys import content_key, key, tensor_key

_log = logging.getLogger(__name__)


class FeatureCache:
    """One file for each description, in a directory that is made when the first is put there.

    A key has to name all that the description depends on: the encoder (``FrameEncoder.identity``), the video
    (``content_key``), which frames of it at what size, and whether patches were asked for. Patches are large, as a file
    and in memory: an hour at one frame a second takes a few megabytes without, and up to several gigabytes with them.
    Nothing is ever deleted; the directory may be, at any time. Several processes may use it at once.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory).expanduser()

    def get(self, key: str) -> Described | None:
        """What was put under the key; None if there is nothing, or (with a logged warning) nothing that can be read."""
        path = self._path(key)
        try:
            tensors = load_file(path)
            return _checked(tensors)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError) as error:
            _log.warning("%s is not a readable description of frames, which are described anew: %s", path, error)
            return None

    def put(self, key: str, described: Described) -> None:
        """Keep a description, in the place of what was there under that key.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {"features": described.features.contiguous()}
        if described.patches is not None:
            tensors["patches"] = described.patches.contiguous()
        temporary = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            # In the same directory, so that renaming it is one step and nobody ever reads half a file.
            handle, temporary = tempfile.mkstemp(prefix=f"{key}.", suffix=".tmp", dir=self.directory)
            os.close(handle)
            save_file(tensors, temporary)
            os.replace(temporary, self._path(key))
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"cannot keep features of frames in {str(self.directory)!r} ({error}): name another directory, or turn "
                "this off by `scorer: {cache: null}`"
            ) from error
        finally:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    def get_or_put(self, key: str, make: Callable[[], Described]) -> Described:
        """What is kept under the key; what ``make`` gives, kept from now on, if there is nothing."""
        described = self.get(key)
        if described is None:
            described = make()
            self.put(key, described)
        return described

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.safetensors"


def _checked(tensors: dict[str, torch.Tensor]) -> Described:
    unknown = tensors.keys() - {"features", "patches"}
    if unknown or "features" not in tensors or any(x.dtype != torch.float32 for x in tensors.values()):
        raise ValueError(f"it holds {sorted(tensors)}")
    return Described(**tensors)


__all__ = ["FeatureCache", "content_key", "key", "tensor_key"]
