"""MLVU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from spatiotoken.evaluation.annotations import find_video, load_rows
from spatiotoken.evaluation.base import Question
from spatiotoken.evaluation.lettering import answer_letter, listed_options
from spatiotoken.evaluation.multiple_choice import MultipleChoice

_COLUMNS = ("video_name", "question", "answer", "task_type")


class MLVU(MultipleChoice, dataset="mlvu"):
    """MLVU, multiple choice of the dev set (arXiv 2406.04264): seven tasks about videos of minutes to hours.

    Hub: ``sy1998/MLVU_dev``, the authors' table for lmms-eval; CC-BY-NC-SA 4.0. A question's text lists its options.
    ``video_dir`` holds all videos in one directory, as the archives unpack. The metric is the mean over the tasks'
    accuracies, the benchmark's M-Avg. The prompt is that of lmms-eval 0.7.2's ``mlvu_dev`` for all models but ``plm``.
    """

    hub: ClassVar[str | None] = "sy1998/MLVU_dev"
    macro: ClassVar[str | None] = "task type"

    def questions(self) -> Iterable[Question]:
        for number, row in enumerate(load_rows(self.annotations, self.hub, needs=_COLUMNS)):
            name = f"{row['task_type']}-{number}"
            options = listed_options(row["question"])
            yield Question(
                id=name,
                video=find_video(self.video_dir, row["video_name"]),
                prompt=f"{row['question']}\nOnly give the best option.\nBest option: (",
                answer=answer_letter(row["answer"], options, name),
                options=options,
                groups={"task type": row["task_type"]},
            )
