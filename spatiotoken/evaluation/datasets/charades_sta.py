"""Charades-STA: when in a video something happens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from spatiotoken.evaluation.annotations import Row, find_video, load_rows
from spatiotoken.evaluation.base import DatasetError, Json, Question, VideoQA
from spatiotoken.evaluation.metrics import interval_iou, recall_at
from spatiotoken.evaluation.parsing import parse_span

THRESHOLDS = (0.3, 0.5, 0.7)
_BEFORE = (
    "Please find the visual event described by a sentence in the video, determining its starting and ending times. "
    "The format should be: 'The event happens in the start time - end time'. For example, The event 'person turn a "
    "light on' happens in the 24.3 - 30.4 seonds. Now I will give you the textual sentence: "
)
_AFTER = "Please return its start time and end time."
_LINE = re.compile(r"(\S+) (\d+(?:\.\d+)?) (\d+(?:\.\d+)?)##(.+)")


def read_lines(path: Path) -> list[Row]:
    """Rows of the authors' text file, whose lines are ``VIDEO start end##sentence.``, like those of the hub's table.

    Raises:
        DatasetError: there is no such file, or a line is none of these.
    """
    if not path.is_file():
        raise DatasetError(f"no file of annotations at {path}")
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None:
            raise DatasetError(f"{path}, line {number}: expected 'VIDEO start end##sentence.', got {line!r}")
        video, start, end, sentence = found.groups()
        rows.append({"video": video, "caption": sentence.rstrip(". "), "timestamp": [float(start), float(end)]})
    if not rows:
        raise DatasetError(f"{path} has no rows")
    return rows


class CharadesSTA(VideoQA, dataset="charades_sta"):
    """Charades-STA, temporal grounding (arXiv 1705.02101): 3,720 test sentences, for each the seconds it is true of.

    From the hub (where the seconds are rounded to 16-bit floats), or ``annotations`` is the authors'
    ``charades_sta_test.txt``. Licence: MIT on the hub; of the videos see the Charades page. Videos are ``<video>.mp4``,
    as in ``Charades_v1_480``. Metrics: mean intersection over union of the seconds, and the share of answers that
    reach 0.3, 0.5 and 0.7; an answer without two times has 0.

    The prompt, with its misspelling, is that of lmms-eval 0.7.2's ``temporal_grounding_charades``. As there, the times
    of an answer whose end is before its start are swapped.
    """

    hub: ClassVar[str | None] = "lmms-eval/charades_sta"
    metrics: ClassVar[tuple[str, ...]] = ("mIoU", *(f"R@1 IoU {threshold}" for threshold in THRESHOLDS))
    max_new_tokens: ClassVar[int] = 50

    def questions(self) -> Iterator[Question]:
        asked: Counter[str] = Counter()
        for row in self._rows():
            video = str(row["video"]).removesuffix(".mp4")
            yield Question(
                id=f"{video}_{asked[video]}",
                video=find_video(self.video_dir, video),
                prompt=f"{_BEFORE}{row['caption']}. {_AFTER}",
                answer=sorted(map(float, row["timestamp"])),
            )
            asked[video] += 1

    def _rows(self) -> list[Row]:
        if self.annotations is not None and self.annotations.suffix == ".txt":
            return read_lines(self.annotations)
        return load_rows(self.annotations, self.hub, needs=("video", "caption", "timestamp"))

    def parse(self, text: str, question: Question) -> Json | None:
        span = parse_span(text)
        return None if span is None else list(span)

    def score(self, parsed: Json | None, question: Question) -> dict[str, float]:
        iou = 0.0 if parsed is None else interval_iou(parsed, question.answer)
        return {"mIoU": iou} | {f"R@1 IoU {threshold}": float(recall_at(iou, threshold)) for threshold in THRESHOLDS}
