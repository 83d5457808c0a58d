"""EgoSchema, the whole set and the subset with public answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from spatiotoken.evaluation.annotations import Row, find_video, load_rows
from spatiotoken.evaluation.base import Json, Question
from spatiotoken.evaluation.lettering import answer_letter, texts, unlettered
from spatiotoken.evaluation.multiple_choice import MultipleChoice


class EgoSchema(MultipleChoice, dataset="egoschema"):
    """EgoSchema, all 5,031 questions about three-minute egocentric videos (arXiv 2308.09126); has no public answers.

    Hub: ``lmms-eval/egoschema``, MIT; the videos are Ego4D's, see its page. ``video_dir`` holds ``<video_idx>.mp4``,
    which the archives call ``videos/``. The prompt is that of lmms-eval 0.7.2's ``egoschema`` for all models but
    ``aria``.

    Nothing is scored. What the authors' server takes is a JSON object from each question's id, which is its video's, to
    the index of the option (A is 0, E is 4): in a run's rows ``parsed`` is its letter, null where none was said.
    """

    hub: ClassVar[str | None] = "lmms-eval/egoschema"
    config: ClassVar[str] = "GENERATION"
    needs: ClassVar[tuple[str, ...]] = ("question", "video_idx", "option")

    def questions(self) -> Iterable[Question]:
        for row in load_rows(self.annotations, self.hub, config=self.config, needs=self.needs):
            listed = texts(row, "option")
            options = unlettered(listed)
            yield Question(
                id=row["video_idx"],
                video=find_video(self.video_dir, row["video_idx"]),
                prompt="\n".join([row["question"], *listed])
                + "\nAnswer with the option's letter from the given choices directly.",
                answer=self._answer(row, options),
                options=options,
            )

    def score(self, parsed: Json | None, question: Question) -> dict[str, float]:
        """Empty where the answer is not public."""
        return {} if question.answer is None else super().score(parsed, question)

    def _answer(self, row: Row, options: Sequence[str]) -> str | None:
        return None


class EgoSchemaSubset(EgoSchema, dataset="egoschema_subset"):
    """EgoSchema's 500 questions whose answers are public, about three-minute egocentric videos (arXiv 2308.09126).

    As ``egoschema``. The metric is the mean over questions; lmms-eval's task is ``egoschema_subset``, which takes a
    random option where an answer says none.
    """

    config: ClassVar[str] = "Subset"
    needs: ClassVar[tuple[str, ...]] = (*EgoSchema.needs, "answer")

    def _answer(self, row: Row, options: Sequence[str]) -> str | None:
        return answer_letter(row["answer"], options, row["video_idx"])
