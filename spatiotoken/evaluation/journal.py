"""Answers on disk: one line of JSON for each, written at once, so that a killed run loses only what it was asking."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from spatiotoken.evaluation.base import Json


@dataclass(frozen=True)
class Answered:
    """One question under one config.

    Attributes:
        prediction: what the model said; None where the question could not be asked.
        parsed: what that means; None where it means nothing.
        scores: by metric; none where the dataset's answers are not public.
        frames: indices in the video of the frames that the vision tower saw.
        prompt_tokens, visual_tokens, visual_kept: means over the questions asked together; see ``ForwardReport``.
        retention: visual tokens of the average decoder layer, as a share of ``visual_tokens``.
        density: share of the causal pairs that attention computed in the prefill.
        ttft_ms: until the first token of those that were asked together.
        decode_ms: all later tokens of those.
        peak_memory_bytes: of the process so far on a CPU, of the allocator on a GPU.
        error: why the question could not be asked.
    """

    dataset: str
    config: str
    id: str
    prediction: str | None = None
    parsed: Json | None = None
    scores: dict[str, float] | None = None
    frames: list[int] | None = None
    prompt_tokens: float | None = None
    visual_tokens: float | None = None
    visual_kept: float | None = None
    retention: float | None = None
    density: float | None = None
    ttft_ms: float | None = None
    decode_ms: float | None = None
    peak_memory_bytes: int | None = None
    error: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.dataset, self.config, self.id


class Journal:
    """Rows of one run; each process that asks has files of its own.

    Args:
        writer: name of the process, the same when it resumes.
    """

    def __init__(self, output: Path, writer: str) -> None:
        self._directory = output / "rows"
        self._writer = writer
        self._mended: set[Path] = set()

    def read(self) -> Iterator[Answered]:
        """All rows of all processes, later ones of a question last. What a killed process left of a line is not there.

        Raises:
            ValueError: a line that is not the last of its file is damaged; the message names it.
        """
        for path in sorted(self._directory.glob("*/*/*.jsonl")):
            lines = path.read_bytes().split(b"\n")
            for number, line in enumerate(lines[:-1], 1):
                try:
                    yield Answered(**json.loads(line))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{path}: line {number} is damaged: {error}") from error

    def write(self, rows: Iterable[Answered]) -> None:
        """Returns when they are on disk."""
        lines: dict[Path, list[str]] = {}
        for row in rows:
            path = self._directory / row.dataset / row.config / f"{self._writer}.jsonl"
            lines.setdefault(path, []).append(json.dumps(asdict(row), ensure_ascii=False) + "\n")
        for path, texts in lines.items():
            self._mend(path)
            with path.open("ab") as file:
                file.write("".join(texts).encode())
                file.flush()
                os.fsync(file.fileno())

    def _mend(self, path: Path) -> None:
        """Cut off what a killed process left of its last line."""
        if path in self._mended:
            return
        self._mended.add(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(path, whole)
