"""Multiple-choice datasets: tables as published become the questions, prompts and answers that lmms-eval has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from spatiotoken.evaluation.base import DATASETS, Clip, DatasetError, Question, VideoQA
from spatiotoken.evaluation.datasets.egoschema import EgoSchema, EgoSchemaSubset
from spatiotoken.evaluation.datasets.longvideobench import LongVideoBench
from spatiotoken.evaluation.datasets.lvbench import LVBench
from spatiotoken.evaluation.datasets.mlvu import MLVU
from spatiotoken.evaluation.datasets.mvbench import MVBench
from spatiotoken.evaluation.datasets.videomme import VideoMME, VideoMMESubtitles, read_cues, shown_at
from spatiotoken.evaluation.lettering import answer_letter, listed_options, unlettered

VIDEOMME = [
    {
        "video_id": "001",
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Humanity & History",
        "url": "https://www.youtube.com/watch?v=aaaaaaaaaaa",
        "videoID": "aaaaaaaaaaa",
        "question_id": "001-1",
        "task_type": "Counting Problem",
        "question": "How many candles are there?",
        "options": ["A. Two.", "B. Three.", "C. Five.", "D. Nine."],
        "answer": "C",
    },
    {
        "video_id": "601",
        "duration": "long",
        "domain": "Sports Competition",
        "sub_category": "Football",
        "url": "https://www.youtube.com/watch?v=bbb-bb.bbbb",
        "videoID": "bbb-bb.bbbb",
        "question_id": "601-2",
        "task_type": "OCR Problems",
        "question": "Which name is on the shirt?",
        "options": ["A. Smith.", "B. Jones.", "C. Brown.", "D. None of the above."],
        "answer": "A",
    },
]
SRT = """1
00:00:01,000 --> 00:00:03,500
<font color="white" size=".72c">first words</font>

2
00:00:03,000 --> 00:00:06,250 align:start
<font color="white" size=".72c">second words</font>
and a further line

3
00:00:06,250 --> 00:00:07,000
<font color="white" size=".72c"></font>

