"""Scores of one answer."""

from __future__ import annotations

import pytest

from spatiotoken.evaluation.metrics import contained_match, exact_match, interval_iou, normalised_match, recall_at


@pytest.mark.parametrize(
    ("text", "answers", "exact", "normalised", "contained"),
    [
        ("red", ["red"], 1, 1, 1),
        (" red\n", ["red"], 1, 1, 1),
        ("Red.", ["red"], 0, 1, 1),
        ("a red car", ["the red car"], 0, 1, 1),
        ("It is a red car", ["red car"], 0, 0, 1),
        ("a red and blue car", ["red car"], 0, 0, 0),
        ("blue", ["red", "blue"], 1, 1, 1),
        ("redder", ["red"], 0, 0, 0),
        ("two", ["2"], 0, 0, 0),
        ("", ["red"], 0, 0, 0),
        ("not red", ["red"], 0, 0, 1),
        ("", ["?"], 0, 0, 0),
        ("anything", ["?"], 0, 0, 0),
        ("?", ["?"], 1, 0, 0),
    ],
)
def test_matches(text: str, answers: list[str], exact: float, normalised: float, contained: float) -> None:
    assert exact_match(text, answers) == exact
    assert normalised_match(text, answers) == normalised
    assert contained_match(text, answers) == contained


@pytest.mark.parametrize("metric", [exact_match, normalised_match, contained_match])
def test_there_must_be_answers(metric: object) -> None:
    assert callable(metric)
    with pytest.raises(ValueError, match="at least one answer"):
        metric("red", [])


@pytest.mark.parametrize(
    ("a", "b", "iou"),
    [
        ((0, 10), (0, 10), 1),
        ((0, 10), (5, 15), 1 / 3),
        ((0, 10), (2, 4), 0.2),
        ((24.3, 30.4), (24.3, 27.35), 0.5),
        ((0, 1), (1, 2), 0),
        ((0, 1), (2, 3), 0),
        ((1, 1), (0, 2), 0),
        ((1, 1), (1, 1), 0),
    ],
)
def test_interval_iou(a: tuple[float, float], b: tuple[float, float], iou: float) -> None:
    assert interval_iou(a, b) == interval_iou(b, a) == pytest.approx(iou)


@pytest.mark.parametrize("wrong", [(2, 1), (1,), (1, 2, 3), (float("nan"), 1)])
def test_no_interval(wrong: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="a start and an end"):
        interval_iou((0, 1), wrong)
    with pytest.raises(ValueError, match="a start and an end"):
        interval_iou(wrong, (0, 1))


def test_recall() -> None:
    assert [recall_at(0.5, threshold) for threshold in (0.3, 0.5, 0.7)] == [1, 1, 0]
    assert recall_at(0.0, 0.3) == 0
