"""Exact, memory-bounded reading of video files. Decoders are imported only when a file is opened."""

from .features import frame_features
from .load import FrameSelector, load_video, probe_video
from .reader import BackendUnavailableError
from .types import Video, VideoMetadata, VideoReadError

__all__ = [
    "BackendUnavailableError",
    "FrameSelector",
    "Video",
    "VideoMetadata",
    "VideoReadError",
    "frame_features",
    "load_video",
    "probe_video",
]
