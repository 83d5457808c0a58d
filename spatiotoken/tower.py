"""What methods want to know of a vision tower: saliency, hidden features, keys and summaries of frames.

Read by hooks that are there only while the tower runs, from the layers that a method names. The tower itself runs as it
always does, with its own attention; the weights of those layers are computed beside it, from their queries and keys, in
chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from spatiotoken.patches.adapter import Encoding, ModelAdapter, TowerStates
from spatiotoken.tokens.base import Attention, SaliencyReducer, TokenReducer
from spatiotoken.tower_stage import TowerStage

_WEIGHTS = 1 << 25
"""Attention weights that are held at a time."""
_WEIGHTS_ON_CPU = 1 << 18
"""So few that they stay in the cache: twice as fast as with fresh memory for all."""


@dataclass(frozen=True)
class ItemExtras:
    """Optional fields of ``VideoFeatures`` for all rows of one item; ``frame_features`` for its frames."""

    saliency: Tensor | None = None
    hidden: Tensor | None = None
    keys: Tensor | None = None
    frame_features: Tensor | None = None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> ItemExtras:
        """With ``change``, from ``[rows, K]`` to ``[other rows, K]``, done to all that belongs to tokens."""
        return ItemExtras(
            None if self.saliency is None else change(self.saliency.T).T,
            None if self.hidden is None else change(self.hidden),
            None if self.keys is None else change(self.keys),
            self.frame_features,
        )

    def to(self, device: torch.device) -> ItemExtras:
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return ItemExtras(**{name: None if value is None else value.to(device) for name, value in held.items()})


def joined(parts: Sequence[ItemExtras]) -> ItemExtras:
    """Of several items as if they were one, their rows one after the other."""
    if len(parts) == 1:
        return parts[0]
    found: dict[str, Tensor | None] = {}
    for name, dim in (("saliency", 1), ("hidden", 0), ("keys", 0), ("frame_features", 0)):
        values = [value for part in parts if (value := getattr(part, name)) is not None]
        found[name] = torch.cat(values, dim=dim) if values else None
    return ItemExtras(**found)


@dataclass
class _Attention:
    """What went through the attention of one layer, and what was made of it when first asked for."""

    module: nn.Module
    arguments: dict[str, Any]
    projected: list[Tensor] = field(default_factory=list)
    states: list[TowerStates] | None = None


@dataclass
class _Seen:
    """What the hooks have caught of one run."""

    attention: dict[int, _Attention] = field(default_factory=dict)
    hidden: Tensor | None = None
    head_input: Tensor | None = None
    head_output: Tensor | None = None


class TowerReader:
    """Reads what one method needs from one model's tower.

    Args:
        reduced: what leaves out patches within the tower; read are all of them nevertheless, each with the values of
            whatever stands for it.

    Raises:
        ValueError: the method wants the attention of a part that the tower lacks.
    """

    def __init__(
        self, adapter: ModelAdapter, core: Any, method: TokenReducer, reduced: TowerStage | None = None
    ) -> None:
        self.adapter = adapter
        self.reduced = reduced
        self.core = core
        self.needs = method.needs
        self.layers = adapter.tower_layers(core)
        self.head = adapter.pooling_head(core)
        self.has_cls = adapter.has_cls(core)
        self.attention = _resolve(method.attention if isinstance(method, SaliencyReducer) else "auto", self)
        self.saliency_layers = method.saliency_layers(len(self.layers)) if "saliency" in self.needs else ()
        if any(not 0 <= index < len(self.layers) for index in self.saliency_layers):
            raise ValueError(f"{method.name}: the tower has no layers {self.saliency_layers}, only {len(self.layers)}")

    @contextmanager
    def reading(self) -> Iterator[_Seen]:
        """Catch what passes through the tower meanwhile."""
        seen = _Seen()
        handles = []
        if self.head is not None and self.needs & {"saliency", "frame_features"}:
            handles.append(self.head.register_forward_hook(_catch_head(seen)))
        wanted = set(self.saliency_layers) if self.attention != "head" else set()
        if "keys" in self.needs:
            wanted.add(len(self.layers) - 1)
        for index in sorted(wanted):
            module = self.adapter.tower_attention(self.layers[index])
            arguments, projected = _catch_attention(seen, index, self.reduced)
            handles.append(module.register_forward_pre_hook(arguments, with_kwargs=True))
            handles += [linear.register_forward_hook(projected) for linear in self.adapter.tower_linears(module)]
        if self.needs & {"hidden", "frame_features"}:
            handles.append(self.layers[-1].register_forward_hook(_catch_hidden(seen, self.reduced)))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()  # they rank and group tokens, and do not become part of what the model computes
    def extras(self, kind: str, encoding: Encoding, seen: _Seen) -> list[ItemExtras]:
        """What was caught, item by item."""
        count = len(self.adapter.items(self.core, kind, encoding))
        found: dict[str, Sequence[Tensor | None]] = {}

        def arranged(values: Tensor) -> list[Tensor]:
            return self.adapter.arrange(self.core, kind, encoding, values)

        if "saliency" in self.needs:
            rows = torch.stack([self._saliency(seen, index) for index in self.saliency_layers], dim=-1)
            found["saliency"] = [item.T for item in arranged(rows)]
        if "keys" in self.needs:
            states, hidden = self._states(seen, len(self.layers) - 1)
            keys = hidden.new_empty(_flat(hidden).shape[0], states[0].key.shape[-1], dtype=torch.float32)
            for part in states:
                keys[part.places] = part.key.float().mean(dim=1)
            found["keys"] = arranged(self._patches(keys, hidden))
        if self.needs & {"hidden", "frame_features"}:
            assert seen.hidden is not None
            patches = self._patches(_flat(seen.hidden), seen.hidden)
            found["hidden"] = arranged(patches)
        if "frame_features" in self.needs:
            summary = self._summary(seen)
            if summary is None:
                items = self.adapter.items(self.core, kind, encoding)
                found["frame_features"] = [
                    hidden[segment.rows(hidden.device)].unflatten(0, (segment.grid[0], -1)).float().mean(dim=1)
                    for hidden, item in zip(found["hidden"], items, strict=True)
                    if hidden is not None and (segment := item.segments[0])
                ]
            else:
                found["frame_features"] = self.adapter.arrange_views(self.core, kind, encoding, summary)
        nothing: list[Tensor | None] = [None] * count
        return [
            ItemExtras(**{name: found.get(name, nothing)[index] for name in ItemExtras.__dataclass_fields__})
            for index in range(count)
        ]

    def _saliency(self, seen: _Seen, index: int) -> Tensor:
        """``[patches]`` attention that each patch got in a layer."""
        if self.attention == "head":
            if self.head is None or seen.head_input is None:
                raise RuntimeError("the pooling head of the tower did not run")
            part = self.adapter.head_states(self.head, seen.head_input)
            return mean_weights(part.query, part.key, part.scale).flatten()
        states, hidden = self._states(seen, index)
        got = hidden.new_empty(_flat(hidden).shape[0], dtype=torch.float32)
        for part in states:
            query = part.query[:, :, :1] if self.attention == "cls" else part.query
            got[part.places] = mean_weights(query, part.key, part.scale)
        return self._patches(got[:, None], hidden)[:, 0]

    def _states(self, seen: _Seen, index: int) -> tuple[list[TowerStates], Tensor]:
        """Queries and keys of a layer, and something that has the rows of the layer's input."""
        caught = seen.attention[index]
        if caught.states is None:
            caught.states = self.adapter.tower_states(caught.module, caught.projected, caught.arguments)
        return caught.states, caught.projected[0]

    def _patches(self, values: Tensor, like: Tensor) -> Tensor:
        """Rows of a layer without those of the CLS tokens."""
        return values.unflatten(0, like.shape[:2])[:, 1:].flatten(0, 1) if self.has_cls else values

    def _summary(self, seen: _Seen) -> Tensor | None:
        """``[views, Dv]`` what the tower itself makes of each view."""
        if self.has_cls and seen.hidden is not None:
            return seen.hidden[:, 0].float()
        return None if seen.head_output is None else seen.head_output.float()


