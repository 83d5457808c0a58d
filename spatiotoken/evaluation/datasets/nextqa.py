"""NExT-QA: why and how things happen in everyday videos, and in which order; multiple choice and open-ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from spatiotoken.evaluation.annotations import Row, find_video, load_rows
from spatiotoken.evaluation.base import DatasetError, Question
from spatiotoken.evaluation.datasets.open_ended import OpenEnded
from spatiotoken.evaluation.lettering import answer_letter
from spatiotoken.evaluation.multiple_choice import MultipleChoice, lettered

_OPTIONS = tuple(f"a{number}" for number in range(5))
_KINDS = {"C": "causal", "T": "temporal", "D": "descriptive"}


def question_groups(kind: str) -> dict[str, str]:
    """``type`` and, coarser, ``kind`` of a question.

    What comes before (``TP``) counts as what comes next (``TN``), as in the authors' evaluation.

    Raises:
        DatasetError: no type of NExT-QA's.
    """
    if kind[:1] not in _KINDS:
        raise DatasetError(f"unknown NExT-QA question type {kind!r}; types begin with {', '.join(_KINDS)}")
    return {"type": "TN" if kind == "TP" else kind, "kind": _KINDS[kind[0]]}


def _question_id(row: Row) -> str:
    return f"{row['video']}_{row['qid']}"


class NextQA(MultipleChoice, dataset="nextqa"):
    """NExT-QA, multiple choice of five (arXiv 2105.08276): 8,564 test or 4,996 validation questions.

    From the hub the test split (``MC``); ``annotations`` may be the authors' ``val.csv`` or ``test.csv`` (repository
    ``doc-doc/NExT-QA``, MIT licence). Videos are ``<video>.mp4``. Accuracy is the mean over questions; groups: ``type``
    (CW why, CH how, TN before and after, TC at the same time, DC count, DL place, DO other) and ``kind`` (causal,
    temporal, descriptive).

    The prompt is that of lmms-eval 0.7.2's ``nextqa_mc_test``, which does not say how to answer. Where no letter can be
    read, lmms-eval takes a random one; here that is a wrong answer. Its task limits no answer's length; 128 tokens are
    what its wrapper of Qwen2.5-VL takes then.
    """

    hub: ClassVar[str | None] = "lmms-eval/NExTQA"
    max_new_tokens: ClassVar[int] = 128

    def questions(self) -> Iterator[Question]:
        needs = ("video", "question", "answer", "qid", "type", *_OPTIONS)
        for row in load_rows(self.annotations, self.hub, config="MC", needs=needs):
            options = tuple(str(row[name]).strip() for name in _OPTIONS)
            yield Question(
                id=_question_id(row),
                video=find_video(self.video_dir, str(row["video"])),
                prompt=f"{row['question'].strip()}\n{lettered(options)}",
                answer=answer_letter(row["answer"], options, _question_id(row)),
                options=options,
                groups=question_groups(row["type"]),
            )


class NextQAOpenEnded(OpenEnded, dataset="nextqa_oe"):
    """NExT-QA, open-ended (arXiv 2105.08276): 9,178 test questions.

    From the hub the test split (``OE``), many of whose questions have a second reference answer; ``annotations`` may be
    the authors' ``test.csv`` or ``val.csv`` (repository ``doc-doc/NExT-OE``), which have one. Videos and groups as for
    ``nextqa``; there are questions for a yes or no too (DB).

    The prompt is that of lmms-eval 0.7.2's ``nextqa_oe_test``. Its metric, WUPS, needs WordNet and a lemmatizer that
    are downloaded, so it is not computed: the metrics here are not to be compared with published WUPS.
    """

    hub: ClassVar[str | None] = "lmms-eval/NExTQA"
    max_new_tokens: ClassVar[int] = 128

    def questions(self) -> Iterator[Question]:
        needs = ("video", "question", "answer", "qid", "type")
        for row in load_rows(self.annotations, self.hub, config="OE", needs=needs):
            asked, also = row["question"].strip(), row.get("additional_ref_answer")
            yield Question(
                id=_question_id(row),
                video=find_video(self.video_dir, str(row["video"])),
                prompt=f"{asked}\nAnswer a question using a short phrase or sentence.",
                answer=[str(row["answer"]), *([str(also)] if also else [])],
                groups=question_groups(row["type"]),
                extra={"question": asked},
            )
