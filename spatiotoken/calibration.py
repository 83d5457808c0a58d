"""Offline search of each head's kind of sparse attention, on prompts of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from spatiotoken.attention.base import PrefillInputs
from spatiotoken.attention.head_search import agreed, search_heads
from spatiotoken.attention.minference import MInference
from spatiotoken.attention.observe import observed
from spatiotoken.config import PatchConfig, load_config


def method_with_heads(config: PatchConfig) -> MInference:
    """The config's attention method, if it can be told what each head does.

    Raises:
        ValueError: there is none, or it treats all heads alike.
    """
    method = config.attention
    if method is None:
        raise ValueError("the config has no attention method, whose heads could be searched")
    if not isinstance(method, MInference):
        raise ValueError(f"attention method {method.name!r} has no field 'heads' that could be searched")
    return method


def calibrated(
    model: PreTrainedModel,
    prompts: Iterable[Mapping[str, Any]],
    config: PatchConfig,
    *,
    density: float = 0.1,
    processor: Any = None,
) -> PatchConfig:
    """``config`` with ``attention.heads`` as most prompts want it.

    Args:
        prompts: inputs of the model's processor.
        config: its stages for frames and tokens are active meanwhile.
        density: share of the causal pairs that each head may compute.
        processor: as for ``patch_model``.

    Raises:
        ValueError: the config's method has no field ``heads``, or nothing was seen of the model's layers.
    """
    method = method_with_heads(config)
    found: dict[int, list[tuple[str, ...]]] = {}

    def visit(inputs: PrefillInputs) -> None:
        found.setdefault(inputs.layer, []).append(search_heads(inputs, density, method=method))

    for prompt in prompts:
        observed(model, prompt, visit, config=config, processor=processor)
    if not found:
        raise ValueError("there are no prompts, or no layers with full attention, to search the heads on")
    return load_config(config, **{"attention.heads": [list(agreed(found[layer])) for layer in sorted(found)]})