def mean_weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """``[V, n]`` float32 softmax weights that keys ``[V, heads, n, d]`` get, averaged over heads and ``query`` rows.

    Args:
        query: ``[V, heads, m, d]``.
    """
    (views, heads, rows, _), count = query.shape, key.shape[2]
    got = query.new_zeros(views, count, dtype=torch.float32)
    held = _WEIGHTS_ON_CPU if query.device.type == "cpu" else _WEIGHTS
    view_step, head_step, row_step = (max(1, held // each) for each in (heads * rows * count, rows * count, count))
    with torch.autocast(query.device.type, enabled=False):  # a caller's would make the products bfloat16
        for first, head in product(range(0, views, view_step), range(0, heads, head_step)):
            of, some = got[first : first + view_step], slice(head, head + head_step)
            queries, keys = (x[first : first + view_step, some].float().flatten(0, 1) for x in (query, key))
            for part in queries.split(row_step, dim=1):
                weights = torch.baddbmm(got.new_empty(1), part, keys.mT, beta=0, alpha=scale).softmax(dim=-1)
                of += weights.view(len(of), -1, count).sum(dim=1)
    return got / (heads * rows)


def _resolve(wanted: Attention, reader: TowerReader) -> Attention:
    has = {"cls": reader.has_cls, "head": reader.head is not None, "received": True}
    if wanted == "auto":
        return next(name for name in ("cls", "head", "received") if has[name])
    if not has[wanted]:
        there = ", ".join(name for name, present in has.items() if present)
        raise ValueError(f"tokens.attention: this model's vision tower has no {wanted!r}; supported: auto, {there}")
    return wanted


def _flat(hidden: Tensor) -> Tensor:
    return hidden.flatten(0, -2)


def _catch_attention(seen: _Seen, index: int, reduced: TowerStage | None) -> tuple[Any, Any]:
    """Hooks before the attention, and behind those of its modules that make queries and keys."""

    def called(module: nn.Module, args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        rest = {name: value for name, value in arguments.items() if name != "hidden_states"}
        seen.attention[index] = _Attention(module, reduced.whole_arguments(rest) if reduced else rest)

    def projected(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.attention[index].projected.append(reduced.whole(output) if reduced else output)

    return called, projected


def _catch_hidden(seen: _Seen, reduced: TowerStage | None) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.hidden = reduced.whole(hidden) if reduced else hidden

    return hook


def _catch_head(seen: _Seen) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.head_input, seen.head_output = args[0], output

    return hook


__all__ = ["ItemExtras", "TowerReader", "joined", "mean_weights"]
