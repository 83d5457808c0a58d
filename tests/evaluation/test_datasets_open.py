"""NExT-QA, TempCompass, open-ended datasets and Charades-STA: what is asked, and how answers count."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from spatiotoken.evaluation.base import DATASETS, DatasetError, Question, VideoQA
from spatiotoken.evaluation.datasets.charades_sta import CharadesSTA
from spatiotoken.evaluation.datasets.nextqa import NextQA, NextQAOpenEnded, question_groups
from spatiotoken.evaluation.datasets.open_ended import (
    MSRVTTQA,
    MSVDQA,
    ActivityNetQA,
    OpenEnded,
    activitynet_type,
    load_judge,
    question_word,
)
from spatiotoken.evaluation.datasets.tempcompass import TempCompass, chosen_caption
from tests.conftest import DATA

VIDEOS = Path("videos")
JUDGE = f"{__name__}:same_beginning"
REAL_ROWS = DATA / "nextqa_val.csv"
BOTH_TIMES = {"mIoU": 1.0, "R@1 IoU 0.3": 1.0, "R@1 IoU 0.5": 1.0, "R@1 IoU 0.7": 1.0}


def same_beginning(question: str, answer: str, prediction: str) -> float:
    """A judge, of the questions of these tests."""
    assert question[0].islower() and prediction
    return float(prediction.lower().startswith(answer[0]))


def undecided(question: str, answer: str, prediction: str) -> float:
    return float("nan")


def saved(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def lines_saved(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def asked(dataset: VideoQA) -> list[Question]:
    questions = list(dataset.questions())
    assert len({question.id for question in questions}) == len(questions)
    assert [question.id for question in dataset.questions()] == [question.id for question in questions]
    json.dumps([(question.answer, dict(question.extra)) for question in questions])
    return questions


def accuracy(dataset: VideoQA, question: Question, text: str) -> float:
    return dataset.score(dataset.parse(text, question), question)["accuracy"]


def test_all_are_registered_and_say_what_they_are() -> None:
    names = {"nextqa", "nextqa_oe", "tempcompass", "activitynet_qa", "msvd_qa", "msrvtt_qa", "charades_sta"}
    for name in names:
        kind = DATASETS.get(name)
        assert kind.name == name and len(kind.summary()) > 20


class TestNextQA:
    dataset = NextQA(annotations=REAL_ROWS, video_dir=VIDEOS)

    def test_rows_of_the_authors(self) -> None:
        questions = asked(self.dataset)
        assert len(questions) == 10
        first = questions[0]
        assert first.id == "4010069381_6" and first.video == VIDEOS / "4010069381.mp4"
        assert first.prompt == (
            "how do the two man play the instrument\n"
            "A. roll the handle\n"
            "B. tap their feet\n"
            "C. strum the string\n"
            "D. hit with sticks\n"
            "E. pat with hand"
        )
        assert first.answer == "A" and first.groups == {"type": "CH", "kind": "causal"}
        assert [question.answer for question in questions] == ["A", "C", "C", "B", "A", "E", "E", "A", "E", "A"]
        assert questions[-1].options[-1] == "catching toy", "without the space that the file has behind it"
        assert questions[-1].prompt.endswith("\nE. catching toy")

    def test_groups(self) -> None:
        questions = asked(self.dataset)
        assert Counter(question.groups["type"] for question in questions) == {
            "CW": 3, "CH": 1, "TN": 2, "TC": 1, "DL": 1, "DC": 1, "DO": 1,
        }  # fmt: skip
        assert Counter(question.groups["kind"] for question in questions) == {
            "causal": 4, "temporal": 3, "descriptive": 3,
        }  # fmt: skip
        assert question_groups("TP") == {"type": "TN", "kind": "temporal"}
        with pytest.raises(DatasetError, match="'X1'"):
            question_groups("X1")

    def test_a_video_that_is_there(self, tmp_path: Path) -> None:
        (tmp_path / "4010069381.mkv").touch()
        assert asked(NextQA(annotations=REAL_ROWS, video_dir=tmp_path))[0].video == tmp_path / "4010069381.mkv"

    def test_scores(self) -> None:
        first = asked(self.dataset)[0]
        assert accuracy(self.dataset, first, "A. roll the handle") == 1
        assert accuracy(self.dataset, first, "Roll the handle.") == 1
        assert accuracy(self.dataset, first, "B") == 0
        assert self.dataset.parse("", first) is None and accuracy(self.dataset, first, "") == 0

    def test_other_tables_are_refused(self, tmp_path: Path) -> None:
        with REAL_ROWS.open(newline="") as file:
            rows = list(csv.DictReader(file))
        lines_saved(tmp_path / "rows.jsonl", [{key: row[key] for key in row if key != "a3"} for row in rows])
        with pytest.raises(DatasetError, match="no column a3;"):
            asked(NextQA(annotations=tmp_path / "rows.jsonl", video_dir=VIDEOS))
        lines_saved(tmp_path / "rows.jsonl", [row | {"answer": 5} for row in rows])
        with pytest.raises(DatasetError, match="4010069381_6"):
            asked(NextQA(annotations=tmp_path / "rows.jsonl", video_dir=VIDEOS))
        with pytest.raises(DatasetError, match="--video-dir"):
            asked(NextQA(annotations=REAL_ROWS))


class TestNextQAOpenEnded:
    rows = [
        {"video": 11, "question": "why is the dog wet ", "answer": "it swam", "qid": 3, "type": "CW"},
        {"video": 11, "question": "how many dogs are there", "answer": "two", "qid": 4, "type": "DC"},
    ]

    def test_questions(self, tmp_path: Path) -> None:
        with (tmp_path / "test.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        first, second = asked(NextQAOpenEnded(annotations=tmp_path / "test.csv", video_dir=VIDEOS))
        assert first.id == "11_3" and first.video == VIDEOS / "11.mp4" and first.answer == ["it swam"]
        assert first.prompt == "why is the dog wet\nAnswer a question using a short phrase or sentence."
        assert second.groups == {"type": "DC", "kind": "descriptive"}

    def test_either_reference_answer_is_right(self, tmp_path: Path) -> None:
        """As the hub's table has them: the second one may be missing."""
        rows = [self.rows[0] | {"additional_ref_answer": "swimming"}, self.rows[1] | {"additional_ref_answer": None}]
        dataset = NextQAOpenEnded(annotations=lines_saved(tmp_path / "oe.jsonl", rows), video_dir=VIDEOS, judge=JUDGE)
        first, second = asked(dataset)
        assert first.answer == ["it swam", "swimming"] and second.answer == ["two"]
        for text in ("It swam.", "swimming"):
            assert dataset.score(dataset.parse(text, first), first)["normalised_match"] == 1
        assert dataset.score("swarm", first)["judge"] == 1, "the judge compares with the second as well"

    def test_a_column_is_missing(self, tmp_path: Path) -> None:
        rows = [{key: row[key] for key in row if key != "qid"} for row in self.rows]
        with pytest.raises(DatasetError, match="no column qid;"):
            asked(NextQAOpenEnded(annotations=lines_saved(tmp_path / "oe.jsonl", rows), video_dir=VIDEOS))


