"""The ``vision`` stage: fewer patches in the layers of a model's vision tower.

Layers are wrapped. Up to the first one in which the method acts they run as they are; from there on their rows are
packed (frames of different lengths one behind the other), and after the last one all patches are there again. Modules
that read all patches on the way, such as those of deepstack features, get them whole too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from spatiotoken.patches.adapter import Encoding, ModelAdapter, TowerRows
from spatiotoken.report import Recorder
from spatiotoken.tokens.merging import true_indices
from spatiotoken.vision.base import TowerAttention, TowerMerge, TowerReducer, TowerShape, TowerTokens
from spatiotoken.vision.packing import Packing, attend, weighted_mean

_RUN: ContextVar[_Run | None] = ContextVar("spatiotoken_tower", default=None)


@dataclass
class _Run:
    """One run of the tower.

    Attributes:
        owner: whose run it is.
        grids: ``(T, H, W)`` in patches of each video, or of each view of an image.
        places: ``[N]`` the patch of each of the tower's own rows, counted through all grids; -1 for CLS tokens.
        pixels: colours of all patches, as ``ModelAdapter.tower_pixels`` has them.
        counts: rows that are left of each frame of each video.
        packing: what is left; None as long as that is everything, and after the last layer.
        last: what was left in the last layer, after it.
        shape: of the hidden states as the tower has them.
        rows: how many entered each layer.
        positions: of all rows, as the tower gave them to the layer at hand.
        states: queries, keys and values of the attention that ran last, and the scale.
    """

    owner: TowerStage
    recorder: Recorder
    grids: list[tuple[int, int, int]]
    places: Tensor
    windows: tuple[int, ...] | None
    pixels: Callable[[], Tensor]
    counts: list[tuple[int, ...]] = field(default_factory=list)
    packing: Packing | None = None
    last: Packing | None = None
    shape: tuple[int, ...] = ()
    rows: list[int] = field(default_factory=list)
    positions: tuple[Tensor, ...] | None = None
    states: tuple[Tensor, Tensor, Tensor, float] | None = None
    _packed_positions: tuple[Packing, tuple[Tensor, ...]] | None = None

    def start(self, hidden: Tensor) -> None:
        """Pack all rows."""
        self.shape = tuple(hidden.shape)
        extra = int(self.owner.shape.has_cls)
        # Known only now: weights of offloaded towers are on no device before.
        self.places = self.places.to(hidden.device)
        self.counts = [(height * width + extra,) * frames for frames, height, width in self.grids]
        self.packing = Packing.everything([n for counts in self.counts for n in counts], self.windows, hidden.device)

    def attention(self, patches: Tensor, cls: Tensor) -> TowerAttention:
        """Of some packed rows in the layer at hand."""
        assert self.states is not None
        query, key, value, scale = self.states
        return TowerAttention(query[patches], key[patches], value[patches], query[cls] if len(cls) else None, scale)

    def packed_arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """A layer's arguments with the rotary positions, if any, of the packed rows."""
        assert self.packing is not None
        self.positions = arguments.get("position_embeddings")
        if self.positions is None:
            return dict(arguments)
        if self._packed_positions is None or self._packed_positions[0] is not self.packing:
            self._packed_positions = self.packing, tuple(values[self.packing.origin] for values in self.positions)
        return {**arguments, "position_embeddings": self._packed_positions[1]}


