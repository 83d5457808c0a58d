"""Models for lmms-eval, which finds them by the entry point ``spatiotoken`` of the group ``lmms_eval.models``.

Nothing of lmms-eval is imported here: it reads this module while its own is half imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODELS = {
    "spatiotoken_qwen2_vl": "Qwen2VL",
    "spatiotoken_qwen2_5_vl": "Qwen2_5VL",
    "spatiotoken_qwen3_vl": "Qwen3VL",
    "spatiotoken_llava_onevision": "LlavaOneVision",
    "spatiotoken_llava_next_video": "LlavaNextVideo",
}
"""Ids of models, as ``--model`` takes them, and their classes in ``model``."""


def manifests() -> list[ModelManifest]:
    """What lmms-eval registers.

    Raises:
        ImportError: lmms-eval is not installed, or is older than this interface.
    """
    try:
        from lmms_eval.models.registry_v2 import ModelManifest
    except ImportError as error:
        raise ImportError("models for lmms-eval need the package lmms-eval, version 0.7 or newer") from error
    # Chat models, as lmms-eval's own of these families: a task gives them its parts in their order.
    return [ModelManifest(name, chat_class_path=f"{__name__}.model.{kind}") for name, kind in MODELS.items()]
