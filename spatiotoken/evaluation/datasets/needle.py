"""A needle in a video: one foreign frame somewhere among many, and a question that only that frame answers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from spatiotoken.evaluation.base import Clip, Question
from spatiotoken.evaluation.multiple_choice import LETTERS as OPTIONS
from spatiotoken.evaluation.multiple_choice import MultipleChoice, lettered
from spatiotoken.probe.dataset import scene_seed
from spatiotoken.probe.render import render
from spatiotoken.probe.scenes import COLOURS, FPS, LETTER_HEIGHT, LETTERS, SIDE, sample_scenes
from spatiotoken.video import load_video

SCENE_FRAMES = 16
"""Of each scene of a made haystack."""
_MARGIN = 2  # pixels from a plate to the edge of the picture
_NEEDLES, _HAYSTACKS = scene_seed(1, "test"), scene_seed(2, "test")  # no scene of the probe's own


def needle_words(number: int) -> tuple[str, str]:
    """The letter and the colour that a needle shows. Both take turns; letters that name options are left out."""
    letters = LETTERS[2:]
    return letters[(number + number // len(letters)) % len(letters)], COLOURS[number % len(COLOURS)]


def needle_picture(number: int) -> Tensor:
    """Frame ``[3, SIDE, SIDE]`` uint8 of one object and, clear of it, a letter on a white plate."""
    letter, colour = needle_words(number)
    scenes = sample_scenes(_NEEDLES, torch.tensor([number]), num_frames=8)
    nothing = torch.zeros_like(scenes.end)
    first_alone = nothing.index_fill(1, torch.tensor([0]), 1)
    is_low = scenes.centre[:, 0, 0, 0] >= SIDE // 2
    top = torch.where(is_low, _MARGIN, SIDE - LETTER_HEIGHT - _MARGIN)
    scenes = replace(
        scenes,
        start=nothing,
        end=first_alone,
        colour=torch.full_like(scenes.colour, COLOURS.index(colour)),
        letter=torch.tensor([LETTERS.index(letter)]),
        letter_frame=torch.tensor([0]),
        letter_at=torch.stack([top, scenes.letter_at[:, 1]], dim=1),
        dot_end=scenes.dot_start,
    )
    return render(scenes)[0, 0]


def made_haystack(number: int, frames: int) -> Tensor:
    """uint8 ``[frames, 3, SIDE, SIDE]``: probe scenes one after another, without letters. A longer haystack of the same
    number begins with the shorter one."""
    count = -(-frames // SCENE_FRAMES)
    samples = torch.arange(count) + (number << 32)
    scenes = sample_scenes(_HAYSTACKS, samples, num_frames=SCENE_FRAMES)
    return render(replace(scenes, letter_frame=torch.full((count,), -1))).flatten(0, 1)[:frames]


def enlarged(picture: Tensor, height: int, width: int) -> Tensor:
    """A square picture ``[3, S, S]`` in the middle of a black frame ``[3, height, width]``, as large as fits in."""
    side = min(height, width)
    place = torch.arange(side) * picture.shape[-1] // side
    frame = picture.new_zeros(3, height, width)
    top, left = (height - side) // 2, (width - side) // 2
    frame[:, top : top + side, left : left + side] = picture[:, place[:, None], place]
    return frame


class Needle(MultipleChoice, dataset="needle"):
    """Needle in a video, in the manner of V-NIAH (arXiv 2406.16852): made, so that nothing is downloaded.

    Among the frames of a haystack one is replaced by a picture that has nothing to do with them: a coloured object and
    a letter on a white plate. Asked for is the colour of the object in the frame with that letter, of six. Depth 0 % is
    the first frame and 100 % the last. All frames are shown to the model, whatever number a run asks for. The same
    needles and haystacks are at every depth and length. Groups: ``frames``, ``depth``, and both, which are the cells of
    V-NIAH's heat map; the headline is the mean over all questions.

    The haystack is made of the probe's scenes (no letters in them, but objects of all colours), or is the ``haystack``,
    a video file, at equal distances. Unlike V-NIAH's, the needle replaces a frame, so that a video has an even number
    of them, and its pictures are made, so that they can be given away.

    Attributes:
        lengths: a set of questions for each.
        depths: at equal distances.
        needles: at each length and depth; with a multiple of six, every answer is right equally often.
        scale: times that each pixel of made frames (64 x 64) is repeated in both directions.
    """

    makes_clips: ClassVar[bool] = True

    lengths: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (32, 64, 128, 256), min_length=1, description="frames of the videos"
    )
    depths: int = Field(11, ge=2, le=101, description="how many depths, from the first frame to the last")
    needles: int = Field(6, ge=1, description="questions at each length and depth")
    haystack: Path | None = Field(None, description="video file to hide the needles in; by default one is made")
    scale: int = Field(4, ge=1, description="enlargement of made frames")

    def questions(self) -> Iterator[Question]:
        # Needles outermost, so that a run's limit leaves none of the lengths and depths out.
        for number in range(self.needles):
            letter, colour = needle_words(number)
            prompt = (
                f"Find the frame with the letter {letter} on a white plate. What colour is the shape in that frame?\n"
                f"{lettered(COLOURS)}\nAnswer with the option's letter from the given choices directly."
            )
            for length, step in itertools.product(self.lengths, range(self.depths)):
                percent = round(100 * step / (self.depths - 1))
                name = f"{length}_{percent}_{number}"
                yield Question(
                    id=name,
                    video=Path("needle", name),
                    prompt=prompt,
                    answer=OPTIONS[COLOURS.index(colour)],
                    options=COLOURS,
                    groups={"frames": str(length), "depth": f"{percent}%", "frames and depth": f"{length}, {percent}%"},
                    extra={"needle": number, "frames": length, "at": round(step * (length - 1) / (self.depths - 1))},
                )

    def clip(self, question: Question, num_frames: int) -> Clip:
        """
        Raises:
            VideoReadError: the haystack cannot be read, or has too few frames.
        """
        number, length, at = (question.extra[name] for name in ("needle", "frames", "at"))
        if self.haystack is None:
            made = made_haystack(number, length)
            frames = made.repeat_interleave(self.scale, dim=2).repeat_interleave(self.scale, dim=3)
            hay = Clip(frames, tuple(time / FPS for time in range(length)), tuple(range(length)), length / FPS)
        else:
            video = load_video(self.haystack, num_frames=length)
            hay = Clip(video.frames, tuple(video.timestamps.tolist()), video.indices, video.metadata.duration)
        hay.frames[at] = enlarged(needle_picture(number), *hay.frames.shape[2:])
        return hay