class TowerStage:
    """Runs a ``vision`` method in one model's tower.

    Raises:
        ValueError: the projector reads several layers or none, or the method names layers that the tower lacks or asks
            for attention before it has run.
    """

    def __init__(self, adapter: ModelAdapter, core: Any, method: TowerReducer) -> None:
        read = getattr(core.config, "vision_feature_layer", None)
        if isinstance(read, list | tuple) and len(read) > 1:
            raise ValueError(
                f"vision method {method.name!r}: the projector of this model reads the layers {list(read)} of its "
                "vision tower; supported are models that read one"
            )
        if method.before_layer and "attention" in method.needs:
            raise ValueError(f"vision method {method.name!r} acts before a layer, so it cannot read its attention")
        self.adapter = adapter
        self.core = core
        self.method = method
        self.read = read
        self.layers = adapter.tower_span(core)
        if not self.layers:
            raise ValueError(f"vision method {method.name!r}: no layer of this vision tower reaches the projector")
        self.windowed = adapter.windowed_layers(core)
        whole = tuple(index for index in range(len(self.layers)) if index not in self.windowed)
        self.shape = TowerShape(len(self.layers), whole, adapter.has_cls(core))
        self.acting = frozenset(method.layers(self.shape))
        if not self.acting <= set(range(len(self.layers))):
            raise ValueError(
                f"vision.{method.name} acts at the layers {sorted(self.acting)}; the tower has {len(self.layers)}"
            )

    def attach(self, wrap: Callable[[Any, str, Callable[..., Any]], None]) -> None:
        """
        Args:
            wrap: replaces a method of an instance by one that gets the original first.
        """
        for index, layer in enumerate(self.layers):
            wrap(layer, "forward", partial(self._layer, index))
            attention = self.adapter.tower_attention(layer)
            wrap(attention, "forward", partial(self._attention, index, attention))
        for module in self.adapter.whole_inputs(self.core):
            wrap(module, "forward", self._whole_input)
        projector = self.adapter.patch_projector(self.core)
        if projector is not None:
            wrap(projector, "forward", self._projector)

    @contextmanager
    def running(self, kind: str, encoding: Encoding, sizes: Sequence[int], recorder: Recorder) -> Iterator[None]:
        """The tower runs meanwhile.

        Args:
            sizes: how many of the tower's own items are one video; those of one size are its frames.

        Raises:
            ValueError: another layer of the tower is asked for than the model's configuration says.
        """
        if encoding.get("vision_feature_layer") not in (None, self.read):
            raise ValueError(
                f"vision method {self.method.name!r} leaves the patches of layer {self.read} whole, not those of "
                f"vision_feature_layer={encoding['vision_feature_layer']}: set it in the model's configuration"
            )
        lying = self.adapter.tower_rows(self.core, kind, encoding)
        grids = _joined(lying.grids, sizes)
        pixels = cache(partial(self.adapter.tower_pixels, self.core, kind, encoding))
        run = _Run(self, recorder, grids, self._places(lying, grids), lying.windows, pixels)
        token = _RUN.set(run)
        try:
            yield
        finally:
            _RUN.reset(token)
        if run.rows:  # none where a VideoCache had the output
            left = run.rows[-1] if run.last is None else len(run.last.origin)
            recorder.tower(self.method.name, len(run.places), run.rows, left)

    def described(self) -> str:
        """All that is done to the tower at this moment, for caches of its output; empty if it runs as it is."""
        run = self._current()
        if run is None:
            return ""
        colours = [self.adapter.pixel_mean, self.adapter.pixel_std] if "pixels" in self.method.needs else []
        return json.dumps([self.method.name, self.method.model_dump(mode="json"), run.grids, colours])

    def whole(self, hidden: Tensor) -> Tensor:
        """Rows of a layer as if each patch had those of what stands for it."""
        run = self._current()
        if run is None or run.packing is None:
            return hidden
        return run.packing.restored(hidden.flatten(0, -2)).view(*run.shape[:-1], -1)

    def whole_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What the attention of a layer was called with, as if each patch had been there."""
        run = self._current()
        if run is None or run.packing is None or run.positions is None:
            return arguments
        return {**arguments, "position_embeddings": run.positions}

    def _current(self) -> _Run | None:
        run = _RUN.get()
        return run if run is not None and run.owner is self else None

    def _places(self, lying: TowerRows, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """``[N]`` the patch of each row of the tower, counted through all grids; -1 for CLS tokens."""
        places = lying.places
        if places is None:
            places = torch.arange(sum(t * h * w for t, h, w in grids))
        if not self.shape.has_cls:
            return places
        frames = places.split([h * w for t, h, w in grids for _ in range(t)])
        return torch.cat([nn.functional.pad(own, (1, 0), value=-1) for own in frames])

    # -- what is wrapped --

    def _layer(self, index: int, original: Callable[..., Any], hidden: Tensor, *args: Any, **arguments: Any) -> Any:
        run = self._current()
        if run is None:
            return original(hidden, *args, **arguments)
        if run.packing is None:
            if index not in self.acting:
                run.rows.append(hidden.shape[:-1].numel())
                return original(hidden, *args, **arguments)
            layer: Any = self.layers[index]
            if hidden.requires_grad and layer.training and getattr(layer, "gradient_checkpointing", False):
                # The second forward comes when this run is over.
                raise ValueError("gradient checkpointing does not work with a `vision` method: use `model.eval()`")
            run.start(hidden)
            if hidden.ndim == 3:  # a batch of views becomes one of packed rows
                hidden = hidden.flatten(0, 1)[None]
        if index in self.acting and self.method.before_layer:
            hidden = self._reduced(run, index, hidden)
        assert run.packing is not None
        arguments = run.packed_arguments(arguments)
        run.rows.append(len(run.packing.origin))
        if index in self.acting and not self.method.before_layer:
            hidden = self._around(run, index, hidden, arguments)
        else:
            hidden = original(hidden, *args, **arguments)
        if index == len(self.layers) - 1:
            hidden = run.packing.restored(hidden.flatten(0, -2)).view(run.shape)
            run.packing, run.last = None, run.packing
        return hidden

    def _around(self, run: _Run, index: int, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """A layer in which patches are left out between attention and MLP."""
        norm, attention, second_norm, mlp = self.adapter.tower_block(self.layers[index])
        mixed = attention(norm(hidden), **arguments)
        hidden = hidden + (mixed[0] if isinstance(mixed, tuple) else mixed)
        hidden = self._reduced(run, index, hidden)
        run.states = None
        return hidden + mlp(second_norm(hidden))

    def _attention(
        self, index: int, module: nn.Module, original: Callable[..., Any], *args: Any, **arguments: Any
    ) -> Any:
        run = self._current()
        if run is None or run.packing is None:
            return original(*args, **arguments)
        rest = dict(arguments)
        hidden = args[0] if args else rest.pop("hidden_states")
        query, key, value, scale = self.adapter.tower_projections(module, hidden.flatten(0, -2), rest)
        whole_context = self.method.whole_context
        chunks = run.packing.chunks(windows=index in self.windowed, whole_context=whole_context)
        bias = run.packing.log_sizes if self.method.proportional and not whole_context else None
        if index in self.acting and "attention" in self.method.needs:
            run.states = query, key, value, scale
        return self.adapter.tower_output(module, attend(query, key, value, chunks, scale, bias))

    def _whole_input(self, original: Callable[..., Any], hidden: Tensor, *args: Any, **arguments: Any) -> Any:
        return original(self.whole(hidden), *args, **arguments)

    def _projector(self, original: Callable[..., Any], features: Tensor) -> Any:
        """Patches with one value are projected once."""
        run = self._current()
        if run is None or run.last is None:
            return original(features)
        # CLS tokens are not projected.
        extra, packing = int(self.shape.has_cls), run.last
        every, left = run.places >= 0, run.places[packing.origin] >= 0
        total, count = len(every) - extra * len(packing.frames), len(left) - extra * len(packing.counts)
        if features.shape[:-1].numel() != total:  # pooled
            return original(features)
        rows = every.cumsum(0)[packing.origin[true_indices(left, count)]] - 1
        projected = original(features.flatten(0, -2)[rows.to(features.device)][None])[0]
        owners = left.cumsum(0)[packing.owner[true_indices(every, total)]] - 1
        return projected[owners.to(projected.device)].unflatten(0, features.shape[:-1])

    # -- what a method does --

    def _reduced(self, run: _Run, index: int, hidden: Tensor) -> Tensor:
        """``hidden`` with only what the method leaves of each video."""
        packing = run.packing
        assert packing is not None
        with run.recorder.span("vision"):
            flat = hidden.flatten(0, -2)
            own = torch.arange(len(flat), device=flat.device)
            rows = own.split([sum(counts) for counts in run.counts])
            parts = [self._part(run, index, flat, some, video) for video, some in enumerate(rows)]
            if sum(len(part.kept) for part in parts) == len(flat):
                return hidden
            run.counts = [part.counts for part in parts]
            kept = torch.cat([part.kept for part in parts])
            rank = torch.empty_like(own).index_copy_(0, kept, own[: len(kept)])
            assignment = rank[torch.cat([part.target for part in parts])]
            if any(part.merges for part in parts):
                flat = weighted_mean(flat, torch.cat([part.weights for part in parts]), assignment, len(kept))
            else:
                flat = flat.index_select(0, kept)
            run.packing = packing.narrowed(kept, assignment, tuple(n for counts in run.counts for n in counts))
        return flat if hidden.ndim == 2 else flat[None]

    def _part(self, run: _Run, index: int, hidden: Tensor, rows: Tensor, video: int) -> _Part:
        """What the method leaves of one video.

        Args:
            hidden: of all videos.
            rows: the packed rows of this one.
        """
        packing, counts, extra = run.packing, run.counts[video], int(self.shape.has_cls)
        assert packing is not None
        # In the order of the grid, behind the CLS tokens in that of the frames.
        order = rows[run.places[packing.origin[rows]].argsort(stable=True)]
        cls, patches = order.split([extra * len(counts), len(order) - extra * len(counts)])
        places = run.places[packing.origin[patches]]
        tokens = TowerTokens(
            hidden[patches],
            packing.sizes[patches],
            places - sum(t * h * w for t, h, w in run.grids[:video]),
            tuple(count - extra for count in counts),
            run.grids[video],
            index,
            self.shape,
            pixels=run.pixels().to(rows.device)[places] if "pixels" in self.method.needs else None,
            attention=run.attention(patches, cls) if "attention" in self.method.needs else None,
        )
        # It ranks and groups patches, in float32 where it says so, and is no part of what the model computes.
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            merge = self.method.reduce(tokens)
        if merge is None or len(merge.survivors) == tokens.num_tokens:
            return _Part(rows, rows, torch.ones(len(rows), device=rows.device), counts)
        frames = torch.repeat_interleave(
            torch.arange(len(counts), device=rows.device),
            torch.tensor(tokens.counts, device=rows.device),
            output_size=tokens.num_tokens,
        )
        left = merge.counts
        if left is None:
            left = tuple(n for n in frames[merge.survivors].bincount(minlength=len(counts)).tolist() if n)
        if sum(left) != len(merge.survivors) or len(merge.assignment) != tokens.num_tokens:
            raise RuntimeError(
                f"vision method {self.method.name!r} left {len(merge.survivors)} survivors, {left} by frame, and "
                f"assigned {len(merge.assignment)} of {tokens.num_tokens} patches"
            )
        kept, target, weights = [patches[merge.survivors]], torch.empty_like(rows), merge.weights
        start = rows[:1]
        target[patches - start] = kept[0][merge.assignment]
        shares = torch.zeros(len(rows), device=rows.device)
        shares[kept[0] - start] = 1.0
        if weights is not None:
            shares[patches - start] = weights
        if extra:
            stays, heir = _heirs(frames, merge, len(counts), len(left))
            kept.append(cls[stays])
            target[cls - start] = cls[heir]
            shares[kept[1] - start] = 1.0
        return _Part(
            torch.cat(kept).sort().values, target, shares, tuple(n + extra for n in left), merges=weights is not None
        )


def _joined(grids: Sequence[tuple[int, int, int]], sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Grids of one video that have one size make up a longer one.

    Args:
        sizes: how many are one video's, if they are all grids; else these are views that have nothing in common.
    """
    if len(grids) != sum(sizes):
        return list(grids)
    rest, found = iter(grids), []
    for own in (list(islice(rest, size)) for size in sizes):
        same = len({grid[1:] for grid in own}) == 1
        found += [(sum(t for t, *_ in own), *own[0][1:])] if same else own
    return found


@dataclass(frozen=True)
class _Part:
    """What is left of one video.

    Attributes:
        kept: packed rows, rising.
        target: ``[rows]`` the one of these that stands for each of its rows.
        weights: ``[rows]`` shares in the mean that they become.
        counts: of each frame that is left, CLS tokens included.
        merges: the shares are not those of the rows that are kept alone.
    """

    kept: Tensor
    target: Tensor
    weights: Tensor
    counts: tuple[int, ...]
    merges: bool = False


def _heirs(frames: Tensor, merge: TowerMerge, count: int, left: int) -> tuple[Tensor, Tensor]:
    """Frames whose CLS tokens stay, ``[left]``, and of each of ``count`` frames the one whose token it has then.

    That is itself, if it stays, else the frame that its first patch went to.

    Args:
        frames: ``[R]`` rising, of each patch.
    """
    of_survivors = frames[merge.survivors]
    gone = torch.ones(count, dtype=torch.int32, device=frames.device).index_fill_(0, of_survivors, 0)
    own = torch.arange(count, device=frames.device)
    first = torch.searchsorted(frames, own)
    return gone.argsort(stable=True)[:left], torch.where(gone.bool(), of_survivors[merge.assignment[first]], own)
