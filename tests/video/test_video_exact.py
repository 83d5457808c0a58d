"""Every frame is the one that decoding the whole stream gives."""

import random
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from spatiotoken.video import VideoReadError, load_video, probe_video
from spatiotoken.video.backends import open_reader

REAL = [
    "av1_video.mkv",
    "flipping_a_pancake.mkv",
    "h265_video.mp4",
    "nasa_13013_rotated.mp4",
    "test_non_zero_start.mp4",
    "testsrc2_vp9.webm",
    "video_90.mov",
]
TURNS = {"nasa_13013_rotated.mp4": 1, "video_90.mov": -1}
MADE = [
    "closed.mp4",
    "open.mp4",
    "open.mkv",
    "open.ts",
    "closed.ts",
    "bframes.avi",
    "mpeg4.avi",
    "vp8.webm",
    "vfr.mp4",
    "cut.mp4",
    "cut_open.mp4",
    "cut_open.mkv",
]
REFUSED = {
    "torchcodec": {"open.ts", "closed.ts", "bframes.avi", "mpeg4.avi", "vp8.webm", "cut_open.mkv"},
    "pyav": set(),
    "decord": {
        "av1_video.mkv",
        "open.ts",
        "closed.ts",
        "bframes.avi",
        "mpeg4.avi",
        "cut.mp4",
        "cut_open.mp4",
        "cut_open.mkv",
    },
}
# Colours may differ a little between FFmpeg versions; frame numbers are tested exactly on the generated clips.
TOLERANCE = 2


def sequential(path, turns=0, stream=0):
    """All frames [T, 3, H, W] and their times from the first one's, by decoding from start to end."""
    frames, times = [], []
    with av.open(str(path)) as container:
        for frame in container.decode(container.streams[stream]):
            rgb = np.rot90(frame.to_ndarray(format="rgb24"), turns)
            frames.append(torch.from_numpy(rgb.copy()).permute(2, 0, 1))
            times.append(frame.time)
    return torch.stack(frames), torch.tensor(times, dtype=torch.float64) - times[0]


