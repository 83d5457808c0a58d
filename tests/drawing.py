"""What the property tests are drawn from: grids, what tokens show, and settings of methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from pydantic import ValidationError
from torch import Tensor

from spatiotoken.config import load_config
from spatiotoken.registry import Method
from tests.cases import REDUCED

Grid = tuple[int, int, int]

CONTENTS = ("random", "equal", "static", "drifting", "cuts", "some zero", "all zero", "duplicates", "opposed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def drawn(examples: int) -> settings:
    """The same ``examples`` in every run."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )


@st.composite
def grids(draw: DrawFn, most: int = 600, frames: int = 64) -> Grid:
    """``(T, H, W)`` of at most so many tokens: images, odd grids, one token per frame."""
    time = draw(st.integers(1, min(8, frames)) | st.integers(1, frames))
    places = most // time
    side = min(20, isqrt(places))
    short = draw(st.integers(1, min(3, side)) | st.integers(1, side))
    long = draw(st.just(short) | st.integers(short, min(20, places // short)))
    return draw(st.sampled_from([(time, short, long), (time, long, short)]))


@dataclass(frozen=True)
class Scene:
    """What the tokens of a clip show, whatever their number of channels."""

    content: str
    shift: float = 0.0
    scale: float = 1.0
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def tokens(self, grid: Grid, dim: int, salt: int = 0) -> Tensor:
        """``[T * H * W, D]``; another ``salt`` gives others with the same relations between them."""
        return _CONTENT[self.content](self._noise(grid, dim, salt), self._generator(salt + 1)).flatten(0, 1)

    def rows(self, count: int, dim: int, salt: int) -> Tensor:
        """``[count, D]`` rows that the content has no part in."""
        return self._noise((1, 1, count), dim, salt).flatten(0, 1)

    def _noise(self, grid: Grid, dim: int, salt: int) -> Tensor:
        generator = self._generator(salt)
        shift = self.shift * torch.randn(dim, generator=generator)
        noise = torch.randn(grid[0], grid[1] * grid[2], dim, generator=generator)
        return (self.scale * (shift + noise)).to(self.dtype)

    def _generator(self, salt: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + salt)


def _cuts(noise: Tensor, generator: torch.Generator) -> Tensor:
    scene = torch.randint(0, min(4, noise.shape[0]), (noise.shape[0],), generator=generator).sort().values
    return 0.9 * noise[scene] + 0.1 * noise


def _some_zero(noise: Tensor, generator: torch.Generator) -> Tensor:
    return noise * (torch.rand(*noise.shape[:2], 1, generator=generator) < 0.6)


def _duplicates(noise: Tensor, generator: torch.Generator) -> Tensor:
    count = noise.shape[0] * noise.shape[1]
    which = torch.randint(0, min(5, count), noise.shape[:2], generator=generator)
    return noise.flatten(0, 1)[which]


def _opposed(noise: Tensor, generator: torch.Generator) -> Tensor:
    sign = 2 * torch.randint(0, 2, (*noise.shape[:2], 1), generator=generator) - 1
    return noise[:1, :1] * sign


_CONTENT: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "random": lambda noise, _: noise,
    "equal": lambda noise, _: noise[:1, :1].expand_as(noise).clone(),
    "static": lambda noise, _: noise[:1].expand_as(noise).clone(),
    "drifting": lambda noise, _: 0.8 * noise[:1] + 0.2 * noise,
    "cuts": _cuts,
    "some zero": _some_zero,
    "all zero": lambda noise, _: torch.zeros_like(noise),
    "duplicates": _duplicates,
    "opposed": _opposed,
}


def scenes() -> SearchStrategy[Scene]:
    return st.builds(
        Scene,
        content=st.sampled_from(CONTENTS),
        shift=st.sampled_from([0.0, 3.0]),
        scale=st.sampled_from([1.0, 0.02, 2000.0]),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 1000),
    )


def retentions() -> SearchStrategy[float]:
    """From less than a token per frame to all of them."""
    thousandths = st.integers(1, 1000).map(lambda share: share / 1000)
    powers = st.integers(1, 99).map(lambda power: 0.93**power)
    return thousandths | powers | st.sampled_from([1 / 3, 0.25, 0.5, 0.999, 1.0])


def instances(method: type[Method], **fixed: Any) -> SearchStrategy[Method]:
    """The method with any valid settings but the ``fixed`` ones; also as its preset and ``tests/cases.py`` have it."""
    schemas = method.model_json_schema()["properties"]
    fields = {name: retentions() if name == "retention" else values(schema) for name, schema in schemas.items()}
    always = {name: field for name, field in fields.items() if name == "retention"}
    some = st.fixed_dictionaries(always, optional={name: fields[name] for name in fields if name not in always})
    any_of = st.sampled_from(known_settings(method)) | some | st.fixed_dictionaries(fields)
    return any_of.map(lambda chosen: fitted(method, {**chosen, **fixed}))


def fitted(method: type[Method], chosen: dict[str, Any]) -> Method:
    """The method with as many shares as layers, the first of each, and with falling shares if it takes no others."""
    every = {name: field.default for name, field in method.model_fields.items()} | chosen
    lists = {name: every[name] for name in ("layers", "keep", "shares") if isinstance(every.get(name), (list, tuple))}
    count = min(map(len, lists.values()), default=0)
    cut = {name: tuple(values[:count]) for name, values in lists.items()}
    try:
        return method(**{**chosen, **cut})
    except ValidationError:
        falling = {name: tuple(sorted(cut[name], reverse=True)) for name in ("keep", "shares") if name in cut}
        return method(**{**chosen, **cut, **falling})


def known_settings(method: type[Method]) -> list[dict[str, Any]]:
    """Those that reduce small clips in other tests, and those of the preset."""
    return [REDUCED[method.stage, method.name], load_config(method.name).methods()[method.stage].model_dump()]


def values(schema: dict[str, Any]) -> SearchStrategy[Any]:
    """What a field of this JSON schema may be; where it has no upper bound, up to 10 or ten more than the lower."""
    if "anyOf" in schema:
        return st.one_of([values(each) for each in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "prefixItems" in schema:
        return st.tuples(*map(values, schema["prefixItems"]))
    if "items" in schema:
        least = max(1, schema.get("minItems", 1))
        return st.lists(values(schema["items"]), min_size=least, max_size=min(schema.get("maxItems", 1000), least + 3))
    if schema["type"] == "string":  # a file, of which there is none
        return st.nothing()
    if schema["type"] == "null":
        return st.none()
    if schema["type"] == "boolean":
        return st.booleans()
    if schema["type"] == "integer":
        return st.integers(schema["minimum"], min(schema.get("maximum", 1000), schema["minimum"] + 10))
    if "exclusiveMinimum" in schema and "maximum" not in schema:
        return st.integers(-30, 10).map(lambda power: schema["exclusiveMinimum"] + 10 ** (power / 10))
    low = schema["exclusiveMinimum"] + 0.001 if "exclusiveMinimum" in schema else schema["minimum"]
    high = schema.get("maximum", schema.get("exclusiveMaximum", low + 10))
    return st.floats(low, high, exclude_max="exclusiveMaximum" in schema)
