"""Look at what every decoder layer attends with, on real prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from transformers import PreTrainedModel

from spatiotoken.attention.base import Attended, Part, PrefillInputs, SparsePrefill
from spatiotoken.config import PatchConfig, load_config
from spatiotoken.patching import patched


class Observer(SparsePrefill):
    """Shows each layer's inputs to a function, and leaves attention to the model; not registered, so not in YAML."""

    name: ClassVar[str] = "observer"
    needs: ClassVar[frozenset[str]] = frozenset({"coordinates"})
    kind: ClassVar[str] = "static"
    complexity: ClassVar[str] = "O(1)"
    fidelity: ClassVar[str] = "our own method"

    visit: Callable[[PrefillInputs], None] = Field(exclude=True, description="called once per layer and prompt")

    def parts(self, inputs: PrefillInputs) -> Sequence[Part]:
        return []

    def attend(self, inputs: PrefillInputs) -> Attended:
        self.visit(inputs)
        return Attended(None, 1.0, "dense")


def observed(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    visit: Callable[[PrefillInputs], None],
    *,
    config: PatchConfig | None = None,
    processor: Any = None,
) -> None:
    """Prefill a prompt with dense attention, and hand what each layer attends with to ``visit``, layer by layer.

    Layers with a sliding window of their own are passed over. Tensors belong to the forward: copy what is to last.

    Args:
        inputs: of the model's processor; each prompt of a batch is visited by itself.
        config: what reduces frames and tokens meanwhile; nothing by default. Its attention method does not run.
        processor: as for ``patch_model``.
    """
    observer = Observer.model_validate({"visit": visit})
    watched = (config or load_config({})).model_copy(update={"attention": observer})
    with patched(model, watched, processor=processor), torch.inference_mode():
        model(**inputs, use_cache=False, logits_to_keep=1)
