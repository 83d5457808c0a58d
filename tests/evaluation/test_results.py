"""Figures of made-up answers, against sums by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spatiotoken.evaluation.base import Json, Question, VideoQA
from spatiotoken.evaluation.journal import Answered
from spatiotoken.evaluation.plan import Plan, make_plan
from spatiotoken.evaluation.results import in_natural_order, summarize

TASKS = ("count", "count", "count", "order", "order")
MINE = (1.0, 1.0, 0.0, 1.0, 0.0)
DENSE = (1.0, 0.0, 1.0, 1.0, 1.0)


class Made(VideoQA, dataset="made"):
    """Five questions about three videos."""

    metrics = ("accuracy", "overlap")
    macro = "task"

    def questions(self) -> Iterator[Question]:
        for number, task in enumerate(TASKS):
            yield Question(str(number), Path(f"v{number // 2}"), "?", "A", groups={"task": task})

    def parse(self, text: str, question: Question) -> Json | None:
        raise AssertionError("nothing is asked here")

    def score(self, parsed: Json | None, question: Question) -> dict[str, float]:
        raise AssertionError("nothing is asked here")


def plan(*configs: str) -> Plan:
    return make_plan("some/model", {"made": {}}, configs)


def answered(config: str, accuracies: tuple[float | None, ...], **cost: Any) -> dict[Any, Answered]:
    rows = []
    for number, accuracy in enumerate(accuracies):
        if accuracy is None:
            rows.append(Answered("made", config, str(number), error="VideoReadError: gone"))
        else:
            scores = {"accuracy": accuracy, "overlap": accuracy / 4}
            rows.append(Answered("made", config, str(number), "a", "A", scores, **{"ttft_ms": number * 1.0} | cost))
    return {row.key: row for row in rows}


def test_by_hand() -> None:
    mine = answered("evs", MINE, visual_kept=12.0, retention=0.25, density=1.0, peak_memory_bytes=2**20)
    results = summarize(plan("dense", "evs"), mine | answered("dense", DENSE, visual_kept=48.0))
    figures = results.results["datasets"]["made"]["configs"]["evs"]
    assert figures["metrics"]["accuracy"]["mean"] == 0.6 and figures["metrics"]["overlap"]["mean"] == 0.15
    assert figures["headline"] == pytest.approx((2 / 3 + 1 / 2) / 2), "the mean over tasks"
    assert figures["groups"]["task"] == {"count": {"mean": 2 / 3, "n": 3}, "order": {"mean": 0.5, "n": 2}}
    assert (figures["visual_kept"], figures["retention"]) == (12, 0.25)
    difference = figures["difference"]
    assert difference["n"] == 5 and difference["mean"] == pytest.approx(-0.2)
    # One question only it has right, two only the other: 1/2 + 3/8 of the eight outcomes, twice the smaller tail.
    assert difference["mcnemar_p"] == 1.0
    low, high = difference["interval"]
    assert -1 <= low < -0.2 < high <= 1
    assert results.timings["made"]["evs"] == {"ttft_ms": 2.0, "decode_ms": None, "peak_memory_bytes": 2**20}
    assert results.failed == 0 and results.asked == 10
    lines = results.page().splitlines()
    (row,) = [line for line in lines if line.startswith("| evs ")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["evs", "58.3"] and cells[3].startswith("-20.0 (") and cells[4:7] == ["1.000", "15.0", "0"]
    assert cells[7:] == ["12", "25.0", "100.0", "2", "1"]
    assert "| count | 3 | 66.7 | 66.7 |" in lines and "| order | 2 | 100.0 | 50.0 |" in lines


def test_only_questions_that_both_answered_are_compared() -> None:
    rows = answered("evs", (1.0, None, 0.0, 1.0, 0.0)) | answered("dense", (None, 0.0, 1.0, 1.0, 1.0))
    results = summarize(plan("dense", "evs"), rows)
    figures = results.results["datasets"]["made"]["configs"]
    assert figures["evs"]["difference"]["n"] == 3 and figures["evs"]["difference"]["mean"] == pytest.approx(-2 / 3)
    assert figures["evs"]["answered"] == figures["dense"]["answered"] == 4 and results.failed == 2
    none = summarize(plan("dense", "evs"), rows | answered("evs", (None,) * 5))
    assert none.results["datasets"]["made"]["configs"]["evs"]["headline"] is None
    assert "| evs |  |" in none.page()


def test_scores_between_right_and_wrong_have_no_mcnemar_test() -> None:
    rows = answered("evs", (0.5, 0.25, 0.0, 1.0, 0.0)) | answered("dense", DENSE)
    difference = summarize(plan("dense", "evs"), rows).results["datasets"]["made"]["configs"]["evs"]["difference"]
    assert difference["mcnemar_p"] is None and difference["mean"] == pytest.approx(-0.45)


def test_without_dense_the_first_config_is_the_reference() -> None:
    rows = answered("random", DENSE) | answered("evs", MINE)
    figures = summarize(plan("random", "evs"), rows).results["datasets"]["made"]
    assert figures["reference"] == "random" and "difference" not in figures["configs"]["random"]


def test_missing_answers_are_an_error() -> None:
    rows = answered("dense", DENSE)
    with pytest.raises(ValueError, match="5 of 5 answers to made under evs are missing"):
        summarize(plan("dense", "evs"), rows)


def test_files(tmp_path: Path) -> None:
    """Times are apart, so that what does not depend on them can be compared byte by byte."""
    for name, time in (("a", 1.0), ("b", 2.0)):
        rows = answered("dense", DENSE, ttft_ms=time) | answered("evs", MINE, ttft_ms=time)
        (tmp_path / name).mkdir()
        summarize(plan("dense", "evs"), rows).write(tmp_path / name)
    assert (tmp_path / "a" / "results.json").read_bytes() == (tmp_path / "b" / "results.json").read_bytes()
    timings = [json.loads((tmp_path / name / "timings.json").read_text())["made"]["evs"]["ttft_ms"] for name in "ab"]
    assert timings == [1.0, 2.0]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["results.json", "results.md", "timings.json"]


def test_groups_are_in_the_order_of_their_numbers() -> None:
    assert in_natural_order(["odd", "even"]) == ["even", "odd"]
    assert in_natural_order(["16 frames", "8 frames", "128 frames"]) == ["8 frames", "16 frames", "128 frames"]
    assert in_natural_order(["100%", "50%", "0%"]) == ["0%", "50%", "100%"]


def test_metrics_that_only_scores_know_are_shown() -> None:
    """Such as a judge's."""
    rows = answered("dense", DENSE)
    judged = {key: replace(row, scores={**(row.scores or {}), "judge": 0.25}) for key, row in rows.items()}
    page = summarize(plan("dense"), judged).page()
    assert "| judge |" in page and "| 25.0 |" in page
