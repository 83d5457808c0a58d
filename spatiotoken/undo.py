"""The log of every attribute that a patch replaces."""

from __future__ import annotations

from typing import Any

_ABSENT = object()


class UndoError(RuntimeError):
    """Something else was put over a patch, so taking the patch away would break it."""


class Undo:
    """Sets attributes on instances and puts everything back.

    Works on the instance's own ``__dict__``: what was inherited from the class becomes inherited again.
    """

    def __init__(self) -> None:
        self._log: list[tuple[Any, str, Any, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        before = owner.__dict__.get(name, _ABSENT)
        owner.__dict__[name] = value
        self._log.append((owner, name, before, value))

    def revert(self) -> None:
        """Put everything back, latest first.

        Raises:
            UndoError: nothing is put back, because one of the attributes was replaced again by somebody else.
        """
        latest = {(id(owner), name): (owner, name, value) for owner, name, _, value in self._log}
        for owner, name, value in latest.values():
            if owner.__dict__.get(name, _ABSENT) is not value:
                raise UndoError(
                    f"{type(owner).__name__}.{name} was replaced after patch_model (by accelerate, PEFT or another "
                    "patch?): undo that first"
                )
        while self._log:
            owner, name, before, _ = self._log.pop()
            if before is _ABSENT:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = before
