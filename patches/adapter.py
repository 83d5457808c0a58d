"""What differs between model families, and nothing else. One subclass per family, registered by ``model_type``."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spatiotoken.attention.weights import row_weights
from spatiotoken.registry import Registry
from spatiotoken.undo import Undo

_NO_VIDEOS = "{} does not say how videos are cut into frames"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Segment:
    """A grid of visual tokens among the projected features of one picture or video.

    Attributes:
        start: first row of the grid.
        grid: ``(T, H, W)``.
        row_stride: rows from one line of the grid to the next; more than ``W`` where a newline token ends each line.
        tiles: ``(rows, columns)`` of the tiles that the grid was joined from.
    """

    start: int
    grid: tuple[int, int, int]
    row_stride: int
    tiles: tuple[int, int] = (1, 1)

    def rows(self, device: torch.device) -> Tensor:
        """``[T * H * W]`` rows of the grid's tokens."""
        frames, height, width = self.grid
        line = torch.arange(frames * height, device=device)[:, None] * self.row_stride
        return (self.start + line + torch.arange(width, device=device)).flatten()


@dataclass(frozen=True)
class Item:
    """Projected features of one picture or video: how many rows, and which of them form grids."""

    size: int
    segments: tuple[Segment, ...]

    @classmethod
    def of_grid(cls, grid: tuple[int, int, int]) -> Item:
        return cls(grid[0] * grid[1] * grid[2], (Segment(0, grid, grid[2]),))


@dataclass(frozen=True)
class Part:
    """Temporal units of one video that are seen at one size.

    Attributes:
        units: which, rising.
        scale: of their height and width, 1 for the full size.
        mixing: ``[len(units), T]`` shares of all units in what is seen in the place of each; None for themselves alone.
    """

    units: tuple[int, ...]
    scale: float = 1.0
    mixing: Tensor | None = None

    def taken(self, units: Tensor) -> Tensor:
        """What is seen of ``units [T, ...]``."""
        if self.mixing is None:
            return units[list(self.units)]
        mixing = self.mixing.to(units.device, torch.float32)
        return (mixing @ units.flatten(1).float()).to(units.dtype).view(-1, *units.shape[1:])

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        """Of their tokens, where a unit of full size has ``height * width``; never more than the share of the area."""
        height, width = (max(1, int(side * self.scale + 1e-6)) for side in (height, width))
        return len(self.units), height, width


@dataclass(frozen=True)
class TowerStates:
    """Queries and keys of a tower layer, of chunks of one length that attend to themselves alone.

    Attributes:
        places: ``[V, n]`` rows of the layer's flattened input.
        query, key: ``[V, heads, n, d]``.
        scale: of the logits.
    """

    places: Tensor
    query: Tensor
    key: Tensor
    scale: float


@dataclass(frozen=True)
class TowerRows:
    """How the rows of a tower's layers lie: frame by frame, in each its CLS token, if any, then its patches.

    Attributes:
        grids: ``(T, H, W)`` in patches of each video, or of each view of each image.
        places: ``[patches]`` of each row, CLS tokens left out: its patch, counted through all grids, which are
            time-major and row-major within a frame; None where the rows are in that order.
        windows: rows of each window of those layers that attend within windows; None where there are none.
    """

    grids: tuple[tuple[int, int, int], ...]
    places: Tensor | None = None
    windows: tuple[int, ...] | None = None


Encoding = Mapping[str, Any]
"""Arguments of ``get_video_features`` or ``get_image_features``, by name."""


