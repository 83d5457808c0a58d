"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: packed patches with ``(T, H, W)`` grids and M-RoPE."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from spatiotoken.patches.adapter import CLIP_MEAN, CLIP_STD, Encoding, Item, ModelAdapter, Part, TowerRows, TowerStates
from spatiotoken.undo import Undo
from spatiotoken.vision.exact import SLOT, PackedTower, chunk_rows, register_packed

_ROTATED_ON_CPU = 1 << 18
"""Values that are rotated at a time, so few that they stay in the cache."""


class QwenVL(ModelAdapter):
    """Pixels are rows of flattened patches, ordered by temporal unit, so a unit is a run of ``H * W`` rows."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen2_5_vl")
    remembers_rope: ClassVar[bool] = True
    parts_apart: ClassVar[bool] = True
    pixel_mean = CLIP_MEAN
    pixel_std = CLIP_STD

    def items(self, core: Any, kind: str, encoding: Encoding) -> list[Item]:
        merge = core.visual.spatial_merge_size
        return [Item.of_grid((t, h // merge, w // merge)) for t, h, w in _grids(encoding, kind)]

    def frames_per_unit(self, core: Any) -> int:
        return core.config.vision_config.temporal_patch_size

    def frame_patches(self, core: Any, encoding: Encoding) -> list[Tensor]:
        # A row holds the channels of its patch one after the other.
        rows = encoding["pixel_values_videos"].unflatten(1, (core.config.vision_config.in_channels, -1))
        colours = self.colours(rows.mean(dim=-1, dtype=torch.float32))
        return [video for video, _ in _videos(encoding, colours)]

    def pictures(self, core: Any, encoding: Encoding) -> list[Tensor]:
        found = []
        for video, grid in _videos(encoding, encoding["pixel_values_videos"]):
            frames = self._frames(core, video, grid)[:, :1]
            colours = self.colours(frames.movedim(2, -1)).movedim(-1, 2)
            found.append((255 * colours).round().to(torch.uint8).flatten(0, 1))
        return found

    def take_frames(
        self, core: Any, encoding: Encoding, chosen: Sequence[Sequence[Part]]
    ) -> list[tuple[dict[str, Any], int]]:
        merge, pixels, grids = core.visual.spatial_merge_size, [], []
        for (video, (_, height, width)), parts in zip(
            _videos(encoding, encoding["pixel_values_videos"]), chosen, strict=True
        ):
            for part in parts:
                units = part.taken(video)
                count, rows, columns = part.grid(height // merge, width // merge)
                grids.append((count, rows * merge, columns * merge))
                if grids[-1][1:] != (height, width):
                    units = self._resized(core, units, (height, width), grids[-1][1:])
                pixels.append(units.flatten(0, 1))
        grid_thw = encoding["video_grid_thw"].new_tensor(grids)
        return [({**encoding, "pixel_values_videos": torch.cat(pixels), "video_grid_thw": grid_thw}, len(chosen))]

    def _resized(self, core: Any, units: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
        """``units [n, patches, F]`` of ``old`` rows and columns of patches, at ``new``."""
        patch, merge = core.config.vision_config.patch_size, core.visual.spatial_merge_size
        frames = self._frames(core, units, (len(units), *old))
        size = (new[0] * patch, new[1] * patch)
        small = nn.functional.interpolate(frames.flatten(0, 1).float(), size, mode="bicubic", antialias=True)
        small = small.to(units.dtype).unflatten(0, frames.shape[:2])
        small = small.unflatten(4, (-1, merge, patch)).unflatten(3, (-1, merge, patch))
        # [n, frames, C, rows, merge, patch, columns, merge, patch] as `_frames` took it apart
        return small.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(len(units), new[0] * new[1], -1)

    def _frames(self, core: Any, units: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """``[T, frames, C, H, W]`` normalised frames of the flattened patches ``[T, patches, F]``."""
        vision, merge = core.config.vision_config, core.visual.spatial_merge_size
        patch, together, channels = vision.patch_size, vision.temporal_patch_size, vision.in_channels
        count, height, width = grid
        blocks = units.view(count, height // merge, width // merge, merge, merge, channels, together, patch, patch)
        return blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(count, together, channels, height * patch, -1)

    def fast_tower(self, core: Any, undo: Undo, *, read_within: bool) -> None:
        config = core.visual.config
        base = str(config._attn_implementation)
        if "flash" in base:
            return  # it is given all windows at once already
        if base != "sdpa":
            raise ValueError(f"fast_tower needs a vision tower with attn_implementation='sdpa' or flash, not {base!r}")
        packed = PackedTower()
        for block in core.visual.blocks:
            undo.set(block.attn, SLOT, packed)
        undo.set(config, "_attn_implementation_internal", register_packed())

    def tower_layers(self, core: Any) -> list[nn.Module]:
        # Qwen2.5-VL's other blocks attend within windows.
        whole = getattr(core.visual, "fullatt_block_indexes", None)
        return list(core.visual.blocks)[: None if whole is None else max(whole) + 1]

    def tower_attention(self, layer: Any) -> nn.Module:
        return layer.attn

    def tower_linears(self, attention: Any) -> tuple[nn.Module, ...]:
        return (attention.qkv,)

    def tower_states(
        self, attention: Any, projected: Sequence[Tensor], arguments: Mapping[str, Any]
    ) -> list[TowerStates]:
        pair = projected[0].view(len(projected[0]), 3, attention.num_heads, -1)[:, :2]
        query, key = rotated(pair, *arguments["position_embeddings"]).unbind(dim=1)
        bounds: list[int] = arguments["cu_seqlens"].tolist()
        states = []
        for rows in chunk_rows(bounds, query.device):
            if isinstance(rows, tuple):
                places = torch.arange(len(query), device=query.device).view(rows)
                own_query, own_key = query.unflatten(0, rows), key.unflatten(0, rows)
            else:
                places, own_query, own_key = rows, query[rows], key[rows]
            states.append(TowerStates(places, own_query.transpose(1, 2), own_key.transpose(1, 2), attention.scaling))
        return states

    def tower_span(self, core: Any) -> list[nn.Module]:
        return list(core.visual.blocks)

    def windowed_layers(self, core: Any) -> frozenset[int]:
        whole = getattr(core.visual, "fullatt_block_indexes", None)
        return frozenset() if whole is None else frozenset(range(len(core.visual.blocks))) - set(whole)

    def tower_rows(self, core: Any, kind: str, encoding: Encoding) -> TowerRows:
        merge, grids = core.visual.spatial_merge_size, _grids(encoding, kind)
        blocks, count = [], 0
        for t, h, w in grids:
            patches = torch.arange(count, count + t * h * w).view(t, h // merge, merge, w // merge, merge)
            blocks.append(patches.transpose(2, 3).reshape(-1, merge * merge))
            count += t * h * w
        places, windows = torch.cat(blocks), None
        if hasattr(core.visual, "window_size"):
            order, bounds = self._windows(core, kind, encoding)
            places, windows = places[order.cpu()], tuple(bounds.diff().tolist())
        return TowerRows(tuple(grids), places.flatten(), windows)

    def tower_pixels(self, core: Any, kind: str, encoding: Encoding) -> Tensor:
        pixels = encoding["pixel_values_videos" if kind == "video" else "pixel_values"]
        rows = pixels.unflatten(1, (core.config.vision_config.in_channels, -1)).transpose(1, 2)
        colours, merge, found = self.colours(rows).flatten(1), core.visual.spatial_merge_size, []
        grids = _grids(encoding, kind)
        for (t, h, w), video in zip(grids, colours.split([t * h * w for t, h, w in grids]), strict=True):
            blocks = video.view(t, h // merge, w // merge, merge, merge, -1)
            found.append(blocks.transpose(2, 3).reshape(t * h * w, -1))
        return torch.cat(found)

    def tower_block(self, layer: Any) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        return layer.norm1, layer.attn, layer.norm2, layer.mlp

    def tower_projections(
        self, attention: Any, hidden: Tensor, arguments: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        query, key, value = attention.qkv(hidden).view(len(hidden), 3, attention.num_heads, -1).unbind(1)
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
        query, key = rotate(query, key, *arguments["position_embeddings"])
        return query, key, value, attention.scaling

    def tower_output(self, attention: Any, mixed: Tensor) -> Any:
        return attention.proj(mixed.flatten(1))

    def arrange(self, core: Any, kind: str, encoding: Encoding, values: Tensor) -> list[Tensor]:
        visual = core.visual
        merged = values.float().unflatten(0, (-1, visual.spatial_merge_size**2)).mean(dim=1)
        if hasattr(visual, "window_size"):
            order, _ = self._windows(core, kind, encoding)
            merged = torch.empty_like(merged).index_copy_(0, order.to(merged.device), merged)
        return list(merged.split([item.size for item in self.items(core, kind, encoding)]))

    def _windows(self, core: Any, kind: str, encoding: Encoding) -> tuple[Tensor, Tensor]:
        """The order of Qwen2.5-VL's blocks of patches, window by window, and the bounds of windows in patches."""
        visual, grids = core.visual, encoding[f"{kind}_grid_thw"]
        return get_vision_window_index(grids, visual.spatial_merge_size, visual.window_size, visual.patch_size)


