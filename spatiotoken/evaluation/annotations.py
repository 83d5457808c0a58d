"""Annotation tables: from the hub, or from files that the user has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spatiotoken.evaluation.base import DatasetError

SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".MP4")
"""Of video files, in the order in which they are looked for."""

Row = Mapping[str, Any]
_LOADERS = {".csv": "csv", ".jsonl": "json", ".parquet": "parquet"}


def load_rows(
    annotations: Path | None, hub: str | None, *, config: str | None = None, split: str = "test", needs: Sequence[str]
) -> list[Row]:
    """Rows of a table of annotations, each with the columns that are needed.

    Args:
        annotations: a file (csv, json, jsonl or parquet), or None for the hub's dataset.
        hub: id of the hub's dataset, of which ``config`` and ``split`` are loaded.
        needs: names of columns.

    Raises:
        DatasetError: nothing can be read, there are no rows, or a column is missing.
    """
    if annotations is not None:
        source = str(annotations)
        rows = _read_file(annotations)
    elif hub is not None:
        source = f"{hub} on the hub"
        rows = _load_hub(hub, config, split)
    else:
        raise DatasetError("the dataset is not on the hub: --annotations must say where its file is")
    if not rows:
        raise DatasetError(f"{source} has no rows")
    missing = [name for name in needs if name not in rows[0]]
    if missing:
        raise DatasetError(f"{source} has no column {', '.join(missing)}; it has {', '.join(rows[0])}")
    return rows


def find_video(directory: Path | None, name: str) -> Path:
    """The file of a video whose name may lack its suffix; where there is none, the path at which it was expected.

    Raises:
        DatasetError: no directory is given.
    """
    if directory is None:
        raise DatasetError("--video-dir must say where the videos are")
    path = directory / name
    if path.suffix in SUFFIXES or path.exists():
        return path
    # Not `with_suffix`: names may have dots in them.
    found = (directory / f"{name}{suffix}" for suffix in SUFFIXES)
    return next((file for file in found if file.exists()), directory / f"{name}{SUFFIXES[0]}")


def _read_file(path: Path) -> list[Row]:
    if not path.is_file():
        raise DatasetError(f"no file of annotations at {path}")
    try:
        if path.suffix == ".json":
            # Arrow has one type for a column; published JSON files often have several.
            rows = json.loads(path.read_text(encoding="utf-8"))
            if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
                raise DatasetError(f"{path} is no list of objects")
            return rows
        if path.suffix not in _LOADERS:
            raise DatasetError(f"{path} is no annotation file; supported: .csv, .json, .jsonl, .parquet")
        from datasets import load_dataset

        return list(load_dataset(_LOADERS[path.suffix], data_files=str(path), split="train"))
    except DatasetError:
        raise
    except Exception as error:  # whatever the readers make of a damaged file
        raise DatasetError(f"cannot read {path}: {' '.join(str(error).split())[:300]}") from error


def _load_hub(hub: str, config: str | None, split: str) -> list[Row]:
    from datasets import load_dataset

    try:
        return list(load_dataset(hub, config, split=split))
    except Exception as error:  # offline, renamed, behind a licence: each has its own
        reason = " ".join(str(error).split())[:300]
        raise DatasetError(f"cannot load {hub} from the hub ({reason}); --annotations can name a local file") from error