class TestTempCompass:
    choices = {
        "12": {
            "action": [
                {
                    "question": "What does the cat do?\nA. sleeping\nB. jumping\n C. a slow walk",
                    "answer": "B. jumping",
                },
                {"question": "What is done?\nA. jumping\nB.Both at once", "answer": "A. jumping"},
            ]
        },
        "12_reverse": {
            "direction": [{"question": "Which way?\nA. up\nB. down", "answer": "B. down"}],
        },
    }
    yes_no = {"12": {"speed": [{"question": "Is it slow?", "answer": "no"}]}}
    captions = {
        "12": {
            "order": [
                {
                    "question": "Which fits?\nOption 1: The cat sits: then it jumps.\nOption 2: The cat jumps.",
                    "answer": "Option 2: The cat jumps.",
                },
                {
                    "question": "Which is better?\nSentence A: The cat sits.\nSentence B: The cat jumps.",
                    "answer": "Sentence A: The cat sits.",
                },
            ]
        }
    }

    @pytest.fixture
    def dataset(self, tmp_path: Path) -> TempCompass:
        saved(tmp_path / "multi-choice.json", self.choices)
        saved(tmp_path / "yes_no.json", self.yes_no)
        saved(tmp_path / "caption_matching.json", self.captions)
        return TempCompass(annotations=tmp_path, video_dir=VIDEOS)

    def test_questions(self, dataset: TempCompass) -> None:
        questions = {question.id: question for question in asked(dataset)}
        assert list(questions) == [
            "multi-choice_12_action_0",
            "multi-choice_12_action_1",
            "multi-choice_12_reverse_direction_0",
            "yes_no_12_speed_0",
            "caption_matching_12_order_0",
            "caption_matching_12_order_1",
        ]
        choice = questions["multi-choice_12_action_0"]
        assert choice.prompt == (
            "What does the cat do?\nA. sleeping\nB. jumping\n C. a slow walk\nPlease directly give the best option:"
        )
        assert choice.answer == "B" and choice.options == ("sleeping", "jumping", "a slow walk")
        assert questions["multi-choice_12_action_1"].options == ("jumping", "Both at once"), "as some published ones"
        assert choice.groups == {
            "task": "multi-choice",
            "aspect": "action",
            "task and aspect": "multi-choice, action",
        }
        assert choice.video == VIDEOS / "12.mp4"
        assert questions["multi-choice_12_reverse_direction_0"].video == VIDEOS / "12_reverse.mp4"
        decision = questions["yes_no_12_speed_0"]
        assert decision.prompt == "Is it slow?\nPlease answer yes or no:" and decision.answer == "no"
        numbered, lettered = list(questions.values())[4:]
        assert numbered.prompt == (
            "Which fits?\nOption 1: The cat sits: then it jumps.\nOption 2: The cat jumps.\n"
            "Please directly give the best option:"
        )
        assert numbered.answer == "B" and lettered.answer == "A"
        assert numbered.options == ("The cat sits: then it jumps.", "The cat jumps.")

    def test_tasks_count_alike(self, dataset: TempCompass) -> None:
        assert dataset.macro == "task" and {question.groups["task"] for question in asked(dataset)} == {
            "multi-choice",
            "yes_no",
            "caption_matching",
        }

    def test_scores(self, dataset: TempCompass) -> None:
        choice, _, _, decision, numbered, lettered = asked(dataset)
        rights = {
            choice.id: ["B", "B.", "B)", "B. jumping", "jumping"],
            decision.id: ["no", "No, it is fast.", "NO."],
            numbered.id: ["Option 2", "Option 2: The cat jumps.", "2", "(2)", "2. The cat jumps.", "The cat jumps."],
            lettered.id: ["Sentence A", "A", "A.", "Sentence A: The cat sits.", "The better one is sentence A."],
        }
        wrongs = {
            choice.id: ["A. sleeping", "C", "", "I cannot tell"],
            decision.id: ["Yes", "yes, no doubt", "", "maybe"],
            numbered.id: ["Option 1", "1", "Option 1: The cat sits: then it jumps.", "", "Option 1 or Option 2"],
            lettered.id: ["Sentence B", "B", "The cat jumps.", ""],
        }
        for question in (choice, decision, numbered, lettered):
            for text in rights[question.id]:
                assert accuracy(dataset, question, text) == 1, text
            for text in wrongs[question.id]:
                assert accuracy(dataset, question, text) == 0, text

    def test_the_caption_that_is_cited_counts(self) -> None:
        """Whatever is said of the other one afterwards."""
        captions = ["A cat.", "No cat."]
        text = "The best match is:\n\n- Caption B: No cat.\n\nThere is none, so caption A is wrong."
        assert chosen_caption(text, ["A", "B"], captions) == "B"
        assert chosen_caption("Caption A: yes. Caption B: yes.", ["A", "B"], captions) is None
        assert chosen_caption("Option 2, unlike option 1", ["1", "2"], captions) is None

    def test_numbers_in_words_name_no_caption(self) -> None:
        assert chosen_caption("2 cats jump.", ["1", "2"], ["A cat.", "No cat."]) is None
        assert chosen_caption("Option B", ["1", "2"], ["A cat.", "No cat."]) != "A"

    def test_other_files_are_refused(self, dataset: TempCompass, tmp_path: Path) -> None:
        saved(tmp_path / "yes_no.json", {"12": {"speed": [{"question": "Is it slow?"}]}})
        with pytest.raises(DatasetError, match="yes_no.json: a question has no 'answer'"):
            asked(dataset)
        saved(tmp_path / "yes_no.json", [{"question": "Is it slow?", "answer": "no"}])
        with pytest.raises(DatasetError, match="does not list questions by video and aspect"):
            asked(dataset)
        (tmp_path / "yes_no.json").unlink()
        with pytest.raises(DatasetError, match="directory of multi-choice.json, yes_no.json, caption_matching.json"):
            asked(dataset)
        saved(
            tmp_path / "multi-choice.json", {"1": {"action": [{"question": "Who?\nA. I\nB. you", "answer": "C. he"}]}}
        )
        with pytest.raises(DatasetError, match="'C. he' is no option"):
            asked(dataset)
        saved(tmp_path / "multi-choice.json", {"1": {"action": [{"question": "Who?", "answer": "A. I"}]}})
        with pytest.raises(DatasetError, match="no options in 'Who\\?'"):
            asked(dataset)


