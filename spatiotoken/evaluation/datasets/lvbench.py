"""LVBench."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from spatiotoken.evaluation.annotations import find_video, load_rows
from spatiotoken.evaluation.base import Question
from spatiotoken.evaluation.lettering import answer_letter, listed_options, texts
from spatiotoken.evaluation.multiple_choice import MultipleChoice, lettered

_COLUMNS = ("uid", "video_path", "type", "question", "answer", "question_type")


class LVBench(MultipleChoice, dataset="lvbench"):
    """LVBench (arXiv 2406.08035): 1,549 questions about 103 videos of more than an hour on average.

    Hub: ``lmms-eval/LVBench``; CC-BY-NC-SA 4.0. The paths in its table are relative to ``video_dir``. The metric
    is the mean over questions. A question may ask for several abilities, so each of the six is a kind of group of its
    own.

    The prompt is that of lmms-eval 0.7.2's ``lvbench``, the same for all models: the question with the options that its
    text lists, or that the column ``options`` holds where the table has it.
    """

    hub: ClassVar[str | None] = "lmms-eval/LVBench"

    def questions(self) -> Iterable[Question]:
        for row in load_rows(self.annotations, self.hub, split="train", needs=_COLUMNS):
            name, asked = str(row["uid"]), row["question"]
            if row.get("options"):
                options = tuple(texts(row, "options"))
                asked = f"{asked}\n{lettered(options, '({letter}) {option}')}"
            else:
                options = listed_options(asked)
            yield Question(
                id=name,
                video=find_video(self.video_dir, row["video_path"]),
                prompt=f"{asked}\nAnswer the question with the option letter",
                answer=answer_letter(row["answer"], options, name),
                options=options,
                groups={"video type": row["type"], **{ability: "yes" for ability in texts(row, "question_type")}},
            )
