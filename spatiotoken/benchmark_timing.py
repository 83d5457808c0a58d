"""One request to a video LLM, from the processor's output to the last new token, and what its parts take.

The timers exist here only: they lie beneath a patch and around it, and go when the request is over.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from spatiotoken.benchmark import wait_for
from spatiotoken.benchmark_models import FAMILIES
from spatiotoken.config import PatchConfig
from spatiotoken.patches.adapter import find_adapter
from spatiotoken.patching import last_report, patched
from spatiotoken.report import ForwardReport, Recorder
from spatiotoken.undo import Undo

_ENCODE, _VISUAL, _TOWER, _PROJECTOR, _LAYERS = "encode", "visual", "tower", "projector", "decoder layers"


@dataclass(frozen=True)
class Times:
    """Milliseconds of one request.

    Attributes:
        first_token: up to the logits of the first new token, and ``total`` to the end.
        tower: the vision tower.
        projector: the rest of ``get_video_features``, pooling included.
        reduction: what is done to its output before the language model, and frames that are chosen.
        layers: the decoder layers in the prefill.
        method: what the methods themselves took in the prefill: ``reduction``, and dropping between decoder layers.
    """

    first_token: float
    total: float
    tower: float
    projector: float
    reduction: float
    layers: float
    method: float

    @property
    def prefill(self) -> float:
        """Everything but the visual part, up to the first token: the language model's."""
        return self.first_token - self.tower - self.projector - self.reduction

    @property
    def after_tower(self) -> float:
        """Up to the first token, once tower and projector are done."""
        return self.first_token - self.tower - self.projector

    @property
    def further(self) -> float:
        """All new tokens but the first."""
        return self.total - self.first_token


@dataclass(frozen=True)
class Rows:
    """Counts of one prefill.

    Attributes:
        tower: patches that entered the layers of the tower, all layers together.
        projector: those that entered the projector.
        features: tokens that the model's own ``get_video_features`` returned. Placeholders may be more: in older
            versions of transformers a newline comes later.
    """

    tower: int
    projector: int
    features: int


@dataclass(frozen=True)
class Shares:
    """What a config leaves of the arithmetic of three parts of a request; the others do not change."""

    tower: float = 1.0
    projector: float = 1.0
    layers: float = 1.0


def shares_left(rows: Rows, dense: Rows, report: ForwardReport) -> Shares:
    """By patches in the tower and the projector, and by the estimated arithmetic of the decoder layers."""
    flops = report.prefill_flops / report.prefill_flops_dense
    return Shares(rows.tower / dense.tower, rows.projector / dense.projector, flops)


def predicted_first_token(dense: Times, left: Shares) -> float:
    """Milliseconds, if the three parts took their shares of the unpatched model's time and the rest what it takes."""
    saved = dense.tower * (1 - left.tower) + dense.projector * (1 - left.projector) + dense.layers * (1 - left.layers)
    return dense.first_token - saved


def timed_request(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], config: PatchConfig | None, new_tokens: int
) -> tuple[Times, ForwardReport | None]:
    """One request with greedy decoding; attaching the patch is not in the times.

    Args:
        config: None leaves the model unpatched.

    Raises:
        ValueError: the config cannot be used with this model.
    """
    adapter = find_adapter(model)
    core, family = adapter.core(model), FAMILIES[model.config.model_type]
    layers = adapter.decoder_layers(model)
    tower, projector = core.get_submodule(family.tower), core.get_submodule(family.projector)
    spans = Recorder(model.device, 0)
    first = _FirstToken(model.device)
    with ExitStack() as around:
        around.enter_context(_timed_method(core, "get_video_features", spans, _ENCODE))
        around.enter_context(_timed_modules(tower, tower, spans, _TOWER, first))
        around.enter_context(_timed_modules(projector, projector, spans, _PROJECTOR, first))
        around.enter_context(_timed_modules(layers[0], layers[-1], spans, _LAYERS, first))
        around.enter_context(nullcontext() if config is None else patched(model, config))
        with _timed_method(core, "get_video_features", spans, _VISUAL):
            wait_for(model.device)
            start = time.perf_counter()
            generate(model, inputs, new_tokens, first)
            wait_for(model.device)
            stop = time.perf_counter()
        report = None if config is None else last_report(model)
    assert first.seen is not None
    encode, within = spans.milliseconds(_ENCODE), spans.milliseconds(_TOWER)
    if family.projector.startswith(f"{family.tower}."):
        within -= spans.milliseconds(_PROJECTOR)
    reduction = spans.milliseconds(_VISUAL) - encode
    between = report.stages["layers"].milliseconds if report is not None and "layers" in report.stages else 0.0
    return Times(
        first_token=(first.seen - start) * 1e3,
        total=(stop - start) * 1e3,
        tower=within,
        projector=encode - within,
        reduction=reduction,
        layers=spans.milliseconds(_LAYERS),
        method=reduction + between,
    ), report