def difference(a, b):
    return max((x.int() - y.int()).abs().max().item() for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def references(data):
    known = {}

    def get(name):
        if name not in known:
            known[name] = sequential(data / name, TURNS.get(name, 0))
        return known[name]

    return get


@pytest.mark.parametrize("name", REAL)
def test_real_file(name, backend, data, references):
    path = data / name
    if name in REFUSED[backend]:
        with pytest.raises(VideoReadError, match=name):
            load_video(path, backend=backend)
        return
    frames, times = references(name)
    video = load_video(path, backend=backend)
    assert video.frames.dtype == torch.uint8 and video.frames.is_contiguous()
    assert video.frames.shape == frames.shape
    assert difference(video.frames, frames) <= (0 if backend == "pyav" else TOLERANCE)
    assert video.timestamps.dtype == torch.float64
    torch.testing.assert_close(video.timestamps, times, rtol=0, atol=1e-6)
    assert video.indices == tuple(range(len(frames)))
    about = video.metadata
    assert (about.backend, about.num_frames, about.path) == (backend, len(frames), str(path))
    assert (about.height, about.width) == frames.shape[2:]
    assert about == probe_video(path, backend)

    some = [i for i in (0, 1, 7, 8, len(frames) // 2, len(frames) - 1) if i < len(frames)]
    some = sorted(set(some))
    sparse = load_video(path, backend=backend, indices=some)
    assert sparse.indices == tuple(some)
    assert difference(sparse.frames, video.frames[some]) == 0
    assert torch.equal(sparse.timestamps, video.timestamps[some])


@pytest.mark.parametrize("name", MADE)
def test_made_file(name, backend, clips, read_numbers):
    path, expected = clips.path(name), clips.expected(name)
    if name in REFUSED[backend]:
        with pytest.raises(VideoReadError, match=name):
            probe_video(path, backend)
        return
    video = load_video(path, backend=backend)
    assert read_numbers(video.frames) == expected
    assert video.metadata.num_frames == len(expected)
    assert video.timestamps[0] == 0 and bool((video.timestamps.diff() > 0).all())
    if name != "vfr.mp4":
        atol = 1e-3 if name.endswith(("mkv", "webm")) else 1e-5
        even = torch.arange(len(expected), dtype=torch.float64) / 30
        torch.testing.assert_close(video.timestamps, even, rtol=0, atol=atol)

    indices = [2, 3, 31, 32, 58, 74]
    sparse = load_video(path, backend=backend, indices=indices)
    assert read_numbers(sparse.frames) == [expected[i] for i in indices]


@pytest.mark.parametrize(
    ("backend", "name"),
    [(backend, name) for backend in REFUSED for name in MADE if name not in REFUSED[backend]],
    indirect=["backend"],
)
def test_any_order_of_single_frames(backend, name, clips, read_numbers):
    """Going to and fro makes every kind of seek."""
    expected = clips.expected(name)
    order = list(range(len(expected)))
    random.Random(0).shuffle(order)
    with open_reader(clips.path(name), backend) as reader:
        for i in order[:20]:
            [(frame, _)] = reader.read([i])
            assert read_numbers(frame[None]) == [expected[i]]


@pytest.mark.parametrize("name", ["open.mp4", "open.ts", "cut.mp4", "vfr.mp4", "bframes.avi"])
def test_auto_is_exact_everywhere(name, clips, read_numbers):
    assert read_numbers(load_video(clips.path(name)).frames) == clips.expected(name)


def test_backends_agree_to_the_pixel_on_cut_video(clips):
    pytest.importorskip("torchcodec.decoders", exc_type=(ImportError, RuntimeError))
    path = clips.path("cut.mp4")
    ours, theirs = load_video(path, backend="pyav"), load_video(path, backend="torchcodec")
    assert difference(ours.frames, theirs.frames) <= TOLERANCE
    assert ours.metadata.num_frames == theirs.metadata.num_frames == 75


@pytest.mark.parametrize(("name", "turns"), TURNS.items())
def test_rotation_comes_out_upright(name, turns, backend, data):
    raw, _ = sequential(data / name)
    video = load_video(data / name, backend=backend, num_frames=2)
    height, width = raw.shape[2:]
    assert video.frames.shape[2:] == (width, height)
    assert difference(video.frames, torch.rot90(raw[list(video.indices)], turns, (2, 3))) <= TOLERANCE
    assert video.metadata.rotation == (None if backend == "decord" else 90 * turns)


def test_best_stream(backend, tmp_path, made_streams, read_numbers):
    if backend == "decord":
        pytest.skip("decord reads the stream that FFmpeg takes for the best, and does not let one choose")
    path = tmp_path / "two.mp4"
    made_streams(path, [(0, 160, 96, "libx264"), (500, 320, 192, "libx264"), (700, 240, 144, "libx264")])
    video = load_video(path, backend=backend)
    assert read_numbers(video.frames) == list(range(500, 520))
    assert video.metadata.stream_index == 1
    assert (video.metadata.height, video.metadata.width) == (192, 320)


def test_nasa_has_its_best_stream_read(backend):
    path = Path("/work/shared/videos/nasa_13013.mp4")
    if not path.exists():
        pytest.skip(f"{path} is not here")
    about = probe_video(path, backend)
    assert (about.num_frames, about.height, about.width) == (390, 270, 480)
    assert about.fps == pytest.approx(30000 / 1001, rel=1e-4)


def test_cover_art_is_not_the_video(tmp_path, made_streams, read_numbers):
    path = tmp_path / "cover.mp4"
    made_streams(path, [(900, 480, 288, "mjpeg"), (5, 160, 96, "libx264")])
    for backend in ("auto", "pyav"):
        video = load_video(path, backend=backend)
        assert read_numbers(video.frames) == list(range(5, 25))
        assert video.metadata.backend == "pyav", "torchcodec cannot tell a cover from a video"


@pytest.mark.parametrize("count", [1, 7, 64, 120])
def test_num_frames_are_centres_of_equal_parts(count, backend, clips, read_numbers):
    video = load_video(clips.path("open.mp4"), backend=backend, num_frames=count)
    assert video.indices == tuple(int((i + 0.5) * 120 / count) for i in range(count))
    assert read_numbers(video.frames) == list(video.indices)
    torch.testing.assert_close(
        video.timestamps, torch.tensor(video.indices, dtype=torch.float64) / 30, rtol=0, atol=1e-5
    )


def shown(times, moments):
    """Brute force: the last frame presented at or before each moment, each once."""
    return tuple(dict.fromkeys(max(i for i, time in enumerate(times) if time <= moment + 5e-4) for moment in moments))


@pytest.mark.parametrize("fps", [0.7, 10])
@pytest.mark.parametrize("name", ["open.mkv", "vfr.mp4"])
def test_fps_takes_the_frame_on_screen(name, fps, backend, clips, read_numbers):
    path = clips.path(name)
    _, times = sequential(path)
    video = load_video(path, backend=backend, fps=fps)
    moments = np.arange(0, video.metadata.duration - 1e-6, 1 / fps)
    assert video.indices == shown(times.tolist(), moments)
    assert read_numbers(video.frames) == list(video.indices)


def test_fps_of_the_video_takes_every_frame(backend, clips):
    for name in ("closed.mp4", "open.mkv"):
        assert load_video(clips.path(name), backend=backend, fps=30).indices == tuple(range(120))


def test_start_other_than_zero(backend, data):
    with av.open(str(data / "test_non_zero_start.mp4")) as container:
        assert container.start_time > 8_000_000
    video = load_video(data / "test_non_zero_start.mp4", backend=backend, fps=10)
    assert video.indices == (0, 3, 6, 9)
    torch.testing.assert_close(
        video.timestamps, torch.tensor([0, 0.1, 0.2, 0.3], dtype=torch.float64), rtol=0, atol=1e-6
    )
