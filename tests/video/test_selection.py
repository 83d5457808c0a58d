"""Choosing frames while a file is read."""

import math

import pytest
import torch
from torch.nn.functional import interpolate

from spatiotoken.config import load_config
from spatiotoken.frames import ScoredSelector, Scorer
from spatiotoken.frames.encoders import PixelEncoder, TowerEncoder
from spatiotoken.structures import FrameChoice
from spatiotoken.video import VideoReadError, load_video, probe_video, select_frames
from spatiotoken.video.backends import open_reader
from spatiotoken.video.selection import SHORT_SIDE

FILES = (
    "av1_video.mkv",
    "flipping_a_pancake.mkv",
    "h265_video.mp4",
    "nasa_13013_rotated.mp4",
    "test_non_zero_start.mp4",
    "testsrc2_vp9.webm",
    "video_90.mov",
)


class Told(ScoredSelector):
    """Keeps what it was told, and chooses what the test says."""

    name = "told"
    needs = frozenset({"features", "patches"})
    num_frames: int = 2
    choice: object = None
    seen: object = None

    def select(self, frames):
        self.seen.append(frames)
        return self.choice or FrameChoice((0,))


class Asked(Told):
    name = "asked"
    needs = frozenset({"relevance"})


class Looking(Told):
    name = "looking"
    needs = frozenset({"score"})


@pytest.mark.parametrize("config", ["uniform", "fps", "kmeans", "dpp", "kffocus", "longvu"])
@pytest.mark.parametrize("file", FILES)
def test_every_kind_of_file(file, config, data):
    """VP9, HEVC, AV1, rotated, not starting at 0, several streams, fewer frames than asked."""
    more = {"frames.scorer": "pixels"} if config == "longvu" else {}
    selector = load_config(config, **{"frames.num_frames": 6}, **more).frames
    about = probe_video(data / file)
    video = load_video(data / file, selector=selector)
    assert 1 <= len(video.indices) <= 6 and len(video.timestamps) == len(video.indices)
    assert list(video.indices) == sorted(set(video.indices)) and video.indices[-1] < about.num_frames
    assert torch.equal(video.frames, load_video(data / file, indices=video.indices).frames)
    assert video.frames.shape[2:] == (about.height, about.width)
    if about.num_frames <= 6 and config not in ("fps", "longvu"):
        assert video.indices == tuple(range(about.num_frames))