def generate(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], new_tokens: int, processor: LogitsProcessor | None = None
) -> Tensor:
    """``[1, L]`` prompt and greedy answer of ``new_tokens`` tokens."""
    own = LogitsProcessorList([] if processor is None else [processor])
    return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, logits_processor=own)  # type: ignore[operator]


def counted_rows(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], config: PatchConfig | None
) -> tuple[Rows, ForwardReport | None]:
    """Of one prefill. Raises as ``timed_request`` does."""
    adapter = find_adapter(model)
    core = adapter.core(model)
    counts = {_TOWER: 0, _PROJECTOR: 0, _ENCODE: 0}

    def counting(name: str) -> Callable[..., None]:
        def count(_: nn.Module, args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
            hidden = args[0] if args else arguments["hidden_states"]
            counts[name] += hidden.numel() // hidden.shape[-1]

        return count

    original = core.get_video_features

    @functools.wraps(original)
    def get_video_features(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        counts[_ENCODE] += len(adapter.read(output)[0])
        return output

    projector = core.get_submodule(FAMILIES[model.config.model_type].projector)
    watched = [(layer, _TOWER) for layer in adapter.tower_layers(core)] + [(projector, _PROJECTOR)]
    hooks = [module.register_forward_pre_hook(counting(name), with_kwargs=True) for module, name in watched]
    try:
        with _replaced(core, "get_video_features", get_video_features):
            with nullcontext() if config is None else patched(model, config):
                generate(model, inputs, 1)
                report = None if config is None else last_report(model)
    finally:
        for hook in hooks:
            hook.remove()
    return Rows(counts[_TOWER], counts[_PROJECTOR], counts[_ENCODE]), report


def host_waits(model: PreTrainedModel, inputs: Mapping[str, Tensor], config: PatchConfig | None) -> int | None:
    """How often the host waits for the GPU in one prefill, as torch tells; None on a CPU."""
    if model.device.type != "cuda":
        return None
    with nullcontext() if config is None else patched(model, config), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            generate(model, inputs, 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(one.message) for one in caught)


def native_prompt(model: PreTrainedModel, inputs: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """``inputs`` as if its one video had ``tokens`` tokens from the start; for use within ``native_features``."""
    ids, picture = inputs["input_ids"], model.config.video_token_id
    visual = ids[0] == picture
    first = int(visual.int().argmax())
    rest = ids[0, first + int(visual.sum()) :]
    native = torch.cat([ids[0, :first], ids.new_full((tokens,), picture), rest])[None]
    prompt = {"input_ids": native, "attention_mask": torch.ones_like(native)}
    prompt["pixel_values_videos"] = inputs["pixel_values_videos"].new_zeros(1)
    if "video_grid_thw" in inputs:
        merge = model.config.vision_config.spatial_merge_size
        prompt["mm_token_type_ids"] = 2 * (native == picture).int()
        prompt["video_grid_thw"] = inputs["video_grid_thw"].new_tensor([[1, merge, merge * tokens]])
    return prompt


@contextmanager
def native_features(model: PreTrainedModel, rows: int) -> Iterator[None]:
    """The unpatched model, whose ``get_video_features`` gives ``rows`` made-up ones at once, whatever it is given."""
    core = find_adapter(model).core(model)
    width = model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, width, generator=generator).to(model.device, model.dtype)
    stacked = FAMILIES[model.config.model_type].stacks_videos

    @functools.wraps(core.get_video_features)
    def get_video_features(*_: Any, **__: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=features[None] if stacked else (features,))  # type: ignore[arg-type]

    with _replaced(core, "get_video_features", get_video_features):
        yield


class _FirstToken(LogitsProcessor):
    """Notes when the first new token's logits are there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seen: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.seen is None:
            wait_for(self.device)
            self.seen = time.perf_counter()
        return scores


def _timed_method(owner: Any, name: str, spans: Recorder, span: str) -> AbstractContextManager[None]:
    original = getattr(owner, name)

    @functools.wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with spans.span(span):
            return original(*args, **kwargs)

    return _replaced(owner, name, timed)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    undo = Undo()
    undo.set(owner, name, value)
    try:
        yield
    finally:
        undo.revert()


@contextmanager
def _timed_modules(begin: nn.Module, end: nn.Module, spans: Recorder, name: str, first: _FirstToken) -> Iterator[None]:
    """Time from the input of one module to the output of another, up to the first token."""
    running: list[AbstractContextManager[None]] = []

    def start(*_: Any) -> None:
        if first.seen is None:
            running.append(spans.span(name))
            running[-1].__enter__()

    def stop(*_: Any) -> None:
        if running:
            running.pop().__exit__(None, None, None)

    hooks = (begin.register_forward_pre_hook(start), end.register_forward_hook(stop))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