class TestActivityNetQA:
    row = {
        "video_name": "1QIUV7WYKXg",
        "question_id": "v_1QIUV7WYKXg_3",
        "question": "is the Athlete outdoors",
        "answer": "yes",
        "type": "3",
    }

    def test_the_hubs_table(self, tmp_path: Path) -> None:
        dataset = ActivityNetQA(annotations=lines_saved(tmp_path / "test.jsonl", [self.row]), video_dir=VIDEOS)
        (only,) = asked(dataset)
        assert only.id == "v_1QIUV7WYKXg_3" and only.video == VIDEOS / "v_1QIUV7WYKXg.mp4"
        assert only.prompt == "Is the athlete outdoors? Answer the question using a single word or phrase."
        assert only.answer == ["yes"] and only.groups == {"type": "yes/no"}
        assert dataset.max_new_tokens == 64

    def test_the_authors_two_files(self, tmp_path: Path) -> None:
        """Their order may differ, and types are numbers."""
        names = ("video_name", "question", "question_id")
        other = {"video_name": "a_b", "question": "what colour is it", "question_id": "v_a_b_1"}
        saved(tmp_path / "test_q.json", [{name: self.row[name] for name in names}, other])
        answers = [
            {"answer": "red", "type": 4, "question_id": "v_a_b_1"},
            {"answer": "no", "type": 3, "question_id": "v_1QIUV7WYKXg_3"},
        ]
        saved(tmp_path / "test_a.json", answers)
        dataset = ActivityNetQA(annotations=tmp_path, video_dir=VIDEOS)
        first, second = asked(dataset)
        assert (first.answer, second.answer) == (["no"], ["red"]) and second.groups == {"type": "colour"}
        saved(tmp_path / "test_a.json", answers[:1])
        with pytest.raises(DatasetError, match="no answer to 1 questions, such as v_1QIUV7WYKXg_3"):
            asked(dataset)
        saved(tmp_path / "test_a.json", [{"answer": "red", "question_id": "v_a_b_1"}])
        with pytest.raises(DatasetError, match="test_a.json has no column type;"):
            asked(dataset)
        saved(tmp_path / "test_q.json", [{"question": "what colour is it", "question_id": "v_a_b_1"}])
        with pytest.raises(DatasetError, match="test_q.json has no column video_name;"):
            asked(dataset)

    def test_types(self) -> None:
        assert [activitynet_type(number) for number in (0, 1, 2, "7", 8)] == [
            "motion",
            "spatial relationship",
            "temporal relationship",
            "number",
            "other",
        ]
        for unknown in (9, -1, "x", ""):
            with pytest.raises(DatasetError, match="types are 0, 1"):
                activitynet_type(unknown)

    def test_a_column_is_missing(self, tmp_path: Path) -> None:
        path = lines_saved(tmp_path / "test.jsonl", [{key: self.row[key] for key in self.row if key != "type"}])
        with pytest.raises(DatasetError, match="no column type;"):
            asked(ActivityNetQA(annotations=path, video_dir=VIDEOS))


