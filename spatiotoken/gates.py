"""Files of trained weights that a few methods may be given."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


def gate_tensors(method: str, path: Path, prefix: str, device: torch.device) -> dict[str, Tensor]:
    """By the rest of their names the tensors of a method's file whose names have ``prefix`` in them.

    Only these are read, anew each time: nothing is kept beyond the call, and a file that changed is seen.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{method}: no file of gate weights at {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            names = [name for name in file.keys() if prefix in name]  # noqa: SIM118: it is no mapping
            return {name.rpartition(prefix)[2]: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{method}: {path} is no safetensors file (convert a .pth file): {error}") from error