def test_one_frame_video(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "one.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        out.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        out.mux(stream.encode(None))
    for config in ("uniform", "fps", "kmeans", "dpp", "kffocus"):
        assert load_video(path, selector=load_config(config).frames).indices == (0,)


def test_variable_frame_rate(clips, read_numbers):
    """Candidates are what is on screen at equal distances in time, not every n-th frame."""
    told = Told(seen=[])
    selection = select_frames(clips.path("vfr.mp4"), told, candidate_fps=2.0)
    times = select_frames(clips.path("vfr.mp4"), load_config("uniform", **{"frames.num_frames": 9999}).frames).seconds
    for moment, index in zip(range(len(selection.candidates)), selection.candidates, strict=True):
        shown = max(i for i, time in enumerate(times) if time <= moment / 2 + 1e-3)
        assert index == shown
    fps = load_config("fps", **{"frames.rate": 2.0}).frames
    at_rate = select_frames(clips.path("vfr.mp4"), fps).indices
    assert len(at_rate) == len(selection.candidates)
    # A frame that comes a hundredth of an interval late is on time for the method, not for the reader.
    assert all(0 <= a - b <= 1 for a, b in zip(at_rate, selection.candidates, strict=True))


def test_candidates_are_small_and_the_chosen_full(data):
    path = data / "testsrc2_vp9.webm"  # 1280 x 720
    told = Told(choice=FrameChoice((1, 3)), seen=[])
    video = load_video(path, selector=told, candidate_fps=8.0)
    assert video.frames.shape == (2, 3, 720, 1280)
    (frames,) = told.seen
    with open_reader(path, "auto") as reader:
        small = [frame for frame, _ in reader.read_small([0, 10], SHORT_SIDE)]
        (first, _), (second, _) = list(reader.read([0, 10]))
    assert small[0].shape == (3, 224, 398) and small[0].dtype == torch.uint8
    for picture, full in zip(small, (first, second), strict=True):
        expected = interpolate(full[None].float(), (224, 398), mode="area")[0]
        assert (picture - expected).abs().mean() < 4, "colours are made small before they are RGB"
    assert frames.patches.shape == (8, 256, 3)
    torch.testing.assert_close(frames.features[:1], PixelEncoder().describe(small[0][None]).features)


def test_short_videos_have_candidates_enough(data):
    """A second of video at one candidate a second would leave nothing to choose."""
    told = Told(num_frames=8, seen=[])
    selection = select_frames(data / "testsrc2_vp9.webm", told)
    assert selection.candidates == tuple((2 * i + 1) * 30 // 32 for i in range(16))
    everything = Told(num_frames=100, seen=[])
    assert select_frames(data / "testsrc2_vp9.webm", everything).candidates == tuple(range(30))


def test_key_frames_only(clips, data, tmp_path):
    av = pytest.importorskip("av")
    told = Told(num_frames=1, seen=[])
    path = data / "flipping_a_pancake.mkv"
    selection = select_frames(path, told, keyframes_only=True)
    with av.open(str(path)) as container:
        expected = [number for number, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    assert list(selection.candidates) == expected and len(expected) > 1
    if pytest.importorskip("torchcodec", exc_type=(ImportError, RuntimeError)):
        with pytest.raises(ValueError, match="backend 'torchcodec' does not tell which are key frames"):
            select_frames(path, told, keyframes_only=True, backend="torchcodec")


def test_smaller_and_mixed_frames(data):
    path = data / "flipping_a_pancake.mkv"
    candidates = select_frames(path, Told(seen=[]), candidate_fps=1.0).candidates
    full = load_video(path, indices=candidates).frames.float()
    half = load_video(path, selector=Told(choice=FrameChoice((0, 4), scales=(0.5, 0.5)), seen=[]))
    assert half.frames.shape == (2, 3, 120, 213) and half.indices == (candidates[0], candidates[4])
    expected = interpolate(full[[0, 4]], (120, 213), mode="bicubic", antialias=True).clamp(0, 255)
    assert (half.frames - expected).abs().max() <= 1
    mixing = torch.zeros(2, len(candidates))
    mixing[0, 0], mixing[1, 3:5] = 1, torch.tensor([0.25, 0.75])
    mixed = load_video(path, selector=Told(choice=FrameChoice((0, 4), mixing=mixing), seen=[]))
    assert torch.equal(mixed.frames[0].float(), full[0])
    assert (mixed.frames[1] - (0.25 * full[3] + 0.75 * full[4])).abs().max() <= 1
    assert mixed.indices == half.indices and mixed.timestamps[1] == half.timestamps[1]
    with pytest.raises(ValueError, match="several sizes, which one tensor cannot hold: give it to patch_model"):
        load_video(path, selector=Told(choice=FrameChoice((0, 4), scales=(1.0, 0.5)), seen=[]))


def test_questions_are_needed_and_read(data, families):
    path = data / "flipping_a_pancake.mkv"
    asked = Asked(scorer=Scorer(kind="tower", cache=None), seen=[])
    with pytest.raises(ValueError, match="selector Asked compares frames with the question: give one"):
        load_video(path, selector=asked)
    with pytest.raises(ValueError, match=r"encoder=TowerEncoder\(model, processor\)"):
        load_video(path, selector=asked, question="What is this?")
    family = families["llava_onevision"]
    encoder = TowerEncoder(family.model, family.processor)
    load_video(path, selector=asked, question="What is this?", encoder=encoder)
    (frames,) = asked.seen
    assert frames.relevance.shape == (math.ceil(probe_video(path).duration),) and frames.features is None
    # One that asks for single scores gets those of all: this encoder compares frames with each other.
    looking = Looking(scorer=Scorer(kind="tower", cache=None), seen=[])
    load_video(path, selector=looking, question="What is this?", encoder=encoder)
    assert torch.equal(looking.seen[0].score([3, 1]), frames.relevance[[3, 1]])


def test_scores_decode_only_what_is_looked_at(data, monkeypatch):
    """`score` costs the frames that it is asked for."""
    described = []

    class Counting(PixelEncoder):
        def describe(self, pixels, *, patches=False):
            described.append(len(pixels))
            return super().describe(pixels, patches=patches)

        def relevance(self, features, question):
            return features.mean(dim=1)

    class Peeking(Looking):
        name = "peeking"

        def select(self, frames):
            self.seen.append(frames.score([5, 2, 5]))
            return FrameChoice((2,))

    peeking = Peeking(scorer=Scorer(kind="tower"), seen=[])
    path = data / "flipping_a_pancake.mkv"
    video = load_video(path, selector=peeking, question="?", encoder=Counting())
    assert sorted(described) == [2] and len(video.indices) == 1
    told = Told(seen=[])
    load_video(path, selector=told)
    torch.testing.assert_close(peeking.seen[0], told.seen[0].features.mean(dim=1)[[5, 2, 5]])


def test_descriptions_are_kept_for_the_next_question(data, tmp_path, monkeypatch):
    calls = []

    class Counting(PixelEncoder):
        def describe(self, pixels, *, patches=False):
            calls.append(len(pixels))
            return super().describe(pixels, patches=patches)

        def relevance(self, features, question):
            return features.mean(dim=1) * len(question)

    path, copy = data / "flipping_a_pancake.mkv", tmp_path / "same.mkv"
    copy.write_bytes(path.read_bytes())
    asked = Asked(scorer=Scorer(kind="tower", cache=str(tmp_path / "kept")), seen=[])
    for file, question in ((path, "a"), (path, "bb"), (copy, "ccc")):
        load_video(file, selector=asked, question=question, encoder=Counting())
    assert sum(calls) == len(asked.seen[0].timestamps), "each frame once, whoever asks and whatever the file is called"
    first, second, third = asked.seen
    torch.testing.assert_close(second.relevance, 2 * first.relevance)
    assert torch.equal(first.timestamps, third.timestamps)
    load_video(path, selector=asked, question="a", encoder=Counting(), candidate_fps=2.0)
    assert sum(calls) > len(first.timestamps), "other candidates are described anew"


def test_damaged_files_are_named(data):
    with pytest.raises(VideoReadError, match="corrupted.mp4"):
        load_video(data / "corrupted.mp4", selector=load_config("kmeans").frames)
