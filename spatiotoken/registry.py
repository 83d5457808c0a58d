"""One guarded registry for methods (per stage) and model adapters, open to third parties by entry points.

Built-in methods are found by listing the stage packages, so a new file there is all that a new method needs.
Packages of others announce theirs under the entry-point groups ``spatiotoken.methods`` and ``spatiotoken.models``;
each entry point names a module (or class) whose import registers it.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

STAGES = ("frames", "vision", "tokens", "layers", "attention")
"""Stages that can be configured, in the order in which the data passes them."""

Retention = Annotated[float, Field(gt=0.0, le=1.0, description="share of the tokens that is kept")]

T = TypeVar("T")


class UnknownNameError(ValueError):
    """A name that is not registered; the message lists those that are."""


class Registry(Generic[T]):
    """Names to things of one kind. Built-ins and entry points are imported on the first look-up."""

    def __init__(self, kind: str, packages: tuple[str, ...], group: str) -> None:
        self.kind = kind
        self._packages = packages
        self._group = group
        self._items: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str, item: T) -> None:
        """Raises ``ValueError`` if ``name`` is taken by something else."""
        taken = self._items.get(name)
        if taken is not None and _origin(taken) != _origin(item):
            raise ValueError(f"{self.kind} {name!r} is already registered by {_origin(taken)}, not {_origin(item)}")
        self._items[name] = item

    def get(self, name: str) -> T:
        """Raises ``UnknownNameError`` naming what is registered."""
        items = self.items()
        if name not in items:
            close = difflib.get_close_matches(name, items, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise UnknownNameError(f"unknown {self.kind} {name!r}{hint}; supported: {', '.join(sorted(items))}")
        return items[name]

    def items(self) -> dict[str, T]:
        self._load()
        return self._items

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # first, since the modules may look names up themselves
        try:
            for package in self._packages:
                for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
                    importlib.import_module(module.name)
            for entry in entry_points(group=self._group):
                try:
                    entry.load()
                except Exception as error:
                    raise ImportError(f"entry point {entry.name!r} of group {self._group!r} failed: {error}") from error
        except BaseException:
            self._loaded = False
            raise


def _origin(item: object) -> str:
    return f"{getattr(item, '__module__', '?')}.{getattr(item, '__qualname__', repr(item))}"


class Method(BaseModel):
    """Base of every method of every stage: a frozen model whose fields are its YAML keys.

    A subclass with ``method=``, its name in YAML, registers itself under the stage of its base::

        class DivPrune(TokenReducer, method="divprune", paper="2503.02175"): ...
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: ClassVar[str]
    name: ClassVar[str]
    paper: ClassVar[str | None] = None
    """arXiv id of the paper, if there is one."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        if cls.model_fields[str(info.field_name)].annotation is bool:
            return value
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, bool):
                raise ValueError(f"{info.field_name}: {one} is not a number")
        return value

    # Not `name=`: on Python 3.10 that is the metaclass's own argument.
    def __init_subclass__(cls, method: str | None = None, paper: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

    @classmethod
    def __pydantic_init_subclass__(cls, method: str | None = None, paper: str | None = None, **kwargs: Any) -> None:
        # Runs once the fields are complete, unlike __init_subclass__, which only has to let the arguments through.
        super().__pydantic_init_subclass__(**kwargs)
        if method is not None:
            cls.name, cls.paper = method, paper
            METHODS[cls.stage].register(method, cls)

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().split("\n", 1)[0]


METHODS: dict[str, Registry[type[Method]]] = {
    stage: Registry(f"method of stage {stage!r}", (f"spatiotoken.{stage}",), "spatiotoken.methods") for stage in STAGES
}