4
01:02:03,004 --> 01:02:04,000
<font color="white" size=".72c">last words</font>
"""
LONGVIDEOBENCH = [
    {
        "video_id": "86CxyhFV9MI",
        "question": "At the lake, what is the man holding?",
        "option0": "A rod",
        "option1": "A net",
        "option2": "A cup",
        "option3": "A dog",
        "option4": "N/A",
        "correct_choice": 1,
        "id": "86CxyhFV9MI_0",
        "video_path": "86CxyhFV9MI.mp4",
        "subtitle_path": "86CxyhFV9MI_en.json",
        "duration": 190.1,
        "duration_group": 600,
        "question_category": "S2A",
        "topic_category": "NP-News-Programs",
        "starting_timestamp_for_subtitles": 0.0,
    },
    {
        "video_id": "@someone-7000000000000000000",
        "question": "What comes next?",
        "option0": "Rain",
        "option1": "Snow",
        "option2": "Fog",
        "option3": "Hail",
        "option4": "Sun",
        "correct_choice": 4,
        "id": "@someone-7000000000000000000_1",
        "video_path": "@someone-7000000000000000000.mp4",
        "subtitle_path": "@someone-7000000000000000000.json",
        "duration": 12.5,
        "duration_group": 15,
        "question_category": "E3E",
        "topic_category": "LT-Lifestyle",
        "starting_timestamp_for_subtitles": 0.0,
    },
]
MLVU_ROWS = [
    {
        "video_name": "movie101_66.mp4",
        "duration": 246.0,
        "question": "What color is the coat?\n(A) Yellow\n(B) Red\n(C) Blue\n(D) Green",
        "candidates": ["Yellow", "Red", "Blue", "Green"],
        "answer": "D",
        "task_type": "plotQA",
    },
    {
        "video_name": "ego_2",
        "duration": 480.0,
        "question": "Where is the key?\n(A) Drawer\n(B) Table\n(C) Bag\n(D) Door",
        "candidates": ["Drawer", "Table", "Bag", "Door"],
        "answer": "B",
        "task_type": "ego",
    },
]
EGOSCHEMA = [
    {
        "question_idx": "1ZdZ8aUcBNzndj135bqFrxb9L816EMGp1",
        "question": "What is c doing?",
        "video_idx": "0074f737-11cb-497d-8d07-77c3a8127391",
        "option": ["A. C cooks.", "B. C washes.", "C. C paints.", "D. C cleans dishes.", "E. C sleeps."],
        "answer": "3",
    },
    {
        "question_idx": "1bVNvPX6BNPIqcqMk-ZJr6WLsXNQybg64",
        "question": "Why is there a cup of water?",
        "video_idx": "00b9a0de-c59e-49cb-a127-6081e2fb8c8e",
        "option": ["A. To drink.", "B. To store.", "C. To pour.", "D. To rest.", "E. To clean the brush."],
        "answer": "4",
    },
]
LVBENCH = [
    {
        "key": "Cm73ma6Ibcs",
        "type": "cartoon",
        "video_path": "Cm73ma6Ibcs.mp4",
        "uid": "14",
        "question": "What year is shown?\n(A) 1636\n(B) 1366\n(C) 1363\n(D) 1633",
        "answer": "D",
        "question_type": ["key information retrieval"],
        "time_reference": "00:15-00:19",
    },
    {
        "key": "Cm73ma6Ibcs",
        "type": "cartoon",
        "video_path": "Cm73ma6Ibcs.mp4",
        "uid": "15",
        "question": "Who opens the door?\n(A) The cook\n(B) The guest\n(C) The dog\n(D) Nobody",
        "answer": "A",
        "question_type": ["entity recognition", "event understanding"],
        "time_reference": "01:00-01:10",
    },
]
MVBENCH_TASKS = (
    "action_sequence",
    "moving_count",
    "action_prediction",
    "episodic_reasoning",
    "action_antonym",
    "action_count",
    "scene_transition",
    "object_shuffle",
    "object_existence",
    "fine_grained_pose",
    "unexpected_action",
    "moving_direction",
    "state_change",
    "object_interaction",
    "character_order",
    "action_localization",
    "counterfactual_inference",
    "fine_grained_action",
    "moving_attribute",
    "egocentric_navigation",
)
MVBENCH_CUT = (
    "action_sequence",
    "action_prediction",
    "object_interaction",
    "action_localization",
    "episodic_reasoning",
)

TABLES = [
    (VideoMME, VIDEOMME),
    (LongVideoBench, LONGVIDEOBENCH),
    (MLVU, MLVU_ROWS),
    (EgoSchema, EGOSCHEMA),
    (EgoSchemaSubset, EGOSCHEMA),
    (LVBench, LVBENCH),
]
NAMES = [kind.name for kind, _ in TABLES]
NEEDED = {
    "videomme": ("videoID", "duration", "domain", "question_id", "task_type", "question", "options", "answer"),
    "longvideobench": ("id", "video_path", "option0", "option4", "correct_choice", "duration_group"),
    "mlvu": ("video_name", "question", "answer", "task_type"),
    "egoschema": ("question", "video_idx", "option"),
    "egoschema_subset": ("question", "video_idx", "option", "answer"),
    "lvbench": ("uid", "video_path", "type", "question", "answer", "question_type"),
}


def save(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        Dataset.from_list(list(rows)).to_parquet(path)
    elif path.suffix == ".csv":
        Dataset.from_list(list(rows)).to_csv(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def asked(kind: type[VideoQA], path: Path, rows: Sequence[dict[str, Any]], **options: Any) -> list[Question]:
    return list(kind(annotations=save(path, rows), video_dir=path.parent, **options).questions())


def clip(*seconds: float) -> Clip:
    frames = torch.zeros(len(seconds), 3, 2, 2, dtype=torch.uint8)
    return Clip(frames, seconds, tuple(range(len(seconds))), 4000.0)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize(("kind", "rows"), TABLES, ids=NAMES)
def test_every_form_of_a_table_gives_the_same_questions(
    kind: type[VideoQA], rows: list[dict[str, Any]], suffix: str, tmp_path: Path
) -> None:
    questions = asked(kind, tmp_path / f"rows{suffix}", rows)
    assert questions == asked(kind, tmp_path / "again.json", rows)
    assert len({question.id for question in questions}) == len(rows) == 2


@pytest.mark.parametrize(("kind", "rows"), TABLES, ids=NAMES)
def test_a_missing_column_is_named(kind: type[VideoQA], rows: list[dict[str, Any]], tmp_path: Path) -> None:
    for column in NEEDED[kind.name]:
        less = [{name: value for name, value in row.items() if name != column} for row in rows]
        with pytest.raises(DatasetError, match=f"has no column {column};"):
            asked(kind, tmp_path / "rows.json", less)


@pytest.mark.parametrize(("kind", "rows"), TABLES, ids=NAMES)
def test_videos_must_be_somewhere(kind: type[VideoQA], rows: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="--video-dir"):
        list(kind(annotations=save(tmp_path / "rows.json", rows)).questions())


@pytest.mark.parametrize(("kind", "rows"), TABLES, ids=NAMES)
def test_what_is_said_is_parsed_and_scored(kind: type[VideoQA], rows: list[dict[str, Any]], tmp_path: Path) -> None:
    dataset = kind(annotations=save(tmp_path / "rows.json", rows), video_dir=tmp_path)
    for question in dataset.questions():
        right = question.answer or "B"
        wrong = "A" if right != "A" else "B"
        text = question.options["ABCDE".index(right)]
        said = {right: right, f"{right}. {text}": right, f"{right}) {text}": right, f"({wrong})": wrong}
        said |= {"": None, "I cannot see that.": None}
        for words, letter in said.items():
            parsed = dataset.parse(words, question)
            assert parsed == letter, words
            scores = {} if question.answer is None else {"accuracy": float(letter == right)}
            assert dataset.score(parsed, question) == scores


@pytest.mark.parametrize("name", ["videomme", "egoschema_subset"])
def test_lists_do_not_survive_csv_files(name: str, tmp_path: Path) -> None:
    kind, rows = TABLES[NAMES.index(name)]
    flat = [{column: str(value) for column, value in row.items()} for row in rows]
    with pytest.raises(DatasetError, match=r"options? must hold lists"):
        asked(kind, tmp_path / "rows.csv", flat)


def test_the_datasets_are_found_by_name_and_answer_shortly() -> None:
    found = DATASETS.items()
    kinds = [*(kind for kind, _ in TABLES), MVBench, VideoMMESubtitles]
    assert {kind.name: found[kind.name] for kind in kinds} == {kind.name: kind for kind in kinds}
    lengths = {kind.name: kind.max_new_tokens for kind in kinds}
    assert lengths == dict.fromkeys(lengths, 16) | {"longvideobench": 32}
    macros = {kind.name: kind.macro for kind in kinds if kind.macro}
    assert macros == {"mlvu": "task type", "mvbench": "task"}
    assert all(kind.metrics == ("accuracy",) and kind.hub for kind in kinds)


def test_videomme(tmp_path: Path) -> None:
    (tmp_path / "bbb-bb.bbbb.mkv").touch()
    short, long = asked(VideoMME, tmp_path / "rows.parquet", VIDEOMME)
    assert short == Question(
        id="001-1",
        video=tmp_path / "aaaaaaaaaaa.mp4",
        prompt=(
            "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
            "Respond with only the letter (A, B, C, or D) of the correct option.\n"
            "How many candles are there?\n"
            "A. Two.\nB. Three.\nC. Five.\nD. Nine.\n"
            "\n"
            "Answer with the option's letter from the given choices directly."
        ),
        answer="C",
        options=("Two.", "Three.", "Five.", "Nine."),
        groups={"duration": "short", "domain": "Knowledge", "task type": "Counting Problem"},
        extra={"videoID": "aaaaaaaaaaa"},
    )
    assert (long.id, long.video, long.answer) == ("601-2", tmp_path / "bbb-bb.bbbb.mkv", "A")
    assert long.groups == {"duration": "long", "domain": "Sports Competition", "task type": "OCR Problems"}


def test_videomme_with_the_subtitles_at_the_frames(tmp_path: Path) -> None:
    (tmp_path / "subtitle").mkdir()
    (tmp_path / "subtitle" / "aaaaaaaaaaa.srt").write_text(SRT, encoding="utf-8")
    dataset = VideoMMESubtitles(
        annotations=save(tmp_path / "rows.jsonl", VIDEOMME), video_dir=tmp_path, subtitles_dir=tmp_path / "subtitle"
    )
    short, long = dataset.questions()
    asks = (
        "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
        "Respond with only the letter (A, B, C, or D) of the correct option.\n"
    )
    first = f"{asks}How many candles are there?\nA. Two.\nB. Three.\nC. Five.\nD. Nine.\nThe best answer is:"
    second = f"{asks}Which name is on the shirt?\nA. Smith.\nB. Jones.\nC. Brown.\nD. None of the above.\n"
    shown = "This video's subtitles are listed below: \n"
    assert dataset.prompt(short, clip(0.5, 3.2, 3.3)) == (
        f"{shown}first words\nsecond words and a further line\n{first}"
    )
    assert dataset.prompt(short, clip(0.0, 8.0)) == f"{shown}\n{first}"
    assert dataset.prompt(long, clip(1.0)) == f"{shown}No subtitles available\n{second}The best answer is:"
    assert (short.id, short.answer, short.groups["duration"]) == ("001-1", "C", "short")


@pytest.mark.parametrize("directory", [None, "nowhere"])
def test_subtitles_must_be_somewhere(directory: str | None, tmp_path: Path) -> None:
    where = directory and tmp_path / directory
    with pytest.raises(DatasetError, match="subtitles_dir must be the directory"):
        asked(VideoMMESubtitles, tmp_path / "rows.json", VIDEOMME, subtitles_dir=where)


def test_subtitles_are_read_with_their_times() -> None:
    cues = read_cues(SRT)
    assert cues == [
        (1.0, 3.5, "first words"),
        (3.0, 6.25, "second words and a further line"),
        (3723.004, 3724.0, "last words"),
    ]
    assert read_cues(SRT.replace("\n", "\r\n")) == cues
    assert read_cues("") == []


def test_subtitles_are_shown_from_their_start_until_before_their_end() -> None:
    cues = [(1.0, 2.0, "one"), (2.0, 3.0, "two"), (2.5, 4.0, "three")]
    assert shown_at(cues, [1.0]) == ["one"]
    assert shown_at(cues, [2.0]) == ["two"]
    assert shown_at(cues, [3.9, 2.6, 1.5]) == ["one", "two", "three"]
    assert shown_at(cues, [0.9, 4.0]) == []


def test_longvideobench(tmp_path: Path) -> None:
    four, five = asked(LongVideoBench, tmp_path / "rows.parquet", LONGVIDEOBENCH)
    assert four == Question(
        id="86CxyhFV9MI_0",
        video=tmp_path / "86CxyhFV9MI.mp4",
        prompt=(
            "At the lake, what is the man holding?\n"
            "A. A rod\nB. A net\nC. A cup\nD. A dog\n"
            "Answer with the option's letter from the given choices directly.\n"
        ),
        answer="B",
        options=("A rod", "A net", "A cup", "A dog"),
        groups={"duration": "600", "question category": "S2A"},
    )
    assert five.options == ("Rain", "Snow", "Fog", "Hail", "Sun")
    assert "\nD. Hail\nE. Sun\nAnswer" in five.prompt
    assert five.answer == "E"
    assert five.video == tmp_path / "@someone-7000000000000000000.mp4"
    assert asked(LongVideoBench, tmp_path / "rows.csv", LONGVIDEOBENCH) == [four, five]


def test_longvideobench_without_public_answers(tmp_path: Path) -> None:
    hidden = [row | {"correct_choice": -1} for row in LONGVIDEOBENCH]
    with pytest.raises(DatasetError, match=r"question 86CxyhFV9MI_0: its answer is -1, but it has 4 options"):
        asked(LongVideoBench, tmp_path / "rows.json", hidden)


def test_mlvu(tmp_path: Path) -> None:
    (tmp_path / "ego_2.mp4").touch()
    plot, ego = asked(MLVU, tmp_path / "rows.parquet", MLVU_ROWS)
    assert plot == Question(
        id="plotQA-0",
        video=tmp_path / "movie101_66.mp4",
        prompt=(
            "What color is the coat?\n(A) Yellow\n(B) Red\n(C) Blue\n(D) Green\n"
            "Only give the best option.\n"
            "Best option: ("
        ),
        answer="D",
        options=("Yellow", "Red", "Blue", "Green"),
        groups={"task type": "plotQA"},
    )
    assert (ego.id, ego.video, ego.answer) == ("ego-1", tmp_path / "ego_2.mp4", "B")
    assert asked(MLVU, tmp_path / "rows.csv", MLVU_ROWS) == [plot, ego]


def test_mlvu_questions_without_options(tmp_path: Path) -> None:
    rows = [MLVU_ROWS[0] | {"question": "What color is the coat?"}]
    with pytest.raises(DatasetError, match=r"plotQA-0: its answer is 'D', but it has 0 options"):
        asked(MLVU, tmp_path / "rows.json", rows)


def test_egoschema_subset(tmp_path: Path) -> None:
    first, second = asked(EgoSchemaSubset, tmp_path / "rows.parquet", EGOSCHEMA)
    assert first == Question(
        id="0074f737-11cb-497d-8d07-77c3a8127391",
        video=tmp_path / "0074f737-11cb-497d-8d07-77c3a8127391.mp4",
        prompt=(
            "What is c doing?\n"
            "A. C cooks.\nB. C washes.\nC. C paints.\nD. C cleans dishes.\nE. C sleeps.\n"
            "Answer with the option's letter from the given choices directly."
        ),
        answer="D",
        options=("C cooks.", "C washes.", "C paints.", "C cleans dishes.", "C sleeps."),
    )
    assert second.answer == "E"


def test_the_whole_of_egoschema_asks_the_same_and_scores_nothing(tmp_path: Path) -> None:
    hidden = [row | {"answer": None} for row in EGOSCHEMA]
    dataset = EgoSchema(annotations=save(tmp_path / "rows.parquet", hidden), video_dir=tmp_path)
    questions = list(dataset.questions())
    subset = asked(EgoSchemaSubset, tmp_path / "subset.json", EGOSCHEMA)
    assert [(one.id, one.prompt, one.options) for one in questions] == [
        (one.id, one.prompt, one.options) for one in subset
    ]
    assert [question.answer for question in questions] == [None, None]
    # Whoever wears the camera is called C, also in options.
    assert [dataset.parse(words, questions[0]) for words in ("B", "C", "C. C paints.")] == ["B", "C", "C"]
    assert dataset.score("B", questions[0]) == dataset.score(None, questions[0]) == {}
    with pytest.raises(DatasetError, match="its answer is None, but it has 5 options"):
        asked(EgoSchemaSubset, tmp_path / "hidden.json", hidden)


def test_lvbench(tmp_path: Path) -> None:
    year, door = asked(LVBench, tmp_path / "rows.parquet", LVBENCH)
    assert year == Question(
        id="14",
        video=tmp_path / "Cm73ma6Ibcs.mp4",
        prompt=(
            "What year is shown?\n(A) 1636\n(B) 1366\n(C) 1363\n(D) 1633\nAnswer the question with the option letter"
        ),
        answer="D",
        options=("1636", "1366", "1363", "1633"),
        groups={"video type": "cartoon", "key information retrieval": "yes"},
    )
    assert door.groups == {"video type": "cartoon", "entity recognition": "yes", "event understanding": "yes"}


def test_lvbench_with_options_in_a_column(tmp_path: Path) -> None:
    stem, *_ = LVBENCH[0]["question"].split("\n")
    apart = LVBENCH[0] | {"question": stem, "options": ["1636", "1366", "1363", "1633"]}
    assert asked(LVBench, tmp_path / "apart.json", [apart]) == asked(LVBench, tmp_path / "rows.json", LVBENCH)[:1]


def mvbench_row(task: str, number: int = 0) -> dict[str, Any]:
    row = {
        "video": f"{task}_{number}.mp4",
        "question": "What happened after the person took the food?",
        "candidates": ["Ate the medicine.", "Put down the cup.", "Took the box."],
        "answer": "Put down the cup.",
    }
    if task in MVBENCH_CUT:
        row |= {"start": 16.1, "end": 27, "accurate_start": None, "accurate_end": None}
    if task == "episodic_reasoning":
        row |= {"video": f"castle_s03e09_seg02_clip_0{number}", "fps": 3}
    return row


def mvbench_files(directory: Path, *, leave_out: str = "") -> Path:
    directory.mkdir()
    for task in MVBENCH_TASKS:
        if task != leave_out:
            save(directory / f"{task}.json", [mvbench_row(task, number) for number in range(2)])
    return directory


def test_mvbench(tmp_path: Path) -> None:
    frames = tmp_path / "tvqa" / "frames_fps3_hq" / "castle_s03e09_seg02_clip_00"
    frames.mkdir(parents=True)
    questions = list(MVBench(annotations=mvbench_files(tmp_path / "json"), video_dir=tmp_path).questions())
    assert [question.id for question in questions] == [f"{task}-{n}" for task in MVBENCH_TASKS for n in range(2)]
    first = {question.groups["task"]: question for question in questions[::2]}
    assert first["action_sequence"] == Question(
        id="action_sequence-0",
        video=tmp_path / "star/Charades_v1_480/action_sequence_0.mp4",
        prompt=(
            "Question:What happened after the person took the food?\n"
            "Option:\n"
            "(A) Ate the medicine.\n(B) Put down the cup.\n(C) Took the box.\n"
            "Only give the best option.\n"
        ),
        answer="B",
        options=("Ate the medicine.", "Put down the cup.", "Took the box."),
        groups={"task": "action_sequence"},
        span=(16.1, 27.0),
    )
    assert {task for task, one in first.items() if one.span is not None} == set(MVBENCH_CUT)
    assert {task: one.fps for task, one in first.items() if one.fps is not None} == {"episodic_reasoning": 3.0}
    assert first["episodic_reasoning"].video == frames
    assert {task: str(one.video.parent.relative_to(tmp_path)) for task, one in first.items()} == {
        "action_sequence": "star/Charades_v1_480",
        "moving_count": "clevrer/video_validation",
        "action_prediction": "star/Charades_v1_480",
        "episodic_reasoning": "tvqa/frames_fps3_hq",
        "action_antonym": "ssv2_video",
        "action_count": "perception/videos",
        "scene_transition": "scene_qa/video",
        "object_shuffle": "perception/videos",
        "object_existence": "clevrer/video_validation",
        "fine_grained_pose": "nturgbd",
        "unexpected_action": "FunQA_test/test",
        "moving_direction": "clevrer/video_validation",
        "state_change": "perception/videos",
        "object_interaction": "star/Charades_v1_480",
        "character_order": "perception/videos",
        "action_localization": "sta/sta_video",
        "counterfactual_inference": "clevrer/video_validation",
        "fine_grained_action": "Moments_in_Time_Raw/videos",
        "moving_attribute": "clevrer/video_validation",
        "egocentric_navigation": "vlnqa",
    }


def test_mvbench_reads_the_cut_files_of_lmms_eval_whole(tmp_path: Path) -> None:
    made = {
        "action_sequence": "star/Charades_segment",
        "action_prediction": "star/Charades_segment",
        "object_interaction": "star/Charades_segment",
        "action_localization": "sta/sta_video_segment",
        "episodic_reasoning": "tvqa/video_fps3_hq_segment",
        "fine_grained_pose": "nturgbd_convert",
        "action_antonym": "ssv2_video_mp4",
    }
    for folder in made.values():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    files = mvbench_files(tmp_path / "json")
    for task in made:
        rows = [{name: value for name, value in mvbench_row(task).items() if name not in ("start", "end")}]
        save(files / f"{task}.json", [rows[0] | {"video": "NBMH9_21.4_37.6.mp4"}])
    questions = list(MVBench(annotations=files, video_dir=tmp_path).questions())
    assert all(question.span is None and question.fps is None for question in questions)
    found = {question.groups["task"]: question.video for question in questions}
    assert {task: found[task] for task in made} == {
        task: tmp_path / folder / "NBMH9_21.4_37.6.mp4" for task, folder in made.items()
    }
    assert found["moving_count"].parent == tmp_path / "clevrer/video_validation"


def test_mvbench_finds_videos_that_were_added_later(tmp_path: Path) -> None:
    added = tmp_path / "data0613" / "clevrer" / "video_validation" / "moving_count_0.mp4"
    added.parent.mkdir(parents=True)
    added.touch()
    files = mvbench_files(tmp_path / "json")
    videos = {one.id: one.video for one in MVBench(annotations=files, video_dir=tmp_path).questions()}
    assert videos["moving_count-0"] == added
    assert videos["moving_count-1"] == tmp_path / "clevrer/video_validation/moving_count_1.mp4"


@pytest.mark.parametrize(
    ("task", "column"), [("moving_count", "candidates"), ("action_localization", "start"), ("state_change", "video")]
)
def test_mvbench_names_a_missing_column(task: str, column: str, tmp_path: Path) -> None:
    files = mvbench_files(tmp_path / "json")
    save(files / f"{task}.json", [{name: value for name, value in mvbench_row(task).items() if name != column}])
    with pytest.raises(DatasetError, match=rf"{task}\.json has no column {column};"):
        list(MVBench(annotations=files, video_dir=tmp_path).questions())


def test_mvbench_needs_all_its_files(tmp_path: Path) -> None:
    files = mvbench_files(tmp_path / "json", leave_out="object_shuffle")
    with pytest.raises(DatasetError, match=r"no file of annotations at .*object_shuffle\.json"):
        list(MVBench(annotations=files, video_dir=tmp_path).questions())
    with pytest.raises(DatasetError, match="directory of the 20 files"):
        list(MVBench(annotations=files / "moving_count.json", video_dir=tmp_path).questions())


def test_mvbench_answers_must_be_among_the_options(tmp_path: Path) -> None:
    files = mvbench_files(tmp_path / "json")
    save(files / "action_count.json", [mvbench_row("action_count") | {"answer": "Ate the box."}])
    with pytest.raises(DatasetError, match=r"question action_count-0: its answer 'Ate the box\.' is none of"):
        list(MVBench(annotations=files, video_dir=tmp_path).questions())


def test_mvbench_is_parsed_and_scored(tmp_path: Path) -> None:
    dataset = MVBench(annotations=mvbench_files(tmp_path / "json"), video_dir=tmp_path)
    question = next(iter(dataset.questions()))
    said = {"(B) Put down the cup.": 1.0, "B": 1.0, "C": 0.0, "": 0.0}
    for words, accuracy in said.items():
        assert dataset.score(dataset.parse(words, question), question) == {"accuracy": accuracy}, words


def test_letters_are_taken_off_options() -> None:
    assert unlettered(["A. a cat", "B) B. Jones", " (C) c", "D.x"]) == ("a cat", "B. Jones", "c", "x")
    assert unlettered(["Two", "C. off its place"]) == ("Two", "C. off its place")


def test_options_are_found_in_a_question() -> None:
    assert listed_options("A. Nobody\n(B) asked?\nWho?\n") == ("Nobody", "asked?")
    assert listed_options("Who (A) is it?\n(A) me\n(B) you\n") == ("me", "you")
    assert listed_options("Who?\n(B) you") == ()


def test_answers_are_letters_or_indices() -> None:
    options = ("one", "two", "three")
    assert [answer_letter(given, options, "q") for given in ("C", " A ", "1", 2)] == ["C", "A", "B", "C"]
    for given in ("D", 3, -1, "", None, "AB", 1.5):
        with pytest.raises(DatasetError, match="question q: its answer is .*, but it has 3 options"):
            answer_letter(given, options, "q")