class TestScoresOfWords:
    question = Question("1", VIDEOS, "", ["a red car"], extra={"question": "what is seen"})

    def scores(self, text: str, **options: Any) -> dict[str, float]:
        dataset = ActivityNetQA(**options)
        return dataset.score(dataset.parse(text, self.question), self.question)

    def test_three_degrees_of_agreement(self) -> None:
        names = ("normalised_match", "exact_match", "contained_match")
        assert ActivityNetQA.metrics == names
        rights = {"a red car": (1, 1, 1), " A red car. ": (1, 0, 1), "I see a red car there": (0, 0, 1)}
        for text, expected in rights.items():
            assert self.scores(text) == dict(zip(names, expected, strict=True)), text
        for text in ("", "  ", "a blue car"):
            assert set(self.scores(text).values()) == {0.0}, text

    def test_nothing_said_is_nothing_parsed(self) -> None:
        assert ActivityNetQA().parse(" \n", self.question) is None
        assert ActivityNetQA().parse(" red\n", self.question) == "red"

    def test_a_judge_gives_one_more_metric(self) -> None:
        assert "judge" not in self.scores("any car")
        assert self.scores("any car", judge=JUDGE)["judge"] == 1
        assert self.scores("no car", judge=JUDGE)["judge"] == 0
        assert self.scores("", judge=JUDGE)["judge"] == 0, "which the judge would not have borne"
        with pytest.raises(ValueError, match="said .nan. of question 1"):
            self.scores("any car", judge=f"{__name__}:undecided")

    @pytest.mark.parametrize("name", ["nowhere.to.be:found", f"{__name__}:nobody", f"{__name__}:VIDEOS", "math", ""])
    def test_no_judge(self, name: str) -> None:
        with pytest.raises(ValueError, match="expected"):
            load_judge(name)
        with pytest.raises(ValueError, match="judge"):
            MSRVTTQA(judge=name)


