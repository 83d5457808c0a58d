"""Block-sparse attention by flash-attention 4, which takes the block lists and the mask of torch's flex attention."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from spatiotoken.attention.kernels.flex import attend
from spatiotoken.attention.kernels.forward_only import forward_only
from spatiotoken.attention.kernels.pattern import SparsePattern, Valid

# Queries and keys that its kernels skip at once, by major compute capability: Hopper, Blackwell.
TILES = {9: (128, 128), 10: (256, 128), 11: (256, 128)}
DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 128


def unavailable(device: torch.device) -> str | None:
    """Why the backend cannot run on a device; None where it can."""
    # Parts of a package that is not there cannot be looked for.
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        return "flash-attention 4 is not installed (pip install 'spatiotoken[flash4]')"
    if device.type != "cuda":
        return f"it needs CUDA tensors, not {device.type}"
    major = torch.cuda.get_device_capability(device)[0]
    if major not in TILES:
        return f"flash-attention 4 skips blocks on GPUs of compute capability {', '.join(map(str, TILES))}, not {major}"
    return None


@forward_only("flex_flash")
def flex_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: SparsePattern, *, scale: float, valid: Valid | None = None
) -> Tensor:
    """As `spatiotoken.attention.kernels.flex.flex_attention`, in tiles of 128 or 256 queries by 128 keys.

    Where the pattern's blocks are smaller, tiles are computed whole and masked, so patterns of blocks as large gain
    most.

    Raises:
        RuntimeError: for float32 or head sizes above 128; where compilation is switched off.
    """
    if query.dtype not in DTYPES or query.shape[-1] > MAX_HEAD_DIM:
        raise RuntimeError(
            f"the flex_flash backend takes float16 and bfloat16 and head sizes up to {MAX_HEAD_DIM}, "
            f"got {query.dtype} and {query.shape[-1]}; gather takes all"
        )
    tiles = TILES[torch.cuda.get_device_capability(query.device)[0]]
    return attend(query, key, value, pattern, scale, valid, tiles=tiles, options={"BACKEND": "FLASH"})
