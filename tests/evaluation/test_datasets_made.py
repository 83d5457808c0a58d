"""Datasets that are made: the needle in a video, and the probe."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from itertools import islice

import pytest
import torch
from torch import Tensor

from spatiotoken import load_config, load_video, patched
from spatiotoken.answer import prepare_batch
from spatiotoken.evaluation.base import DATASETS, Question
from spatiotoken.evaluation.datasets.needle import (
    Needle,
    enlarged,
    made_haystack,
    needle_picture,
    needle_words,
)
from spatiotoken.evaluation.datasets.probe import Probe
from spatiotoken.probe.dataset import clip_metadata, examples
from spatiotoken.probe.evaluate import ask, instruction, load_probe_model
from spatiotoken.probe.models import PROBE_MODEL_TYPES
from spatiotoken.probe.scenes import FAMILIES
from spatiotoken.video import VideoReadError
from tests.conftest import DATA

NASA = DATA / "nasa_13013_rotated.mp4"
SHADES = {
    "red": (222, 45, 38),
    "green": (45, 180, 60),
    "blue": (50, 80, 225),
    "yellow": (240, 215, 50),
    "purple": (165, 60, 195),
    "cyan": (45, 210, 220),
}


def of_colour(picture: Tensor, colour: str) -> Tensor:
    """``[H, W]`` where a picture ``[3, H, W]`` has that colour, but for the noise."""
    shade = torch.tensor(SHADES[colour])[:, None, None]
    return ((picture.int() - shade).abs() <= 12).all(dim=0)


def white(picture: Tensor) -> Tensor:
    return (picture >= 230).all(dim=-3)


class TestNeedle:
    def test_questions(self) -> None:
        dataset = Needle()
        questions = list(dataset.questions())
        assert len(questions) == 4 * 11 * 6 == len({question.id for question in questions})
        assert questions == list(Needle().questions())
        json.dumps([(question.answer, dict(question.extra)) for question in questions])
        first = questions[0]
        assert first.prompt == (
            "Find the frame with the letter H on a white plate. What colour is the shape in that frame?\n"
            "A. red\nB. green\nC. blue\nD. yellow\nE. purple\nF. cyan\n"
            "Answer with the option's letter from the given choices directly."
        )
        assert first.answer == "A" and first.id == "32_0_0"
        assert Counter(question.answer for question in questions) == dict.fromkeys("ABCDEF", 44)
        assert len({question.video for question in questions}) == len(questions)

    def test_lengths_and_depths_are_groups(self) -> None:
        questions = list(Needle(lengths=(8, 9), depths=3, needles=1).questions())
        assert [question.groups["frames and depth"] for question in questions] == [
            "8, 0%", "8, 50%", "8, 100%", "9, 0%", "9, 50%", "9, 100%",
        ]  # fmt: skip
        assert questions[1].groups == {"frames": "8", "depth": "50%", "frames and depth": "8, 50%"}
        assert [question.extra["at"] for question in questions] == [0, 4, 7, 0, 4, 8]

    def test_a_limit_leaves_no_depth_out(self) -> None:
        some = islice(Needle().questions(), 44)
        assert len({question.groups["frames and depth"] for question in some}) == 44

    def test_one_frame_of_the_haystack_is_the_needle(self) -> None:
        dataset = Needle(lengths=(8, 40), depths=3, needles=2, scale=2)
        for question in dataset.questions():
            clip = dataset.clip(question, num_frames=4)
            length, number = question.extra["frames"], question.extra["needle"]
            hay = made_haystack(number, length).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            changed = (clip.frames != hay).flatten(1).any(dim=1).nonzero().flatten().tolist()
            assert clip.frames.dtype == torch.uint8 and clip.frames.shape == (length, 3, 128, 128)
            assert changed == [question.extra["at"]]
            needle = needle_picture(number).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
            assert torch.equal(clip.frames[changed[0]], needle)
            assert clip.indices == tuple(range(length)) and clip.duration == length / 4
            assert clip.seconds[:3] == (0.0, 0.25, 0.5)

    def test_the_needle_shows_its_colour_and_its_letter_and_no_other_colour(self) -> None:
        shapes = set()
        for number in range(36):
            picture, (letter, colour) = needle_picture(number), needle_words(number)
            assert of_colour(picture, colour).sum() > 30, number
            assert all(of_colour(picture, other).sum() < 8 for other in SHADES if other != colour), number
            assert letter not in "ABCDEF"
            rows, columns = (white(picture).any(dim=axis).nonzero().flatten() for axis in (1, 0))
            assert rows[-1] - rows[0] == 17 and columns[-1] - columns[0] == 13, "the plate, of 18 by 14 pixels"
            plate = picture[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert of_colour(plate, colour).sum() == 0, "the object does not hide behind it"
            shapes.add(int(of_colour(picture, colour).sum()))
        assert len(shapes) > 10
        assert len({needle_words(number) for number in range(36)}) == 36, "no letter gives the colour away"

    def test_the_letter_is_drawn(self) -> None:
        """H: two posts of black with a bar between."""
        picture, (letter, _) = needle_picture(0), needle_words(0)
        assert letter == "H"
        rows, columns = (white(picture).any(dim=axis).nonzero().flatten() for axis in (1, 0))
        ink = (picture[:, rows[0] + 2 : rows[0] + 16 : 2, columns[0] + 2 : columns[0] + 12 : 2] < 40).all(dim=0)
        assert [" ".join("#" if dot else "." for dot in row) for row in ink.tolist()] == [
            "# . . . #",
            "# . . . #",
            "# . . . #",
            "# # # # #",
            "# . . . #",
            "# . . . #",
            "# . . . #",
        ]

    def test_haystacks_have_all_colours_but_no_letters(self) -> None:
        hay = made_haystack(3, 256)
        assert torch.equal(made_haystack(3, 100), hay[:100])
        assert not torch.equal(made_haystack(4, 16), hay[:16])
        assert max(int(white(frame).sum()) for frame in hay) < 60, "a plate has more, the rim of a dot 20"
        for colour in SHADES:
            assert sum(bool(of_colour(frame, colour).sum() > 30) for frame in hay) > 20, colour

    def test_the_same_pixels_everywhere(self) -> None:
        dataset = Needle(lengths=(20,), depths=2, needles=1, scale=1)
        _, last = dataset.questions()
        pixels = dataset.clip(last, 0).frames.numpy().tobytes()
        assert hashlib.sha256(pixels).hexdigest()[:16] == "08dca3e427971292"

    def test_a_video_for_a_haystack(self) -> None:
        dataset = Needle(haystack=NASA, lengths=(6,), depths=2, needles=1)
        _, last = dataset.questions()
        clip, video = dataset.clip(last, num_frames=99), load_video(NASA, num_frames=6)
        assert torch.equal(clip.frames[:5], video.frames[:5])
        assert torch.equal(clip.frames[5], enlarged(needle_picture(0), 480, 270))
        assert clip.indices == video.indices and clip.duration == video.metadata.duration
        assert list(clip.seconds) == video.timestamps.tolist()

    def test_a_haystack_that_is_too_short(self) -> None:
        dataset = Needle(haystack=NASA, lengths=(4000,), depths=2, needles=1)
        with pytest.raises(VideoReadError, match="nasa_13013_rotated"):
            dataset.clip(next(dataset.questions()), 4000)

    def test_pictures_are_enlarged_whole(self) -> None:
        picture = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).expand(3, 2, 2)
        assert enlarged(picture, 4, 7)[2].tolist() == [
            [0, 1, 1, 2, 2, 0, 0],
            [0, 1, 1, 2, 2, 0, 0],
            [0, 3, 3, 4, 4, 0, 0],
            [0, 3, 3, 4, 4, 0, 0],
        ]
        assert enlarged(picture, 5, 3)[0].tolist() == [[0] * 3, [1, 1, 2], [1, 1, 2], [3, 3, 4], [0] * 3]

    def test_scores(self) -> None:
        dataset = Needle()
        first = next(dataset.questions())
        for text, expected in {"A": 1, "A. red": 1, "red": 1, "B": 0, "": 0, "I see no such frame": 0}.items():
            assert dataset.score(dataset.parse(text, first), first) == {"accuracy": expected}, text

    @pytest.mark.parametrize("wrong", [{"lengths": ()}, {"lengths": (1,)}, {"depths": 1}, {"needles": 0}, {"scale": 0}])
    def test_options_out_of_range(self, wrong: dict[str, object]) -> None:
        with pytest.raises(ValueError):
            Needle(**wrong)


class TestProbe:
    def test_questions_are_the_probes(self) -> None:
        dataset = Probe(size=70)
        questions = list(dataset.questions())
        assert [question.groups["family"] for question in questions] == [*FAMILIES] * 10
        made = list(examples("test", 70))
        for question, example in zip(questions, made, strict=True):
            assert question.id == f"{example.sample:06d}" and question.prompt == example.question
            assert question.answer == example.answer and question.options == example.options
        for at in (0, 41, 69):
            clip = dataset.clip(questions[at], num_frames=8)
            assert torch.equal(clip.frames, made[at].frames) and len(clip.seconds) == len(clip.indices) == 16
        assert DATASETS.get("probe") is Probe and Probe().size == 1176

    def test_another_number_of_frames(self) -> None:
        dataset = Probe(size=1, num_frames=9)
        (only,) = dataset.questions()
        clip = dataset.clip(only, num_frames=32)
        assert torch.equal(clip.frames, next(examples("test", 1, num_frames=9)).frames)
        assert clip.seconds[-1] == 2.0 and clip.duration == 2.25

    def test_other_models_are_told_the_options(self) -> None:
        dataset = Probe(size=2, plain=True)
        for question, example in zip(dataset.questions(), examples("test", 2), strict=True):
            assert question.prompt == instruction(example)
        assert dataset.limits(None, [], 10) == {"max_new_tokens": 16}

    def test_scores(self) -> None:
        dataset = Probe(size=1)
        (only,) = dataset.questions()
        other = next(option for option in only.options if option != only.answer)
        for text, expected in {only.answer: 1, f"It is {only.answer.upper()}.": 1, other: 0, "": 0, "grey": 0}.items():
            assert dataset.score(dataset.parse(text, only), only) == {"accuracy": expected}, text

    @pytest.mark.parametrize(
        ("model_type", "plain", "count"), [*((name, False, 14) for name in PROBE_MODEL_TYPES), ("qwen2_5_vl", True, 3)]
    )
    def test_answers_are_those_of_the_probe(self, model_type: str, plain: bool, count: int) -> None:
        """Of the same model, to the same questions together, under a method that reduces."""
        model, processor = load_probe_model(model_type)
        config = load_config("divprune")
        dataset = Probe(size=count, plain=plain)
        questions = list(dataset.questions())
        clips = [dataset.clip(question, 16) for question in questions]
        prompts = [dataset.prompt(question, clip) for question, clip in zip(questions, clips, strict=True)]
        inputs = prepare_batch(processor, [clip.frames for clip in clips], prompts, [clip.metadata() for clip in clips])
        theirs = prepare_batch(processor, [clip.frames for clip in clips], prompts, [clip_metadata(16)] * count)
        assert inputs.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(inputs[key]), torch.as_tensor(theirs[key])) for key in inputs)
        length = inputs["input_ids"].shape[1]
        limits = dataset.limits(processor.tokenizer, questions, length)
        with patched(model, config):
            output = model.generate(**inputs, **limits, do_sample=False)
        said = [text.strip() for text in processor.batch_decode(output[:, length:], skip_special_tokens=True)]
        if plain:
            return_to_plain(model)
        tally = ask(model, processor, {"": config}, examples("test", count))[""]
        assert said == tally.answers
        parsed = [dataset.parse(text, question) for text, question in zip(said, questions, strict=True)]
        scores = [dataset.score(one, question) for one, question in zip(parsed, questions, strict=True)]
        assert [bool(score["accuracy"]) for score in scores] == tally.right
        assert plain or sum(tally.right) > count / 2


def return_to_plain(model: object) -> None:
    """As if the model had not been trained on the probe, for which it is told by a mark."""
    del model.config.spatiotoken_probe  # type: ignore[attr-defined]


def test_a_question_needs_no_file() -> None:
    for dataset in (Needle(needles=1, depths=2, lengths=(8,)), Probe(size=1)):
        question: Question = next(iter(dataset.questions()))
        assert not question.video.exists() and dataset.clip(question, 8) is not None