class TestDescriptionQA:
    """MSVD-QA and MSRVTT-QA."""

    rows = [
        {"id": 7, "video_id": 1301, "question": "who is cutting a Piece of paper?", "answer": "man"},
        {"id": 8, "video_id": 1302, "question": "did it rain?", "answer": "no"},
    ]

    def test_msrvtt(self, tmp_path: Path) -> None:
        rows = [row | {"category_id": 14} for row in self.rows]
        first, second = asked(MSRVTTQA(annotations=saved(tmp_path / "test_qa.json", rows), video_dir=VIDEOS))
        assert first.id == "7" and first.video == VIDEOS / "video1301.mp4" and first.answer == ["man"]
        assert first.prompt == "Who is cutting a piece of paper? Answer the question using a single word or phrase."
        assert first.groups == {"type": "who"} and second.groups == {"type": "other"}

    def test_msvd(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "test_qa.json", self.rows)
        (tmp_path / "1_b_0_5.avi").touch()
        dataset = MSVDQA(annotations=path, video_dir=tmp_path)
        with pytest.raises(DatasetError, match="youtube_mapping.txt"):
            asked(dataset)
        (tmp_path / "youtube_mapping.txt").write_text("-4wsuPCjDBc_5_15 vid1301\n1_b_0_5 vid1302\n\n")
        first, second = asked(dataset)
        assert first.video.stem == "-4wsuPCjDBc_5_15" and second.video == tmp_path / "1_b_0_5.avi"
        (tmp_path / "youtube_mapping.txt").write_text("1_b_0_5 vid1302\n")
        with pytest.raises(DatasetError, match="no vid1301"):
            asked(dataset)

    @pytest.mark.parametrize("kind", [MSVDQA, MSRVTTQA])
    def test_two_files_with_names(self, kind: type[OpenEnded], tmp_path: Path) -> None:
        saved(tmp_path / "test_q.json", [{"video_name": "video9", "question": "what runs?", "question_id": "v9_0"}])
        saved(tmp_path / "test_a.json", [{"answer": "dog", "question_id": "v9_0"}])
        (only,) = asked(kind(annotations=tmp_path, video_dir=VIDEOS))
        assert only.id == "v9_0" and only.video == VIDEOS / "video9.mp4" and only.answer == ["dog"]
        assert only.prompt == "What runs? Answer the question using a single word or phrase."

    @pytest.mark.parametrize("kind", [MSVDQA, MSRVTTQA])
    def test_annotations_must_be_given_and_whole(self, kind: type[OpenEnded], tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="--annotations"):
            asked(kind(video_dir=VIDEOS))
        rows = [{key: row[key] for key in row if key != "video_id"} for row in self.rows]
        with pytest.raises(DatasetError, match="no column video_id;"):
            asked(kind(annotations=saved(tmp_path / "test_qa.json", rows), video_dir=VIDEOS))

    def test_question_words(self) -> None:
        words = [question_word(text) for text in ("What is it?", "how many", "whose is it", "")]
        assert words == ["what", "how", "other", "other"]