class Qwen3VL(QwenVL):
    """Adds deepstack features; timestamp tokens between the frames of a video are text and stay."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl",)
    has_deepstack: ClassVar[bool] = True
    pixel_mean = (0.5, 0.5, 0.5)
    pixel_std = (0.5, 0.5, 0.5)

    def whole_inputs(self, core: Any) -> list[nn.Module]:
        return list(core.visual.deepstack_merger_list)

    def read(self, output: Any) -> list[Tensor]:
        return [*super().read(output), *(_joined(features) for features in output.deepstack_features)]

    def write(self, output: Any, features: list[Tensor], sizes: list[int]) -> None:
        super().write(output, features[:1], sizes)
        # transformers 5.17 hands them on as one tensor per layer, later ones as one per layer and video.
        split = not isinstance(output.deepstack_features[0], Tensor)
        output.deepstack_features = [torch.split(layer, sizes) if split else layer for layer in features[1:]]


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``states [rows, ..., d]`` with their positions, as the towers' own function rotates queries and keys.

    For what is read beside a tower: that function takes several times as long on a CPU, with memory for each step.

    Args:
        cos, sin: ``[rows, d]``.
    """
    between = (1,) * (states.ndim - 2)
    cos, sin = (x.float().view(len(x), *between, -1) for x in (cos, sin))
    turned = torch.empty(states.shape, dtype=torch.float32, device=states.device)
    half = states.shape[-1] // 2
    rows = max(1, _ROTATED_ON_CPU // states[0].numel()) if states.device.type == "cpu" else len(states)
    for values, turning, cosine, sine in zip(*(x.split(rows) for x in (states.float(), turned, cos, sin)), strict=True):
        torch.mul(values, cosine, out=turning)
        turning[..., :half].addcmul_(values[..., half:], sine[..., :half], value=-1)
        turning[..., half:].addcmul_(values[..., :half], sine[..., half:])
    return turned.to(states.dtype)


def _grids(encoding: Encoding, kind: str) -> list[tuple[int, int, int]]:
    return [(t, h, w) for t, h, w in encoding[f"{kind}_grid_thw"].tolist()]


def _videos(encoding: Encoding, rows: Tensor) -> list[tuple[Tensor, tuple[int, int, int]]]:
    """``[T, H * W, ...]`` of each video, and its grid."""
    grids = _grids(encoding, "video")
    videos = rows.split([t * h * w for t, h, w in grids])
    return [(video.unflatten(0, (grid[0], -1)), grid) for video, grid in zip(videos, grids, strict=True)]


def _joined(features: Any) -> Tensor:
    return features if isinstance(features, Tensor) else torch.cat(list(features))
