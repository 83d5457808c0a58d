"""What a ``VideoCache`` holds: features of pictures, in memory and in files, and which go when there is no room."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

_log = logging.getLogger(__name__)

FIELDS = ("pooler_output", "deepstack_features")
"""Fields of a feature extractor's output that models read, and that `generate` hands on."""

T = TypeVar("T")


@dataclass
class EncodedPictures(BaseModelOutputWithPooling):
    """What tower and projector made of pictures: what the language model reads of it, nothing else."""

    deepstack_features: Any = None


class Recent(Generic[T]):
    """Values by name, of which the least recently used ones go when there is no room. Threads may share it."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._values: OrderedDict[str, tuple[T, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> T | None:
        with self._lock:
            if name not in self._values:
                return None
            self._values.move_to_end(name)
            return self._values[name][0]

    def put(self, name: str, value: T, nbytes: int) -> None:
        if nbytes > self.max_bytes:
            return  # everything else would go for it, and it could not stay either
        with self._lock:
            self.nbytes += nbytes - self._values.pop(name, (None, 0))[1]
            self._values[name] = value, nbytes
            while self.nbytes > self.max_bytes:
                self.nbytes -= self._values.popitem(last=False)[1][1]


@dataclass(frozen=True, eq=False)
class Features:
    """An output taken apart.

    Attributes:
        parts: JSON of its fields, in which numbers stand for ``tensors``.
        tensors: on the host, in nobody else's memory.
    """

    parts: str
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def output(self, device: torch.device) -> EncodedPictures:
        """A copy, since methods write into what they are given."""
        return put_together(json.loads(self.parts), [tensor.to(device, copy=True) for tensor in self.tensors])

    def write(self, path: Path) -> None:
        """
        Raises:
            OSError: the file cannot be written.
        """
        tensors = {str(number): tensor for number, tensor in enumerate(self.tensors)}
        temporary = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # In the same directory, so that renaming it is one step and nobody ever reads half a file.
            handle, temporary = tempfile.mkstemp(prefix=f"{path.stem}.", suffix=".tmp", dir=path.parent)
            os.close(handle)
            save_file(tensors, temporary, metadata={"parts": self.parts})
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            raise OSError(f"cannot keep features of pictures in {str(path.parent)!r} ({error})") from error
        finally:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)


def read_features(path: Path) -> Features | None:
    """What was written; None if there is nothing, or (with a logged warning) nothing that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            parts = (file.metadata() or {})["parts"]
            found = Features(parts, tuple(file.get_tensor(str(number)) for number in range(len(file.keys()))))
        put_together(json.loads(parts), found.tensors)
        return found
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        _log.warning("%s does not hold features of pictures that can be read; they are made anew: %s", path, error)
        return None


def taken_apart(value: Any, tensors: list[Tensor]) -> Any:
    """``value`` as JSON, its tensors put at the end of ``tensors``.

    Raises:
        TypeError: it is no tensor, nor a list or tuple of such.
    """
    if value is None:
        return None
    if isinstance(value, Tensor):
        tensors.append(value)
        return len(tensors) - 1
    if isinstance(value, list | tuple):
        return {type(value).__name__: [taken_apart(part, tensors) for part in value]}
    raise TypeError(f"features of pictures are tensors, or lists or tuples of them, not {type(value).__name__}")


def put_together(fields: Mapping[str, Any], tensors: Iterable[Tensor]) -> EncodedPictures:
    """The inverse of ``taken_apart``, field by field."""
    numbered = list(tensors)

    def part(value: Any) -> Any:
        if value is None or isinstance(value, int):
            return None if value is None else numbered[value]
        ((kind, inner),) = value.items()
        return {"list": list, "tuple": tuple}[kind](map(part, inner))

    return EncodedPictures(**{field: part(fields[field]) for field in FIELDS})


def on_host(tensor: Tensor) -> Tensor:
    # Features are often parts of one tensor, which would all be kept in memory by one of them.
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