class TestCharadesSTA:
    text = (
        "3MSZA 24.3 30.4##person turn a light on.\nAMT7R 4.3 12.5##a person sits.\n\n3MSZA 7 0.0##person, stands up\n"
    )

    def dataset(self, directory: Path, text: str) -> CharadesSTA:
        path = directory / "charades_sta_test.txt"
        path.write_text(text)
        return CharadesSTA(annotations=path, video_dir=VIDEOS)

    def test_the_authors_lines(self, tmp_path: Path) -> None:
        first, second, third = asked(self.dataset(tmp_path, self.text))
        assert first.prompt == (
            "Please find the visual event described by a sentence in the video, determining its starting and ending "
            "times. The format should be: 'The event happens in the start time - end time'. For example, The event "
            "'person turn a light on' happens in the 24.3 - 30.4 seonds. Now I will give you the textual sentence: "
            "person turn a light on. Please return its start time and end time."
        )
        assert [first.id, second.id, third.id] == ["3MSZA_0", "AMT7R_0", "3MSZA_1"]
        assert first.answer == [24.3, 30.4] and third.answer == [0.0, 7.0]
        assert second.video == VIDEOS / "AMT7R.mp4" and first.span is None

    def test_the_hubs_table_asks_the_same(self, tmp_path: Path) -> None:
        rows = [
            {"video": "3MSZA.mp4", "caption": "person turn a light on", "timestamp": [24.296875, 30.40625]},
            {"video": "AMT7R.mp4", "caption": "a person sits", "timestamp": [4.30078125, 12.5]},
            {"video": "3MSZA.mp4", "caption": "person, stands up", "timestamp": [0.0, 7.0]},
        ]
        hub = asked(CharadesSTA(annotations=lines_saved(tmp_path / "test.jsonl", rows), video_dir=VIDEOS))
        authors = asked(self.dataset(tmp_path, self.text))
        for one, other in zip(hub, authors, strict=True):
            assert (one.id, one.prompt, one.video) == (other.id, other.prompt, other.video)
            assert one.answer == pytest.approx(other.answer, abs=0.01)

    def test_scores(self, tmp_path: Path) -> None:
        dataset = self.dataset(tmp_path, self.text)
        first = asked(dataset)[0]

        def scores(text: str) -> dict[str, float]:
            return dataset.score(dataset.parse(text, first), first)

        assert dataset.metrics == tuple(BOTH_TIMES)
        assert scores("The event happens in the 24.3 - 30.4 seconds.") == BOTH_TIMES
        assert scores("The event happens in the 30.4 - 24.3 seconds.") == BOTH_TIMES
        # 3.05 of 6.1 seconds.
        assert scores("24.3 - 27.35") == pytest.approx(BOTH_TIMES | {"mIoU": 0.5, "R@1 IoU 0.5": 1, "R@1 IoU 0.7": 0})
        # From 20.4 to 34.4: 6.1 of 14 seconds.
        assert scores("from 20.4s to 34.4 seconds") == pytest.approx(
            {"mIoU": 6.1 / 14, "R@1 IoU 0.3": 1, "R@1 IoU 0.5": 0, "R@1 IoU 0.7": 0}
        )
        for text in ("1.0 - 5.0", "26 - 26", "", "I do not know", "at 24.3 seconds"):
            assert set(scores(text).values()) == {0.0}, text
        assert dataset.parse("", first) is None

    def test_other_files_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="line 2: expected 'VIDEO start end##sentence.', got '3MSZA 24.3##on'"):
            asked(self.dataset(tmp_path, "AMT7R 4.3 12.5##a person sits.\n3MSZA 24.3##on\n"))
        with pytest.raises(DatasetError, match="has no rows"):
            asked(self.dataset(tmp_path, "\n"))
        with pytest.raises(DatasetError, match="no file of annotations"):
            asked(CharadesSTA(annotations=tmp_path / "missing.txt", video_dir=VIDEOS))
        path = lines_saved(tmp_path / "test.jsonl", [{"video": "3MSZA.mp4", "caption": "on"}])
        with pytest.raises(DatasetError, match="no column timestamp;"):
            asked(CharadesSTA(annotations=path, video_dir=VIDEOS))
