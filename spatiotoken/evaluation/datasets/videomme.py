"""Video-MME, with and without subtitles."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from spatiotoken.evaluation.annotations import find_video, load_rows
from spatiotoken.evaluation.base import Clip, DatasetError, Question
from spatiotoken.evaluation.lettering import answer_letter, texts, unlettered
from spatiotoken.evaluation.multiple_choice import MultipleChoice

_COLUMNS = ("videoID", "duration", "domain", "question_id", "task_type", "question", "options", "answer")
# "and the subtitles" is said even where there are none.
_BEFORE = (
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
_TIMES = re.compile(r"(\d+):(\d+):(\d+),(\d+) --> (\d+):(\d+):(\d+),(\d+).*")
_TAG = re.compile(r"<[^>]*>")

Cue = tuple[float, float, str]
"""Seconds from which, seconds before which, and what is shown."""


class VideoMME(MultipleChoice, dataset="videomme"):
    """Video-MME without subtitles (arXiv 2405.21075): 2,700 questions about 900 short, medium and long videos.

    Hub: ``lmms-eval/Video-MME``; for academic research only, see its page. ``video_dir`` holds ``<videoID>.mp4``, which
    the archives call ``data/``. The metric is the mean over questions. The prompt is the default of lmms-eval 0.7.2's
    ``videomme``, which has others for ``qwen3_vl``, ``llava_vid``, ``gpt4v`` and ``xcomposer2_4khd``.
    """

    hub: ClassVar[str | None] = "lmms-eval/Video-MME"
    after: ClassVar[str] = "\nAnswer with the option's letter from the given choices directly."

    def questions(self) -> Iterable[Question]:
        for row in load_rows(self.annotations, self.hub, needs=_COLUMNS):
            listed = texts(row, "options")
            options = unlettered(listed)
            yield Question(
                id=row["question_id"],
                video=find_video(self.video_dir, row["videoID"]),
                prompt="\n".join([_BEFORE, row["question"], *listed, self.after]),
                answer=answer_letter(row["answer"], options, row["question_id"]),
                options=options,
                groups={"duration": row["duration"], "domain": row["domain"], "task type": row["task_type"]},
                extra={"videoID": row["videoID"]},
            )


class VideoMMESubtitles(VideoMME, dataset="videomme_subtitles"):
    """Video-MME with the subtitles that are shown at the frames' times (arXiv 2405.21075).

    As ``videomme``, and ``subtitles_dir`` holds ``<videoID>.srt``, which the archive calls ``subtitle/``; not every
    video has one. The prompt is the default of lmms-eval 0.7.2's ``videomme_w_subtitle`` (``qwen3_vl`` has another)
    with these differences: it takes the subtitles at 32 times whatever the number of frames, here they are those at
    the frames that the model is given, in order of time; it leaves out text that the published font tag is not around.
    """

    after: ClassVar[str] = "The best answer is:"

    subtitles_dir: Path | None = Field(None, description="directory of the .srt files")

    def questions(self) -> Iterable[Question]:
        if self.subtitles_dir is None or not self.subtitles_dir.is_dir():
            raise DatasetError(f"subtitles_dir must be the directory of the .srt files, not {self.subtitles_dir}")
        yield from super().questions()

    def prompt(self, question: Question, clip: Clip) -> str:
        assert self.subtitles_dir is not None
        path = self.subtitles_dir / f"{question.extra['videoID']}.srt"
        said = "No subtitles available"
        if path.exists():
            said = "\n".join(shown_at(read_cues(path.read_text(encoding="utf-8")), clip.seconds))
        return f"This video's subtitles are listed below: \n{said}\n{question.prompt}"


def read_cues(text: str) -> list[Cue]:
    """What an .srt file says, without markup, the lines of a cue as one; cues that show nothing are left out."""
    cues = []
    for block in re.split(r"\n\s*\n", text):
        times = _TIMES.search(block)
        if times is not None:
            lines = _TAG.sub("", block[times.end() :]).splitlines()
            said = " ".join(line.strip() for line in lines).strip()
            if said:
                cues.append((_seconds(times.groups()[:4]), _seconds(times.groups()[4:]), said))
    return cues


def shown_at(cues: Sequence[Cue], seconds: Sequence[float]) -> list[str]:
    """Texts of the cues that are on screen at one of the times, each once."""
    return [said for start, end, said in cues if any(start <= second < end for second in seconds)]


def _seconds(parts: Sequence[str]) -> float:
    hours, minutes, seconds, thousandths = map(int, parts)
    return 3600 * hours + 60 * minutes + seconds + thousandths / 1000
