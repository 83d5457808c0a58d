"""Clips generated with PyAV whose frames carry their number, so that a wrong frame cannot pass for the right one."""

import importlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

WIDTH, HEIGHT, BLOCK, BITS = 160, 96, 16, 10
X264 = {"crf": "18", "preset": "veryfast"}
CLOSED = X264 | {"x264-params": "keyint=30:scenecut=0:bframes=2"}
OPEN = X264 | {"x264-params": "keyint=30:min-keyint=30:scenecut=0:open-gop=1:bframes=3:b-adapt=0"}
FRAMES = 120
CUT_AT = 45
BACKENDS = ["torchcodec", "pyav", "decord"]
MODULES = {"torchcodec": "torchcodec.decoders", "pyav": "av", "decord": "decord"}


def picture(number, width=WIDTH, height=HEIGHT):
    """A picture with `number` written in its upper left corner, as a row of black and white blocks."""
    rgb = np.full((height, width, 3), 40, np.uint8)
    for bit in range(BITS):
        if number >> bit & 1:
            rgb[BLOCK : 3 * BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = 220
    rgb[4 * BLOCK :, :, 0] = np.linspace(0, 255, width).astype(np.uint8)
    rgb[4 * BLOCK :, :, 1] = number * 7 % 256
    return rgb


def numbers(frames):
    """The numbers written in uint8 frames [T, 3, H, W]."""
    blocks = frames[:, 0, BLOCK : 3 * BLOCK, : BITS * BLOCK].float().mean(1).unflatten(1, (BITS, BLOCK)).mean(2)
    return ((blocks > 128).long() << torch.arange(BITS)).sum(1).tolist()


def encode(path, options, count=FRAMES, codec="libx264", pts=None, tick=Fraction(1, 30)):
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = tick
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts, frame.time_base = (i if pts is None else pts[i]), tick
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def cut(source, target, seconds):
    """What `ffmpeg -ss seconds -i source -c copy target` does: packets from the key frame before, at negative times."""
    with av.open(str(source)) as src, av.open(str(target), "w") as out:
        old = src.streams.video[0]
        new = out.add_stream_from_template(old)
        start = round(seconds / old.time_base)
        src.seek(start, stream=old)
        for packet in src.demux(old):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, new
                out.mux(packet)


def vfr_pts():
    return np.cumsum(np.random.default_rng(0).integers(1, 60, FRAMES)).tolist()


class Clips:
    """Makes each clip when it is first asked for; `expected` are the numbers of the frames a player shows."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, name):
        path = self._folder / name
        if not path.exists():
            getattr(self, "_" + name.replace(".", "_"))(path)
        return str(path)

    def expected(self, name):
        first = {"cut.mp4": CUT_AT, "cut_open.mp4": CUT_AT, "cut_open.mkv": 30}.get(name, 0)
        return list(range(first, FRAMES))

    def _closed_mp4(self, path):
        encode(path, CLOSED)

    def _open_mp4(self, path):
        encode(path, OPEN)

    def _open_mkv(self, path):
        encode(path, OPEN)

    def _open_ts(self, path):
        encode(path, OPEN)

    def _closed_ts(self, path):
        encode(path, CLOSED)

    def _bframes_avi(self, path):
        encode(path, CLOSED)

    def _mpeg4_avi(self, path):
        encode(path, {"bf": "2"}, codec="mpeg4")

    def _vp8_webm(self, path):
        encode(path, {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "realtime"}, codec="libvpx")

    def _vfr_mp4(self, path):
        encode(path, OPEN, pts=vfr_pts(), tick=Fraction(1, 600))

    def _cut_mp4(self, path):
        cut(self.path("closed.mp4"), path, CUT_AT / 30)

    def _cut_open_mp4(self, path):
        cut(self.path("open.mp4"), path, CUT_AT / 30)

    def _cut_open_mkv(self, path):
        # Matroska has no edit list: the clip starts at the key frame, and what leads up to that cannot be decoded.
        cut(self.path("open.mp4"), path, CUT_AT / 30)


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    return Clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(params=BACKENDS)
def backend(request):
    try:
        importlib.import_module(MODULES[request.param])
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"{request.param} cannot be loaded: {str(error)[:100]}")
    return request.param


@pytest.fixture(scope="session")
def data():
    return Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def read_numbers():
    return numbers


@pytest.fixture(scope="session")
def made_streams():
    """Writes a file of video streams, each given as (first number, width, height, codec); mjpeg is cover art."""

    def write(path, streams, count=20):
        with av.open(str(path), "w") as out:
            added = []
            for first, width, height, codec in streams:
                stream = out.add_stream(codec, rate=30)
                stream.width, stream.height = width, height
                stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
                if codec == "mjpeg":
                    stream.disposition = av.stream.Disposition.attached_pic
                added.append((stream, first, width, height))
            for i in range(count):
                for stream, first, width, height in added:
                    if i == 0 or stream.codec_context.name != "mjpeg":
                        frame = av.VideoFrame.from_ndarray(picture(first + i, width, height), format="rgb24")
                        frame.pts = i
                        out.mux(stream.encode(frame))
            for stream, *_ in added:
                out.mux(stream.encode(None))

    return write
