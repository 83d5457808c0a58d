"""LongVideoBench."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from spatiotoken.evaluation.annotations import find_video, load_rows
from spatiotoken.evaluation.base import Question
from spatiotoken.evaluation.lettering import answer_letter
from spatiotoken.evaluation.multiple_choice import MultipleChoice, lettered

_OPTIONS = ("option0", "option1", "option2", "option3", "option4")
_COLUMNS = ("id", "video_path", "question", *_OPTIONS, "correct_choice", "duration_group", "question_category")
_ABSENT = ("N/A", None)
"""Fifth options of questions with four; readers of csv files take the words for a missing value."""


class LongVideoBench(MultipleChoice, dataset="longvideobench"):
    """LongVideoBench, validation split, without subtitles (arXiv 2407.15754): 1,337 questions on videos up to an hour.

    Hub: ``longvideobench/LongVideoBench``, CC-BY-NC-SA 4.0, behind a form; of its files, ``annotations`` may be
    ``validation-00000-of-00001.parquet``. ``video_dir`` is what the archives call ``videos/``. The metric is the mean
    over questions. The prompt is that of lmms-eval 0.7.2's ``longvideobench_val_v``, the same for all models; there an
    answer that says nothing counts as a random option, here it is a wrong one.
    """

    hub: ClassVar[str | None] = "longvideobench/LongVideoBench"
    max_new_tokens: ClassVar[int] = 32

    def questions(self) -> Iterable[Question]:
        for row in load_rows(self.annotations, self.hub, split="validation", needs=_COLUMNS):
            options = tuple(row[name] for name in _OPTIONS if row[name] not in _ABSENT)
            yield Question(
                id=row["id"],
                video=find_video(self.video_dir, row["video_path"]),
                prompt=f"{row['question']}\n{lettered(options)}\n"
                "Answer with the option's letter from the given choices directly.\n",
                answer=answer_letter(row["correct_choice"], options, row["id"]),
                options=options,
                groups={"duration": str(row["duration_group"]), "question category": row["question_category"]},
            )
