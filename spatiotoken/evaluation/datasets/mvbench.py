"""MVBench."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, NamedTuple

from spatiotoken.evaluation.annotations import Row, find_video, load_rows
from spatiotoken.evaluation.base import DatasetError, Question
from spatiotoken.evaluation.lettering import texts
from spatiotoken.evaluation.multiple_choice import LETTERS, MultipleChoice, lettered


class _Task(NamedTuple):
    """Where a task's videos are.

    Attributes:
        folder: in the hub's revision ``main``.
        made: in its revision ``video``, where they were cut and converted for evaluation; empty if left as they were.
        cut: whether only a part of each video is asked about.
        fps: of directories of frames.
    """

    folder: str
    made: str = ""
    cut: bool = False
    fps: float | None = None


_STAR = _Task("star/Charades_v1_480", "star/Charades_segment", cut=True)
_CLEVRER = _Task("clevrer/video_validation")
_PERCEPTION = _Task("perception/videos")
_TASKS = {
    "action_sequence": _STAR,
    "moving_count": _CLEVRER,
    "action_prediction": _STAR,
    "episodic_reasoning": _Task("tvqa/frames_fps3_hq", "tvqa/video_fps3_hq_segment", cut=True, fps=3.0),
    "action_antonym": _Task("ssv2_video", "ssv2_video_mp4"),
    "action_count": _PERCEPTION,
    "scene_transition": _Task("scene_qa/video"),
    "object_shuffle": _PERCEPTION,
    "object_existence": _CLEVRER,
    "fine_grained_pose": _Task("nturgbd", "nturgbd_convert"),
    "unexpected_action": _Task("FunQA_test/test"),
    "moving_direction": _CLEVRER,
    "state_change": _PERCEPTION,
    "object_interaction": _STAR,
    "character_order": _PERCEPTION,
    "action_localization": _Task("sta/sta_video", "sta/sta_video_segment", cut=True),
    "counterfactual_inference": _CLEVRER,
    "fine_grained_action": _Task("Moments_in_Time_Raw/videos"),
    "moving_attribute": _CLEVRER,
    "egocentric_navigation": _Task("vlnqa"),
}
_COLUMNS = ("video", "question", "candidates", "answer")


class MVBench(MultipleChoice, dataset="mvbench"):
    """MVBench (arXiv 2311.17005): 4,000 questions about short videos, 200 for each of 20 tasks.

    Hub: ``OpenGVLab/MVBench``, MIT; the videos have licences of their own, see its page. ``annotations`` may be the
    directory ``json/`` with a file for each task. The metric is the mean over the tasks' accuracies. The prompt is that
    of lmms-eval 0.7.2's ``mvbench``; there an empty answer is no answer and leaves the mean, here it is a wrong one.

    Five tasks ask about parts of videos. Their bounds are in the annotations of the hub's revision ``main``, so
    ``video_dir`` is what its ``video/`` unpacks to (``star/``, ``clevrer/``, ...; some are in ``data0613/``), and the
    part is the question's span. lmms-eval uses the revision ``video``, of which the files are those parts. Where
    ``video_dir`` has the folders of that revision, whole files are read, and ``annotations`` must be its ``json/`` too,
    since the files have other names there.
    """

    hub: ClassVar[str | None] = "OpenGVLab/MVBench"
    macro: ClassVar[str | None] = "task"

    def questions(self) -> Iterable[Question]:
        for name, task in _TASKS.items():
            made = self.video_dir is not None and task.made != "" and (self.video_dir / task.made).is_dir()
            source = _Task(task.made) if made else task
            needs = (*_COLUMNS, "start", "end") if source.cut else _COLUMNS
            rows = load_rows(self._file(name), self.hub, config=name, split="train", needs=needs)
            for number, row in enumerate(rows):
                yield self._question(f"{name}-{number}", name, source, row)

    def _file(self, task: str) -> Path | None:
        if self.annotations is None:
            return None
        if not self.annotations.is_dir():
            raise DatasetError(f"annotations must be the directory of the {len(_TASKS)} files, not {self.annotations}")
        return self.annotations / f"{task}.json"

    def _question(self, name: str, task: str, source: _Task, row: Row) -> Question:
        options = tuple(texts(row, "candidates"))
        if row["answer"] not in options:
            raise DatasetError(f"question {name}: its answer {row['answer']!r} is none of {list(options)}")
        return Question(
            id=name,
            video=self._video(source.folder, row["video"]),
            prompt=f"Question:{row['question']}\nOption:\n{lettered(options, '({letter}) {option}')}\n"
            "Only give the best option.\n",
            answer=LETTERS[options.index(row["answer"])],
            options=options,
            groups={"task": task},
            span=(float(row["start"]), float(row["end"])) if source.cut else None,
            fps=source.fps,
        )

    def _video(self, folder: str, name: str) -> Path:
        path = find_video(self.video_dir, f"{folder}/{name}")
        added = find_video(self.video_dir, f"data0613/{folder}/{name}")
        return added if added.exists() and not path.exists() else path
