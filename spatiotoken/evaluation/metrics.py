"""Scores of one answer, each from 0 to 1.

Answers in words are compared as words. That is strict, and not what papers report that have a GPT model judge such
answers (ActivityNet-QA, MSVD-QA, MSRVTT-QA). WUPS, the metric of open-ended NExT-QA, is left out: it needs WordNet and
a lemmatizer's data, which NLTK downloads.
"""

from __future__ import annotations

from collections.abc import Sequence

from spatiotoken.evaluation.parsing import normalised


def exact_match(text: str, answers: Sequence[str]) -> float:
    """Whether a text is one of the answers, letter by letter, but for spaces around it.

    Raises:
        ValueError: there are no answers.
    """
    return float(text.strip() in {answer.strip() for answer in _some(answers)})


def normalised_match(text: str, answers: Sequence[str]) -> float:
    """Whether a text is one of the answers once both are ``normalised``: case, articles and punctuation do not matter.

    Raises:
        ValueError: there are no answers.
    """
    return float(normalised(text) in _texts(answers))


def contained_match(text: str, answers: Sequence[str]) -> float:
    """Whether one of the answers is in a text, as whole words, once both are ``normalised``.

    Lenient: it rewards long texts, and "not red", "red or blue" and "there is no car" have ``red`` and ``no`` in them.

    Raises:
        ValueError: there are no answers.
    """
    said = f" {normalised(text)} "
    return float(any(f" {answer} " in said for answer in _texts(answers)))


def interval_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Length of what two intervals ``(start, end)`` share over the length of what they cover; 0 if they share nothing.

    Raises:
        ValueError: one of them ends before its start, or is no pair.
    """
    for interval in (a, b):
        if len(interval) != 2 or not interval[0] <= interval[1]:
            raise ValueError(f"expected a start and an end that is no earlier, got {list(interval)}")
    shared = min(a[1], b[1]) - max(a[0], b[0])
    return shared / (max(a[1], b[1]) - min(a[0], b[0])) if shared > 0 else 0.0


def recall_at(iou: float, threshold: float) -> float:
    """Whether an intersection over union reaches a threshold; the mean over questions is "R@1, IoU=threshold"."""
    return float(iou >= threshold)


def _some(answers: Sequence[str]) -> Sequence[str]:
    if not answers:
        raise ValueError("expected at least one answer to compare with")
    return answers


def _texts(answers: Sequence[str]) -> set[str]:
    # What is nothing but punctuation would be found in any text.
    return {normalised(answer) for answer in _some(answers)} - {""}
