"""Exact, memory-bounded reading of video files. Decoders are imported only when a file is opened."""

from .features import frame_features
from .load import load_thumbnails, load_video, probe_video
from .reader import BackendUnavailableError
from .selection import FrameSelector, Selection, select_frames
from .types import Video, VideoMetadata, VideoReadError

__all__ = [
    "BackendUnavailableError",
    "FrameSelector",
    "Selection",
    "Video",
    "VideoMetadata",
    "VideoReadError",
    "frame_features",
    "load_thumbnails",
    "load_video",
    "probe_video",
    "select_frames",
]
