"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: packed patches with ``(T, H, W)`` grids and M-RoPE."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from spatiotoken.patches.adapter import Encoding, Item, ModelAdapter, TowerStates


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

    def tower_layers(self, core: Any) -> list[nn.Module]:
        # Qwen2.5-VL's other blocks attend within windows.
        whole = getattr(core.visual, "fullatt_block_indexes", None)
        return list(core.visual.blocks)[: None if whole is None else max(whole) + 1]

    def tower_attention(self, layer: Any) -> nn.Module:
        return layer.attn

    def tower_states(self, attention: Any, hidden: Tensor, arguments: Mapping[str, Any]) -> list[TowerStates]:
        query, key, _ = attention.qkv(hidden).view(hidden.shape[0], 3, attention.num_heads, -1).unbind(1)
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
        query, key = rotate(query, key, *arguments["position_embeddings"])
        bounds: list[int] = arguments["cu_seqlens"].tolist()
        starts: dict[int, list[int]] = {}
        for start, stop in zip(bounds, bounds[1:], strict=False):
            starts.setdefault(stop - start, []).append(start)
        states = []
        for size, first in starts.items():
            places = torch.tensor(first, device=hidden.device)[:, None] + torch.arange(size, device=hidden.device)
            chunk_query, chunk_key = (values[places].transpose(1, 2) for values in (query, key))
            states.append(TowerStates(places, chunk_query, chunk_key, attention.scaling))
        return states

    def arrange(self, core: Any, kind: str, encoding: Encoding, values: Tensor) -> list[Tensor]:
        visual = core.visual
        merged = values.float().unflatten(0, (-1, visual.spatial_merge_size**2)).mean(dim=1)
        if hasattr(visual, "window_size"):
            order, _ = get_vision_window_index(
                encoding[f"{kind}_grid_thw"], visual.spatial_merge_size, visual.window_size, visual.patch_size
            )
            merged = torch.empty_like(merged).index_copy_(0, order.to(merged.device), merged)
        return list(merged.split([item.size for item in self.items(core, kind, encoding)]))


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
