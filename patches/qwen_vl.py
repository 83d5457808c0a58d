"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: packed patches with ``(T, H, W)`` grids and M-RoPE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from spatiotoken.patches.adapter import Encoding, Item, ModelAdapter


class QwenVL(ModelAdapter):
    """Pixels are rows of flattened patches, ordered by temporal unit, so a unit is a run of ``H * W`` rows."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen2_5_vl")
    remembers_rope: ClassVar[bool] = True

    def items(self, core: Any, kind: str, encoding: Encoding) -> list[Item]:
        merge = core.visual.spatial_merge_size
        return [Item.of_grid((t, h // merge, w // merge)) for t, h, w in _grids(encoding, kind)]

    def frames_per_unit(self, core: Any) -> int:
        return core.config.vision_config.temporal_patch_size

    def frame_features(self, core: Any, encoding: Encoding) -> list[Tensor]:
        pixels, grids = encoding["pixel_values_videos"], _grids(encoding, "video")
        channels = core.config.vision_config.in_channels
        # The mean colour of each patch: a patch row holds its channels one after the other.
        colours = pixels.view(pixels.shape[0], channels, -1).mean(dim=-1, dtype=torch.float32)
        videos = colours.split([t * h * w for t, h, w in grids])
        return [video.reshape(grid[0], -1) for video, grid in zip(videos, grids, strict=True)]

    def take_frames(self, core: Any, encoding: Encoding, chosen: Sequence[tuple[int, ...]]) -> dict[str, Any]:
        pixels, grids = encoding["pixel_values_videos"], _grids(encoding, "video")
        videos = pixels.split([t * h * w for t, h, w in grids])
        units = [
            video.view(grid[0], -1, video.shape[-1])[list(indices)].flatten(0, 1)
            for video, grid, indices in zip(videos, grids, chosen, strict=True)
        ]
        grid_thw = encoding["video_grid_thw"].clone()
        grid_thw[:, 0] = torch.tensor([len(indices) for indices in chosen])
        return {**encoding, "pixel_values_videos": torch.cat(units), "video_grid_thw": grid_thw}


class Qwen3VL(QwenVL):
    """Adds deepstack features; timestamp tokens between the frames of a video are text and stay."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl",)
    has_deepstack: ClassVar[bool] = True

    def read(self, output: Any) -> list[Tensor]:
        return [*super().read(output), *(_joined(features) for features in output.deepstack_features)]

    def write(self, output: Any, features: list[Tensor], sizes: list[int]) -> None:
        super().write(output, features[:1], sizes)
        # transformers 5.17 hands them on as one tensor per layer, later ones as one per layer and video.
        split = not isinstance(output.deepstack_features[0], Tensor)
        output.deepstack_features = [torch.split(layer, sizes) if split else layer for layer in features[1:]]


def _grids(encoding: Encoding, kind: str) -> list[tuple[int, int, int]]:
    return [(t, h, w) for t, h, w in encoding[f"{kind}_grid_thw"].tolist()]


def _joined(features: Any) -> Tensor:
    return features if isinstance(features, Tensor) else torch.cat(list(features))
