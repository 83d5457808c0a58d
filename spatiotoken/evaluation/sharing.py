"""The vision tower's output, computed once for all configs that do not meddle with the tower."""

from __future__ import annotations

import copy
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spatiotoken.config import PatchConfig
from spatiotoken.patches.adapter import find_adapter

_EXTRACTORS = ("get_video_features", "get_image_features")


def leaves_the_tower_alone(config: PatchConfig) -> bool:
    """Whether the tower does the same under a config as in the unpatched model, with nothing read off within."""
    reads_within = config.tokens is not None and not config.tokens.needs <= {"question"}
    return config.frames is None and config.vision is None and not reads_within and not config.fast_tower


class SharedTower:
    """Remembers what tower and projector made of the inputs of one batch.

    Attributes:
        active: whether remembered outputs may be used for what is asked now.
        saved_ms: what remembering has saved since it was last set to 0.
    """

    def __init__(self) -> None:
        self.active = True
        self.saved_ms = 0.0
        self._known: list[tuple[str, dict[str, Any], Any, float]] = []

    def forget(self) -> None:
        """Before another batch, since what is remembered takes memory."""
        self._known.clear()

    def remembering(self, name: str, encode: Callable[..., Any]) -> Callable[..., Any]:
        """``encode``, asked only once for equal arguments."""
        signature = inspect.signature(encode)

        @functools.wraps(encode)
        def remembered(*args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return encode(*args, **kwargs)
            asked = signature.bind(*args, **kwargs).arguments
            asked = asked.pop("kwargs", {}) | asked
            for known, arguments, output, milliseconds in self._known:
                if known == name and _same(arguments, asked):
                    self.saved_ms += milliseconds
                    return copy.deepcopy(output)
            start = _now()
            output = encode(*args, **kwargs)
            # A copy, since methods write into what they are given.
            self._known.append((name, asked, copy.deepcopy(output), 1000 * (_now() - start)))
            return output

        return remembered


@contextmanager
def shared_tower(model: PreTrainedModel) -> Iterator[SharedTower]:
    """Meanwhile the model's feature extractors remember; patch it inside."""
    core = find_adapter(model).core(model)
    shared = SharedTower()
    before = {name: core.__dict__.get(name) for name in _EXTRACTORS if hasattr(core, name)}
    for name in before:
        setattr(core, name, shared.remembering(name, getattr(core, name)))
    try:
        yield shared
    finally:
        for name, own in before.items():
            if own is None:
                delattr(core, name)
            else:
                setattr(core, name, own)


def _same(mine: dict[str, Any], other: dict[str, Any]) -> bool:
    return mine.keys() == other.keys() and all(_equal(value, other[name]) for name, value in mine.items())


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    return type(a) is type(b) and not isinstance(a, Tensor) and a == b


def _now() -> float:
    """Of the host, when a GPU has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
