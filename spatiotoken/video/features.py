"""Cheap features by which frames are chosen before any is decoded for keeps."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import interpolate

_SIDE = 16


def frame_features(pixels: Tensor) -> Tensor:
    """Each frame averaged down to 16x16 RGB.

    Args:
        pixels: uint8 [T, 3, H, W].

    Returns:
        float32 [T, 768] in 0..1, channel by channel, rows from the top.
    """
    return interpolate(pixels.float(), size=(_SIDE, _SIDE), mode="area").flatten(1) / 255
