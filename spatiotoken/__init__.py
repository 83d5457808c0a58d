"""Make video and vision LLMs of Hugging Face Transformers cheaper at inference, with no training.

Names are imported when first used, so that ``import spatiotoken`` costs nothing and pulls in no decoder or kernel.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spatiotoken.catalog import available
    from spatiotoken.config import ConfigError, PatchConfig, load_config
    from spatiotoken.patching import last_report, patch_model, patched, unpatch_model
    from spatiotoken.report import ForwardReport
    from spatiotoken.video import VideoReadError, load_video
    from spatiotoken.video_cache import VideoCache

__version__ = "0.1.0"

_HOMES = {
    "available": "catalog",
    "ConfigError": "config",
    "PatchConfig": "config",
    "load_config": "config",
    "last_report": "patching",
    "patch_model": "patching",
    "patched": "patching",
    "unpatch_model": "patching",
    "ForwardReport": "report",
    "VideoCache": "video_cache",
    "VideoReadError": "video",
    "load_video": "video",
}

__all__ = [
    "ConfigError",
    "ForwardReport",
    "PatchConfig",
    "VideoCache",
    "VideoReadError",
    "available",
    "last_report",
    "load_config",
    "load_video",
    "patch_model",
    "patched",
    "unpatch_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