class ModelAdapter(ABC):
    """Where the parts of a model are, and how its visual features lie.

    ``model`` is the ``…ForConditionalGeneration``; ``core`` its ``.model``, which owns the vision tower and the
    language model.
    """

    model_types: ClassVar[tuple[str, ...]]
    kinds: ClassVar[tuple[str, ...]] = ("video", "image")
    """Kinds of pictures that the family takes: it has a ``get_{kind}_features`` and a ``{kind}_token_id`` for each."""
    remembers_rope: ClassVar[bool] = False
    """The model keeps M-RoPE offsets of the last prompt in ``core.rope_deltas``."""
    has_deepstack: ClassVar[bool] = False
    """Decoder layers add features of the tower by ``language_model._deepstack_process``."""
    trailing: ClassVar[tuple[int, ...]] = (0,)
    """How many tokens (such as a newline) may follow an item's grids in the features; no method touches them."""
    parts_apart: ClassVar[bool] = False
    """The parts of a video go through the tower as videos of their own, each at its size; else all at full size."""
    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """By which the processors of released checkpoints normalise pixels; set anew where the processor is at hand."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for model_type in getattr(cls, "model_types", ()):
            ADAPTERS.register(model_type, cls)

    # -- where things are --

    def core(self, model: PreTrainedModel) -> Any:
        return model.model

    def language_model(self, model: PreTrainedModel) -> Any:
        return self.core(model).language_model

    def decoder_layers(self, model: PreTrainedModel) -> nn.ModuleList:
        return self.language_model(model).layers

    # -- features of videos and images --

    def placeholders(self, core: Any, input_ids: Tensor | None, embeds: Tensor | None) -> dict[str, Tensor]:
        """``[B, L]`` for each of ``kinds``, True at the tokens that stand for such pictures.

        Args:
            input_ids, embeds: one of them; embeddings are those of the placeholder tokens still.
        """
        tokens = {kind: getattr(core.config, f"{kind}_token_id") for kind in self.kinds}
        if input_ids is not None:
            return {kind: input_ids == token for kind, token in tokens.items()}
        assert embeds is not None
        table = core.get_input_embeddings()
        return {
            kind: (embeds == table(torch.tensor(token, device=embeds.device))).all(-1) for kind, token in tokens.items()
        }

    @abstractmethod
    def items(self, core: Any, kind: str, encoding: Encoding) -> list[Item]:
        """What ``get_{kind}_features(**encoding)`` returns, item by item (``kind`` is "video" or "image")."""

    def frames_per_unit(self, core: Any) -> int:
        """Video frames that the tower takes as one temporal unit."""
        return 1

    def frame_patches(self, core: Any, encoding: Encoding) -> list[Tensor]:
        """``[T, P, 3]`` mean colours, in 0..1, of the parts of each video's temporal units."""
        raise NotImplementedError(_NO_VIDEOS.format(type(self).__name__))

    def pictures(self, core: Any, encoding: Encoding) -> list[Tensor]:
        """uint8 ``[T, 3, H, W]`` the first frame of each of a video's temporal units."""
        raise NotImplementedError(_NO_VIDEOS.format(type(self).__name__))

    def take_frames(
        self, core: Any, encoding: Encoding, chosen: Sequence[Sequence[Part]]
    ) -> list[tuple[dict[str, Any], int]]:
        """``encoding`` with only the ``chosen`` parts of each video, one after the other.

        Returns:
            One for each call of the tower that they take, and how many of the videos are in it.
        """
        raise NotImplementedError(_NO_VIDEOS.format(type(self).__name__))

    def colours(self, pixels: Tensor) -> Tensor:
        """Normalised ``pixels [..., 3]`` as they were, float32 in 0..1."""
        mean, std = (pixels.new_tensor(values, dtype=torch.float32) for values in (self.pixel_mean, self.pixel_std))
        return (pixels.float() * std + mean).clamp(0, 1)

    def read(self, output: Any) -> list[Tensor]:
        """``[rows, D]`` features of all items, the projected ones first, then others of the same rows (deepstack)."""
        return [torch.cat(list(output.pooler_output))]

    def write(self, output: Any, features: list[Tensor], sizes: list[int]) -> None:
        """Put ``features``, as ``read`` gives them, into ``output`` in the form the model expects."""
        output.pooler_output = torch.split(features[0], sizes)

    # -- the vision tower --

    @abstractmethod
    def fast_tower(self, core: Any, undo: Undo, *, read_within: bool) -> None:
        """Have the tower run in fewer calls and less memory (``spatiotoken.vision.exact``).

        Args:
            read_within: methods look into the tower while it runs.

        Raises:
            ValueError: the tower's attention implementation is not one that is understood.
        """

    @abstractmethod
    def tower_layers(self, core: Any) -> list[nn.Module]:
        """Layers of the tower, up to the last one whose attention over whole frames reaches the projector."""

    @abstractmethod
    def tower_attention(self, layer: nn.Module) -> nn.Module:
        """The attention module of a tower layer."""

    @abstractmethod
    def tower_linears(self, attention: Any) -> tuple[nn.Module, ...]:
        """The modules that make queries and keys (and maybe values) in a tower layer's attention."""

    @abstractmethod
    def tower_states(
        self, attention: Any, projected: Sequence[Tensor], arguments: Mapping[str, Any]
    ) -> list[TowerStates]:
        """Queries and keys of a tower layer's attention.

        Args:
            projected: what ``tower_linears`` made of its input.
            arguments: that it was called with, but for the input.
        """

    def tower_span(self, core: Any) -> list[nn.Module]:
        """The layers that run before the projector, those behind the last of ``tower_layers`` included."""
        return self.tower_layers(core)

    def windowed_layers(self, core: Any) -> frozenset[int]:
        """Those of ``tower_span`` that attend within windows."""
        return frozenset()

    def whole_inputs(self, core: Any) -> list[nn.Module]:
        """Modules that read all patches after one of the layers, beside the projector."""
        return []

    def patch_projector(self, core: Any) -> nn.Module | None:
        """The projector, where it maps each patch by itself; it may be given pooled ones for some inputs."""
        return None

    @abstractmethod
    def tower_rows(self, core: Any, kind: str, encoding: Encoding) -> TowerRows:
        """How the rows of the tower's layers lie for this input."""

    @abstractmethod
    def tower_pixels(self, core: Any, kind: str, encoding: Encoding) -> Tensor:
        """``[patches, F]`` float32 colours, in 0..1, of all patches, as ``TowerRows.places`` counts them."""

    @abstractmethod
    def tower_block(self, layer: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        """Norm, attention, norm and MLP of a tower layer, of which each pair adds to the hidden states."""

    @abstractmethod
    def tower_projections(
        self, attention: Any, hidden: Tensor, arguments: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        """``[rows, heads, d]`` queries, keys and values of ``hidden [rows, Dv]``, and the scale of the logits."""

    @abstractmethod
    def tower_output(self, attention: Any, mixed: Tensor) -> Any:
        """What a tower's attention module returns where its heads give ``mixed [rows, heads, d]``."""

    @abstractmethod
    def arrange(self, core: Any, kind: str, encoding: Encoding, values: Tensor) -> list[Tensor]:
        """``[size, K]`` for each item: ``values [patches, K]`` of the tower, pooled and ordered as the features are."""

    def has_cls(self, core: Any) -> bool:
        """Whether the tower's layers have a CLS token before the patches of each view."""
        return False

    def pooling_head(self, core: Any) -> nn.Module | None:
        """The tower's attention-pooling head, where it has one that runs."""
        return None

    def arrange_views(self, core: Any, kind: str, encoding: Encoding, values: Tensor) -> list[Tensor]:
        """``[T, K]`` for each item, of ``values [views, K]``; only for towers with a CLS token or a pooling head."""
        raise NotImplementedError(f"{type(self).__name__} does not say how the views of its tower make up items")

    def head_states(self, head: Any, hidden: Tensor) -> TowerStates:
        """Query and keys of the pooling head for its input ``hidden [V, n, Dv]``; only where there is such a head."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its tower's pooling head attends")

    # -- inside a decoder layer --

    def parts(self, layer: Any) -> dict[str, nn.Module]:
        """The modules of a decoder layer that each add to the hidden states, by name, in order."""
        return {"attention": layer.self_attn, "mlp": layer.mlp}

    # -- attention of chosen rows --

    def rotate(self, attention: nn.Module, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``states [B, heads, rows, d]`` with rotary positions applied by the family's own function."""
        function = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        return function(states, states, cos, sin)[0]

    def project(self, attention: nn.Module, hidden: Tensor, name: str) -> Tensor:
        """``[B, heads, rows, d]`` queries (``name="q"``) or keys (``"k"``) of normed ``hidden [B, rows, D]``."""
        states = getattr(attention, f"{name}_proj")(hidden)
        states = states.view(*hidden.shape[:-1], -1, attention.head_dim)
        norm = getattr(attention, f"{name}_norm", None)
        return (states if norm is None else norm(states)).transpose(1, 2)

    def keys(self, layer: Any, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """``[B, kv_heads, L, d]`` rotated keys that a decoder layer makes of its input ``hidden [B, L, D]``."""
        normed = layer.input_layernorm(hidden)
        return self.rotate(layer.self_attn, self.project(layer.self_attn, normed, "k"), *position_embeddings)

    def attention_rows(
        self,
        layer: nn.Module,
        hidden: Tensor,
        rows: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        keys: Tensor | None,
        valid: Tensor | None,
    ) -> Tensor:
        """``[B, heads, R, keys]`` softmax weights (float32) of a few query rows of a decoder layer.

        Costs ``O(R * keys)``, with any attention backend.

        Args:
            hidden: ``[B, L, D]``, the layer's input.
            rows: ``[B, R]`` query rows among ``L``.
            keys: ``[B, kv_heads, past + L, d]`` from the layer's cache; None to compute them here.
            valid: ``[B, past + L]`` False at padding, None if there is none.
        """
        attention: Any = layer.self_attn
        norm: Any = layer.input_layernorm
        if keys is None:
            keys = self.keys(layer, hidden, position_embeddings)
        batch = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
        cos, sin = (x.expand(hidden.shape[0], -1, -1)[batch, rows] for x in position_embeddings)
        query = self.rotate(attention, self.project(attention, norm(hidden[batch, rows]), "q"), cos, sin)
        position = torch.arange(keys.shape[2], device=keys.device)
        visible = position <= rows[..., None] + (keys.shape[2] - hidden.shape[1])
        if valid is not None:
            visible = visible & valid[:, None]
        return row_weights(query, keys, visible, attention.scaling)


ADAPTERS: Registry[type[ModelAdapter]] = Registry("model type", ("spatiotoken.patches",), "spatiotoken.models")


def find_adapter(model: Any) -> ModelAdapter:
    """The adapter of a model's family.

    Raises:
        ValueError: if the architecture is not supported; the message names those that are.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise ValueError(f"{type(model).__name__} is not a transformers model; supported: {supported_models()}")
    if not hasattr(model, "model") or not hasattr(model, "lm_head"):
        raise ValueError(f"{type(model).__name__} has no language-model head: load it by AutoModelForImageTextToText")
    return ADAPTERS.get(model_type)()


def supported_models() -> str:
    return ", ".join(sorted(ADAPTERS.items()))


__all__ = [
    "ADAPTERS",
    "CLIP_MEAN",
    "CLIP_STD",
    "Encoding",
    "Item",
    "ModelAdapter",
    "Part",
    "Segment",
    "TowerRows",
    "TowerStates",
    "find_adapter",
    "supported_models",
]
