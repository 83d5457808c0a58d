"""LLaVA-OneVision and LLaVA-NeXT-Video: stacked frames, one square grid each, and tiled images; LLaVA-1.5: images."""

from __future__ import annotations

import functools
import math
import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spatiotoken.patches.adapter import (
    CLIP_MEAN,
    CLIP_STD,
    Encoding,
    Item,
    ModelAdapter,
    Part,
    Segment,
    TowerRows,
    TowerStates,
)
from spatiotoken.undo import Undo
from spatiotoken.vision.exact import in_parts, skipped


class ClipTower(ModelAdapter):
    """Families whose vision tower is CLIP or SigLIP."""

    def fast_tower(self, core: Any, undo: Undo, *, read_within: bool) -> None:
        if read_within:
            return  # what is read is of all frames, and may be of any layer
        tower, read = core.vision_tower, core.config.vision_feature_layer
        for layer in tower.encoder.layers[len(self.tower_layers(core)) :]:
            undo.set(layer, "forward", skipped)
        reads = (read,) if isinstance(read, int) else tuple(read)
        undo.set(tower, "forward", functools.partial(in_parts, tower.forward, reads))

    def tower_layers(self, core: Any) -> list[nn.Module]:
        layers = list(core.vision_tower.encoder.layers)
        read = core.config.vision_feature_layer
        last = read if isinstance(read, int) else read[-1]
        # Hidden state 0 is that before the first layer.
        return layers[: last if last >= 0 else len(layers) + 1 + last]

    def tower_attention(self, layer: Any) -> nn.Module:
        return layer.self_attn

    def tower_linears(self, attention: Any) -> tuple[nn.Module, ...]:
        return attention.q_proj, attention.k_proj

    def tower_states(
        self, attention: Any, projected: Sequence[Tensor], arguments: Mapping[str, Any]
    ) -> list[TowerStates]:
        query, key = (states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for states in projected)
        views, rows = projected[0].shape[:2]
        places = torch.arange(views * rows, device=query.device).view(views, rows)
        return [TowerStates(places, query, key, attention.scale)]

    def patch_projector(self, core: Any) -> nn.Module | None:
        return core.multi_modal_projector

    def tower_rows(self, core: Any, kind: str, encoding: Encoding) -> TowerRows:
        side = self.tower_side(core)
        return TowerRows(tuple((frames, side, side) for frames in self.view_counts(core, kind, encoding)))

    def tower_side(self, core: Any) -> int:
        """Patches along one side of a view."""
        vision = core.config.vision_config
        return vision.image_size // vision.patch_size

    @abstractmethod
    def view_counts(self, core: Any, kind: str, encoding: Encoding) -> list[int]:
        """Views that are frames of one video, for each video; images have 1 for each of their views."""

    @abstractmethod
    def views(self, core: Any, kind: str, encoding: Encoding) -> Tensor:
        """``[views, 3, height, width]`` what the tower is given."""

    def tower_pixels(self, core: Any, kind: str, encoding: Encoding) -> Tensor:
        patch, side = core.config.vision_config.patch_size, self.tower_side(core)
        views = self.views(core, kind, encoding)[..., : side * patch, : side * patch]
        colours = self.colours(views.movedim(1, -1)).unflatten(2, (side, patch)).unflatten(1, (side, patch))
        return colours.transpose(2, 3).flatten(3).flatten(0, 2)

    def tower_block(self, layer: Any) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        return layer.layer_norm1, layer.self_attn, layer.layer_norm2, layer.mlp

    def tower_projections(
        self, attention: Any, hidden: Tensor, arguments: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = (project(hidden).unflatten(-1, (-1, attention.head_dim)) for project in projections)
        return query, key, value, attention.scale

    def tower_output(self, attention: Any, mixed: Tensor) -> Any:
        # As a batch of one, which is how packed rows go through these layers.
        return attention.out_proj(mixed.flatten(1))[None], None

    def has_cls(self, core: Any) -> bool:
        return hasattr(core.vision_tower.embeddings, "class_embedding")

    def pooling_head(self, core: Any) -> nn.Module | None:
        return getattr(core.vision_tower, "head", None)

    def head_states(self, head: Any, hidden: Tensor) -> TowerStates:
        attention: nn.MultiheadAttention = head.attention
        width, weight, bias = attention.embed_dim, attention.in_proj_weight, attention.in_proj_bias
        query = nn.functional.linear(head.probe.expand(hidden.shape[0], -1, -1), weight[:width], bias[:width])
        key = nn.functional.linear(hidden, weight[width : 2 * width], bias[width : 2 * width])
        query, key = (states.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for states in (query, key))
        places = torch.arange(hidden.shape[0] * hidden.shape[1], device=hidden.device).view(hidden.shape[:2])
        return TowerStates(places, query, key, query.shape[-1] ** -0.5)


class Llava(ClipTower):
    """Videos are ``[videos, frames, 3, H, W]``; images are a whole view and tiles with a newline after each line."""

    @abstractmethod
    def pooled_side(self, core: Any) -> int:
        """Tokens along one side of a video frame after pooling."""

    def max_tiles(self, core: Any, encoding: Encoding) -> int | None:
        """Tiles beyond which the family shrinks an image, None where it does not."""
        return None

    def items(self, core: Any, kind: str, encoding: Encoding) -> list[Item]:
        if kind == "image":
            limit = self.max_tiles(core, encoding)
            return [self._image(core, size, single, limit) for size, single in _images(encoding)]
        videos, frames = encoding["pixel_values_videos"].shape[:2]
        side = self.pooled_side(core)
        return [Item.of_grid((frames, side, side)) for _ in range(videos)]

    def frame_patches(self, core: Any, encoding: Encoding) -> list[Tensor]:
        pixels = encoding["pixel_values_videos"].float()
        small = torch.nn.functional.adaptive_avg_pool2d(pixels.flatten(0, 1), 16)
        return list(self.colours(small.flatten(2).transpose(1, 2)).unflatten(0, pixels.shape[:2]))

    def pictures(self, core: Any, encoding: Encoding) -> list[Tensor]:
        colours = self.colours(encoding["pixel_values_videos"].movedim(2, -1)).movedim(-1, 2)
        return list((255 * colours).round().to(torch.uint8))

    def take_frames(
        self, core: Any, encoding: Encoding, chosen: Sequence[Sequence[Part]]
    ) -> list[tuple[dict[str, Any], int]]:
        videos = [
            torch.cat([part.taken(video) for part in parts])
            for video, parts in zip(encoding["pixel_values_videos"], chosen, strict=True)
        ]
        # Videos are stacked, which takes as many frames of each.
        stacks = [videos] if len({len(video) for video in videos}) == 1 else [[video] for video in videos]
        return [({**encoding, "pixel_values_videos": torch.stack(stack)}, len(stack)) for stack in stacks]

    def read(self, output: Any) -> list[Tensor]:
        # [rows, D] each; LLaVA-NeXT-Video of transformers 5.17 keeps the frames of a video apart.
        return [torch.cat([item.reshape(-1, item.shape[-1]) for item in output.pooler_output])]

    def write(self, output: Any, features: list[Tensor], sizes: list[int]) -> None:
        stacked = isinstance(output.pooler_output, Tensor)
        parts = torch.split(features[0], sizes)
        output.pooler_output = torch.stack(parts) if stacked else list(parts)

    def view_counts(self, core: Any, kind: str, encoding: Encoding) -> list[int]:
        if kind == "video":
            videos, frames = encoding["pixel_values_videos"].shape[:2]
            return [frames] * videos
        return [1] * sum(self._view_counts(core, encoding))

    def views(self, core: Any, kind: str, encoding: Encoding) -> Tensor:
        if kind == "video":
            return encoding["pixel_values_videos"].flatten(0, 1)
        pixels, counts = encoding["pixel_values"], self._view_counts(core, encoding)
        # One batch of padded views for each image, as processors give them, or the views alone.
        return torch.cat([image[:n] for image, n in zip(pixels, counts, strict=True)]) if pixels.ndim == 5 else pixels

    def arrange(self, core: Any, kind: str, encoding: Encoding, values: Tensor) -> list[Tensor]:
        side = self.tower_side(core)
        views = values.float().unflatten(0, (-1, side**2))
        if kind == "video":
            pooled = self.pool(core, views.transpose(1, 2).unflatten(-1, (side, side))).flatten(2).transpose(1, 2)
            return list(pooled.unflatten(0, encoding["pixel_values_videos"].shape[:2]).flatten(1, 2))
        return self.pack(core, encoding, list(views.split(self._view_counts(core, encoding))))

    def arrange_views(self, core: Any, kind: str, encoding: Encoding, values: Tensor) -> list[Tensor]:
        if kind == "video":
            return list(values.unflatten(0, encoding["pixel_values_videos"].shape[:2]))
        return [views[:1] for views in values.split(self._view_counts(core, encoding))]

    @abstractmethod
    def pool(self, core: Any, views: Tensor) -> Tensor:
        """``views [frames, K, side, side]`` of a video, pooled as its features are."""

    @abstractmethod
    def pack(self, core: Any, encoding: Encoding, views: list[Tensor]) -> list[Tensor]:
        """``[views, side * side, K]`` of each image joined as its features are, with zeros for newlines."""

    def _view_counts(self, core: Any, encoding: Encoding) -> list[int]:
        count = sys.modules[type(core).__module__].image_size_to_num_patches
        config = core.config
        return [
            count(
                image_size=size, grid_pinpoints=config.image_grid_pinpoints, patch_size=config.vision_config.image_size
            )
            if single
            else 1
            for size, single in _images(encoding)
        ]

    def _image(self, core: Any, size: Any, single: bool, limit: int | None) -> Item:
        """The whole view, then the tiles joined to one picture without its padding, a newline after each line."""
        modeling = sys.modules[type(core).__module__]
        vision, side = core.config.vision_config, self.tower_side(core)
        whole = Segment(0, (1, side, side), side)
        if not single:
            return Item(side * side + 1, (whole,))
        rows, columns = modeling.get_anyres_image_grid_shape(size, core.config.image_grid_pinpoints, vision.image_size)
        # The model's own arithmetic on a picture without data gives the size of the joined tiles.
        canvas = torch.empty(1, rows * side, columns * side, device="meta")
        height, width = modeling.unpad_image(canvas, size).shape[1:]
        if limit is not None:
            ratio = math.sqrt(height * width / (limit * side**2))
            if ratio > 1.1:
                height, width = int(height // ratio), int(width // ratio)
        tiles = Segment(side * side, (1, height, width), width + 1, (rows, columns))
        # Of the tiles of a very narrow strip nothing is left, or nothing but newlines.
        return Item(side * side + height * (width + 1), (whole, tiles) if height * width else (whole,))


class LlavaImages(ClipTower):
    """LLaVA-1.5: images only, each one square grid. Frames of a video are images of one prompt (``images: frames``)."""

    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    kinds: ClassVar[tuple[str, ...]] = ("image",)
    pixel_mean = CLIP_MEAN
    pixel_std = CLIP_STD

    def core(self, model: PreTrainedModel) -> Any:
        core: Any = model.model
        config = core.config
        tower, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
        if tower not in ("clip_vision_model", "siglip_vision_model") or (strategy == "full" and self.has_cls(core)):
            raise ValueError(
                f"a llava model with the vision tower {tower!r} and vision_feature_select_strategy={strategy!r} is not "
                "supported; supported: CLIP (strategy 'default') and SigLIP ('full')"
            )
        return core

    def items(self, core: Any, kind: str, encoding: Encoding) -> list[Item]:
        side = self.tower_side(core)
        return [Item.of_grid((1, side, side)) for _ in range(len(encoding["pixel_values"]))]

    def view_counts(self, core: Any, kind: str, encoding: Encoding) -> list[int]:
        return [1] * len(encoding["pixel_values"])

    def views(self, core: Any, kind: str, encoding: Encoding) -> Tensor:
        return encoding["pixel_values"]

    def arrange(self, core: Any, kind: str, encoding: Encoding, values: Tensor) -> list[Tensor]:
        return list(values.float().split(self.tower_side(core) ** 2))

    def arrange_views(self, core: Any, kind: str, encoding: Encoding, values: Tensor) -> list[Tensor]:
        return list(values.split(1))


class LlavaOnevision(Llava):
    """A newline token ends each video and stays whatever is reduced."""

    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    # transformers 5.17 adds the newline after `get_video_features`, later ones within.
    trailing: ClassVar[tuple[int, ...]] = (0, 1)

    def pooled_side(self, core: Any) -> int:
        return math.ceil(self.tower_side(core) / 2)

    def max_tiles(self, core: Any, encoding: Encoding) -> int:
        return int(_aspect_ratio(core, encoding).removeprefix("anyres_max_"))

    def pool(self, core: Any, views: Tensor) -> Tensor:
        side = self.pooled_side(core)
        return nn.functional.interpolate(views, size=(side, side), mode="bilinear")

    def pack(self, core: Any, encoding: Encoding, views: list[Tensor]) -> list[Tensor]:
        newline = views[0].new_zeros(views[0].shape[-1])
        ratio = _aspect_ratio(core, encoding)
        return core.pack_image_features(views, encoding["image_sizes"], newline, vision_aspect_ratio=ratio)[0]


class LlavaNextVideo(Llava):
    """Videos are pooled before the projector and have no newline."""

    model_types: ClassVar[tuple[str, ...]] = ("llava_next_video",)
    pixel_mean = CLIP_MEAN
    pixel_std = CLIP_STD

    def pooled_side(self, core: Any) -> int:
        return self.tower_side(core) // core.config.spatial_pool_stride

    def pool(self, core: Any, views: Tensor) -> Tensor:
        # The mean, whatever the features are pooled by: learnt convolutions fit these alone.
        return nn.functional.avg_pool2d(views, core.config.spatial_pool_stride)

    def pack(self, core: Any, encoding: Encoding, views: list[Tensor]) -> list[Tensor]:
        newline = views[0].new_zeros(views[0].shape[-1])
        strategy = core.config.vision_feature_select_strategy
        return core.pack_image_features(views, encoding["image_sizes"], strategy, newline)[0]


def _aspect_ratio(core: Any, encoding: Encoding) -> str:
    return encoding.get("vision_aspect_ratio") or core.config.vision_aspect_ratio


def _images(encoding: Encoding) -> list[tuple[Any, bool]]:
    """Size of each image, and whether it is the only one of its sample (the others are not tiled)."""
    counts = encoding.get("batch_num_images")
    sizes = encoding["image_sizes"]
    single = [True] * len(sizes) if counts is None else [n == 1 for n in counts for _ in range(n)]
    return list(zip(sizes, single, strict=True))
