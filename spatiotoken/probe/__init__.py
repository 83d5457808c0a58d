"""The project's own instrument: made videos with questions, small models that can answer them, and tiny ones that
cannot, but have the structure of every supported family."""

from spatiotoken.probe.dataset import examples, probe_dataset, write_videos
from spatiotoken.probe.models import PROBE_MODEL_TYPES, probe_checkpoint
from spatiotoken.probe.tiny import TINY_IMAGE_MODEL_TYPES, TINY_MODEL_TYPES, build_tiny

__all__ = [
    "PROBE_MODEL_TYPES",
    "TINY_IMAGE_MODEL_TYPES",
    "TINY_MODEL_TYPES",
    "build_tiny",
    "examples",
    "probe_checkpoint",
    "probe_dataset",
    "write_videos",
]
