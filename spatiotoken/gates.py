"""Files of trained weights that a few methods may be given."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


@functools.cache
def load_gates(method: str, path: Path, device: torch.device) -> dict[str, Tensor]:
    """All tensors of a method's file, read once.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{method}: no file of gate weights at {path}")
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{method}: {path} is no safetensors file (convert a .pth file): {error}") from error
