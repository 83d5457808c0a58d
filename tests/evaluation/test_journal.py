"""Answers on disk, whatever happens to the process that writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from spatiotoken.evaluation.journal import Answered, Journal

ROWS = [
    Answered("nextqa", config, str(number), prediction=f"ü {number}\nA", parsed="A", scores={"accuracy": 1.0})
    for config in ("dense", "evs")
    for number in range(3)
]


def test_rows_come_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "0-of-2")
    assert list(journal.read()) == []
    journal.write(ROWS[:2])
    journal.write(ROWS[2:])
    other = Answered("nextqa", "dense", "9", error="VideoReadError: x.mp4")
    Journal(tmp_path, "1-of-2").write([other])
    assert sorted(Journal(tmp_path, "1-of-2").read(), key=lambda row: row.key) == sorted(
        [*ROWS, other], key=lambda row: row.key
    )
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.jsonl"))
    assert files == [
        "rows/nextqa/dense/0-of-2.jsonl",
        "rows/nextqa/dense/1-of-2.jsonl",
        "rows/nextqa/evs/0-of-2.jsonl",
    ]


def test_a_line_cut_off_anywhere_is_no_answer(tmp_path: Path) -> None:
    """A process may be killed within a line, and within a letter."""
    Journal(tmp_path, "0").write(ROWS[:2])
    (path,) = tmp_path.rglob("*.jsonl")
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole)):
        path.write_bytes(whole[:length])
        journal = Journal(tmp_path, "0")
        assert list(journal.read()) == ROWS[:1]
        journal.write(ROWS[1:2])
        assert path.read_bytes() == whole


def test_damage_is_not_passed_over(tmp_path: Path) -> None:
    Journal(tmp_path, "0").write(ROWS[:2])
    (path,) = tmp_path.rglob("*.jsonl")
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(ValueError, match=r"0\.jsonl: line 1 is damaged"):
        list(Journal(tmp_path, "0").read())
