"""Names for things by their content: equal for equal content, whatever it is called and wherever it lies."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

_CHUNK = 1 << 20
_MODEL_FILES = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja")


def key(*parts: str | bytes) -> str:
    """Hex digest of a sequence of parts; other parts, or the same ones cut or typed differently, give another."""
    digest = _new()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(f"{type(part).__name__} {len(data)} ".encode())
        digest.update(data)
    return digest.hexdigest()


def content_key(path: str | Path) -> str:
    """Hex digest of a file's bytes, which are read in pieces."""
    digest = _new()
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def tensor_key(tensor: Tensor) -> str:
    """Hex digest of a tensor's dtype, shape and values, on whatever device it is."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return key(str(tensor.dtype), str(tuple(tensor.shape)), flat.numpy().tobytes())


def model_key(directory: str | Path) -> str:
    """Hex digest of the weights and settings in a model's directory, wherever that is."""
    files = sorted(file for file in Path(directory).iterdir() if file.suffix in _MODEL_FILES and file.is_file())
    return key(*(part for file in files for part in (file.name, content_key(file))))


def _new() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=20)
