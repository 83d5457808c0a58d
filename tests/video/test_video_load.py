"""Arguments, errors, choice of backend, memory, and the selector."""

import gc
import logging
import os
import subprocess
import sys
import wave
from pathlib import Path

import pytest
import torch

from spatiotoken.structures import FrameChoice
from spatiotoken.video import VideoReadError, frame_features, load_video, probe_video
from spatiotoken.video.backends import open_reader
from spatiotoken.video.pyav import PyAVReader


def one_line_error(path, call, *causes):
    with pytest.raises(VideoReadError) as caught:
        call()
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for cause in causes:
        assert cause in message


def test_import_needs_no_decoder():
    code = (
        "import sys, spatiotoken.video\n"
        "assert 'torch' in sys.modules\n"
        "loaded = {'av', 'decord', 'torchcodec'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_file_directory_and_empty_file(tmp_path, backend):
    missing, empty = tmp_path / "none.mp4", tmp_path / "empty.mp4"
    empty.touch()
    for path, cause in ((missing, "no such file"), (tmp_path, "is a directory"), (empty, "is empty")):
        one_line_error(path, lambda p=path: load_video(p, backend=backend), cause)
        one_line_error(path, lambda p=path: probe_video(p, backend), cause)


def test_not_a_video(tmp_path, backend):
    path = tmp_path / "text.mp4"
    path.write_bytes(b"\0\0\0\x20ftypisom" + b"this is no video" * 100)
    one_line_error(path, lambda: load_video(path, backend=backend))


def test_audio_only(tmp_path, backend):
    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes(bytes(16000))
    one_line_error(path, lambda: load_video(path, backend=backend))
    one_line_error(path, lambda: load_video(path), "no video stream")


def test_audio_only_mp4(tmp_path, backend):
    av = pytest.importorskip("av")
    path = tmp_path / "sound.m4a"
    with av.open(str(path), "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
        frame.sample_rate = 8000
        frame.planes[0].update(bytes(frame.planes[0].buffer_size))
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    one_line_error(path, lambda: load_video(path, backend=backend), "video stream")


@pytest.mark.parametrize("how", [{}, {"num_frames": 8}, {"fps": 5}])
def test_file_that_fails_while_decoding(how, backend, data):
    path = data / "corrupted.mp4"
    one_line_error(path, lambda: load_video(path, backend=backend, **how))
    one_line_error(path, lambda: load_video(path, **how))


def test_mp4_whose_end_is_missing(backend, clips, tmp_path):
    av = pytest.importorskip("av")
    whole, path = tmp_path / "whole.mp4", tmp_path / "truncated.mp4"
    with av.open(clips.path("closed.mp4")) as src, av.open(str(whole), "w", options={"movflags": "faststart"}) as out:
        stream = out.add_stream_from_template(src.streams.video[0])
        for packet in src.demux(src.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    assert load_video(whole, backend=backend, num_frames=3).metadata.num_frames == 120
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    one_line_error(path, lambda: load_video(path, backend=backend, num_frames=3))


def test_fewer_frames_than_asked(backend, data):
    path = data / "video_90.mov"
    one_line_error(path, lambda: load_video(path, backend=backend, num_frames=4), "4 frames", "there are 3")
    assert load_video(path, backend=backend, fps=100).indices == (0, 1, 2), "each once, however often it is on screen"
    assert load_video(path, backend=backend, num_frames=3).indices == (0, 1, 2)
    with pytest.raises(ValueError, match=r"video_90.mov: index 3 is out of range, it has 3 frames"):
        load_video(path, backend=backend, indices=[0, 3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, "num_frames must be at least 1, not 0"),
        ({"fps": 0}, "fps must be positive"),
        ({"fps": -1.0}, "fps must be positive"),
        ({"fps": float("nan")}, "fps must be positive"),
        ({"fps": float("inf")}, "fps must be positive and at most 1000"),
        ({"fps": 1e9}, "fps must be positive and at most 1000"),
        ({"candidate_fps": float("inf")}, "candidate_fps must be positive and at most 1000"),
        ({"candidate_fps": 0}, "candidate_fps must be positive"),
        ({"indices": []}, "must not be empty"),
        ({"indices": [-1, 2]}, "strictly increasing and not negative"),
        ({"indices": [3, 2]}, "strictly increasing"),
        ({"indices": [2, 2]}, "strictly increasing"),
        ({"num_frames": 2, "fps": 1.0}, "num_frames and fps"),
        ({"indices": [0], "selector": object()}, "indices and selector"),
    ],
)
def test_impossible_arguments(arguments, message, data):
    with pytest.raises(ValueError, match=message):
        load_video(data / "video_90.mov", **arguments)


def test_unknown_backend(data):
    with pytest.raises(ValueError, match="unknown video backend 'opencv'; supported: 'auto', 'pyav', 'torchcodec'"):
        load_video(data / "video_90.mov", backend="opencv")


def hide(monkeypatch, *names):
    """Have these libraries fail to import."""
    for name in names:
        for module in [m for m in sys.modules if m == name or m.startswith(name + ".")] + [name]:
            monkeypatch.setitem(sys.modules, module, None)


def test_auto_takes_the_first_that_is_installed(monkeypatch, data):
    path = data / "video_90.mov"
    for module in ("torchcodec.decoders", "av", "decord"):
        pytest.importorskip(module, exc_type=(ImportError, RuntimeError))
    assert probe_video(path).backend == "pyav"
    hide(monkeypatch, "av")
    assert probe_video(path).backend == "torchcodec"
    hide(monkeypatch, "torchcodec")
    assert load_video(path, num_frames=1).metadata.backend == "decord"
    hide(monkeypatch, "decord")
    with pytest.raises(ImportError, match="pip install av.*pip install torchcodec.*pip install decord"):
        probe_video(path)


@pytest.mark.parametrize(("name", "library"), [("torchcodec", "torchcodec"), ("pyav", "av"), ("decord", "decord")])
def test_backend_asked_for_but_missing(name, library, monkeypatch, data):
    hide(monkeypatch, library)
    with pytest.raises(ImportError, match=rf"backend '{name}' needs .*pip install {library}"):
        load_video(data / "video_90.mov", backend=name)


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_torchcodec_that_cannot_load_ffmpeg_counts_as_missing(error, monkeypatch, data):
    def broken(name):
        raise error("Could not load libtorchcodec.\n libavutil.so.60: not found")

    monkeypatch.setattr("spatiotoken.video.torchcodec.import_module", broken)
    hide(monkeypatch, "av")
    assert probe_video(data / "video_90.mov").backend == "decord"
    with pytest.raises(ImportError, match="backend 'torchcodec' needs .*libavutil.so.60: not found"):
        probe_video(data / "video_90.mov", "torchcodec")


def test_auto_without_pyav_refuses_what_torchcodec_is_not_exact_on(clips, monkeypatch):
    pytest.importorskip("torchcodec.decoders", exc_type=(ImportError, RuntimeError))
    path = clips.path("open.ts")
    hide(monkeypatch, "av")
    with pytest.raises(VideoReadError, match=r"open\.ts: .*pip install av"):
        probe_video(path)


def test_damage_within_a_stream_is_seen(clips, tmp_path):
    """Which torchcodec and decord conceal; so PyAV comes first."""
    whole = bytearray(Path(clips.path("open.mp4")).read_bytes())
    start = whole.index(b"mdat") + 64
    whole[start : start + 20_000 : 97] = bytes(b ^ 0xFF for b in whole[start : start + 20_000 : 97])
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(whole)
    with pytest.raises(VideoReadError, match="damaged.mp4"):
        load_video(damaged)


def test_odd_names(data, tmp_path, monkeypatch):
    """FFmpeg would read a protocol from the first, and an option from the second."""
    monkeypatch.chdir(tmp_path)
    for name in ("http:clip.mov", "-i.mov", "clip one.mov", "vidéo.mov"):
        (tmp_path / name).write_bytes((data / "video_90.mov").read_bytes())
        assert load_video(name).indices == (0, 1, 2)
        assert load_video(os.fsencode(name)).indices == (0, 1, 2)


def test_a_reader_may_be_closed_twice(backend, data):
    reader = open_reader(data / "video_90.mov", backend)
    reader.close()
    reader.close()


def test_auto_never_resorts_to_decord_for_a_file_others_refuse(monkeypatch, data):
    hide(monkeypatch, "torchcodec")
    monkeypatch.setattr(PyAVReader, "__init__", lambda self, path: (_ for _ in ()).throw(VideoReadError(path)))
    with pytest.raises(VideoReadError):
        probe_video(data / "video_90.mov")


def test_pyav_seeks_only_when_it_is_nearer(clips, monkeypatch, caplog):
    landings = []
    land = PyAVReader._land
    monkeypatch.setattr(PyAVReader, "_land", lambda self, at, i: landings.append(i) or land(self, at, i))
    with caplog.at_level(logging.DEBUG, "spatiotoken.video.pyav"):
        for name in ("open.mp4", "open.mkv", "open.ts", "vfr.mp4"):
            landings.clear()
            load_video(clips.path(name), backend="pyav", indices=[3, 5, 95, 97])
            assert landings and set(landings) == {95}
        landings.clear()
        load_video(clips.path("open.mp4"), backend="pyav")
    assert not landings
    assert not caplog.records, "no seek had to be given up"


def test_pyav_reads_from_the_start_where_key_frames_do_not_serve(clips, monkeypatch, read_numbers):
    monkeypatch.setattr(PyAVReader, "_land", lambda self, at, i: False)
    video = load_video(clips.path("open.mp4"), backend="pyav", indices=[3, 40, 95])
    assert read_numbers(video.frames) == [3, 40, 95]


MEASURE = """
import resource, sys
import torch
torch.set_num_threads(2)
from spatiotoken.video import load_video
path, backend = sys.argv[1:]
load_video(path, backend=backend, indices=[0, 500])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
video = load_video(path, backend=backend, num_frames=100)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((peak - before) * 1024, video.frames.nbytes, video.metadata.num_frames)
"""


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    """20 s of 720p at 30 fps: 1.6 GB decoded."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=30, options={"preset": "ultrafast", "crf": "40"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        frame = av.VideoFrame(1280, 720, "yuv420p")
        for i in range(600):
            frame.planes[0].update(bytes([i % 200 + 20]) * frame.planes[0].buffer_size)
            frame.pts = i
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_is_bounded_by_the_frames_asked_for(backend, long_clip):
    done = subprocess.run([sys.executable, "-c", MEASURE, long_clip, backend], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, output, frames = map(int, done.stdout.split())
    assert frames == 600 and output == 100 * 3 * 720 * 1280
    assert grown <= 1.5 * output


class Pick:
    def __init__(self, *indices):
        self.indices = indices

    def select(self, frames):
        self.frames = frames
        return FrameChoice(self.indices)


def test_selector_sees_small_candidates_and_chooses(backend, clips, read_numbers):
    pick = Pick(1, 3)
    video = load_video(clips.path("open.mp4"), backend=backend, selector=pick, candidate_fps=2.0)
    candidates = [0, 15, 30, 45, 60, 75, 90, 105]
    assert pick.frames.features.shape == (8, 768) and pick.frames.features.dtype == torch.float32
    assert 0 <= pick.frames.features.min() and pick.frames.features.max() <= 1
    torch.testing.assert_close(
        pick.frames.timestamps, torch.tensor(candidates, dtype=torch.float64) / 30, rtol=0, atol=1e-6
    )
    full = load_video(clips.path("open.mp4"), backend=backend, indices=candidates)
    torch.testing.assert_close(pick.frames.features, frame_features(full.frames))
    assert video.indices == (15, 45)
    assert read_numbers(video.frames) == [15, 45]
    assert torch.equal(video.frames, full.frames[[1, 3]])


def test_selector_gets_each_frame_once_where_the_rate_is_lower(data):
    pick = Pick(0, 2)
    video = load_video(data / "video_90.mov", selector=pick, candidate_fps=1000.0)
    assert len(pick.frames.timestamps) == 3
    assert video.indices == (0, 2)


@pytest.mark.parametrize("choice", [(), (2, 1), (1, 1), (-1,), (4,)])
def test_selector_that_chooses_wrongly(choice, clips):
    with pytest.raises(ValueError, match="the selector chose|strictly increasing"):
        load_video(clips.path("open.mp4"), selector=Pick(*choice))


def test_features_are_area_means():
    pixels = torch.randint(0, 256, (2, 3, 64, 32), dtype=torch.uint8)
    means = pixels.float().unflatten(2, (16, 4)).unflatten(4, (16, 2)).mean((3, 5)) / 255
    torch.testing.assert_close(frame_features(pixels), means.flatten(1))
    assert frame_features(pixels[:, :, :7, :9]).shape == (2, 768)


@pytest.mark.skipif(sys.platform != "linux", reason="lists open files through /proc")
def test_file_is_closed_after_use_and_after_errors(backend, data, request):
    def still_open(path):
        return [fd for fd in Path("/proc/self/fd").iterdir() if fd.exists() and fd.resolve() == Path(path).resolve()]

    # At once, not when a garbage collection happens to come.
    gc.disable()
    request.addfinalizer(gc.enable)
    good, bad = data / "video_90.mov", data / "corrupted.mp4"
    with open_reader(good, backend):
        assert still_open(good)
    load_video(good, backend=backend)
    assert not still_open(good)
    for name in (backend, "auto"):
        with pytest.raises(VideoReadError):
            load_video(bad, backend=name)
        assert not still_open(bad)
