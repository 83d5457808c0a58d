"""Devices that are not there: tensors that say they are on a GPU, computed on the CPU, with a GPU's rules.

Whatever mixes devices in a way that a GPU would refuse raises here, and code for GPUs takes its own branches, so tests
on a CPU find what would else be found by the first user with a GPU. What a GPU computes, and how fast, nothing here
tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CPU = torch.device("cpu")
MOVING = ("aten.copy_.", "aten._to_copy.")
INDEXING = ("aten.index.", "aten.index_put", "aten._index_put_impl_")
# Before these are dispatched they choose a kernel or make tensors on the device, or they change shapes in place.
WHOLE = (
    *("scaled_dot_product_attention", "multi_head_attention_forward", "where", "cosine_similarity", "cdist"),
    *("matmul", "__matmul__", "__rmatmul__", "einsum", "one_hot", "equal"),
)
SHAPED_LIKE = ("new_tensor", "new_zeros", "new_ones", "new_full", "new_empty")


class DeviceError(AssertionError):
    """Tensors on several devices meet, which a GPU would refuse."""


class Pretended(Tensor):
    """A tensor on a pretended device; ``inner`` has its values, on the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Pretended:
        pretended = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
            requires_grad=inner.requires_grad,
        )
        pretended.inner = inner
        return pretended

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.inner!r} on {self.device}"

    def __format__(self, spec: str) -> str:
        return format(self.inner, spec)

    def __deepcopy__(self, memo: Any) -> Pretended:
        return Pretended(self.inner.clone(), self.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = result_device(str(func), args, kwargs)
        asked = kwargs.get("device")
        if asked is not None:
            device, kwargs = torch.device(asked), {**kwargs, "device": CPU}
        result = func(*unwrapped(args), **unwrapped(kwargs))
        written = func._schema.arguments[0].alias_info if args else None
        if written is not None and written.is_write:
            return args[0]
        if "out" in kwargs:
            return kwargs["out"]
        return wrapped(result, device)


def unwrapped(tree: Any) -> Any:
    return tree_map(lambda x: x.inner if isinstance(x, Pretended) else x, tree)


def wrapped(tree: Any, device: torch.device) -> Any:
    if device.type == "cpu":
        return tree
    return tree_map(lambda x: Pretended(x, device) if isinstance(x, Tensor) else x, tree)


def result_device(name: str, args: Any, kwargs: Any) -> torch.device:
    """Where the result of an operation is.

    Raises:
        DeviceError: for operands on several devices; a CPU tensor without dimensions goes with any.
    """
    if name.startswith(MOVING):
        return args[0].device
    if name.startswith(INDEXING):
        indexed, indices, *put = args
        return indexed_device(name, indexed, indices, put[0] if put else None)
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    devices = {tensor.device for tensor in tensors if tensor.ndim or tensor.device != CPU}
    if len(devices) > 1:
        raise DeviceError(_told(name, tensors))
    return devices.pop() if devices else CPU


def indexed_device(name: str, indexed: Tensor, indices: Any, put: Any = None) -> torch.device:
    """The same for ``indexed[indices]``, or for putting ``put`` there: indices and masks may be on the CPU too."""
    picking = [leaf for leaf in tree_flatten(indices)[0] if isinstance(leaf, Tensor) and leaf.ndim]
    putting = [put] if isinstance(put, Tensor) and put.ndim else []
    strange = [index for index in picking if index.device not in (CPU, indexed.device)]
    if strange or any(values.device != indexed.device for values in putting):
        raise DeviceError(_told(name, [indexed, *picking, *putting]))
    return indexed.device


def _told(name: str, tensors: list[Tensor]) -> str:
    return f"{name} of " + ", ".join(f"{list(tensor.shape)} on {tensor.device}" for tensor in tensors)


class Pretending(TorchFunctionMode):
    """Sends what makes tensors on a GPU, or moves them there, to the pretended one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("to", "cuda") and isinstance(args[0], Tensor):
            return self._moved(func, args, kwargs)
        asked = kwargs.get("device")
        if asked is not None and torch.device(asked).type != "cpu":
            result = func(*unwrapped(args), **unwrapped({**kwargs, "device": CPU}))
            return wrapped(result, _indexed(torch.device(asked)))
        if asked is None and name in SHAPED_LIKE and isinstance(args[0], Pretended):
            return wrapped(func(args[0].inner, *unwrapped(args[1:]), **unwrapped(kwargs)), args[0].device)
        if asked is None and name == "as_tensor" and isinstance(args[0], Pretended):
            return self._moved(func, args, kwargs) if len(args) > 1 or kwargs else args[0]
        if name == "tolist" and isinstance(args[0], Pretended):
            return args[0].inner.tolist()
        if name in ("__getitem__", "__setitem__") and isinstance(args[0], Pretended):
            # Numbers and lists among the indices and values are sent to the device before an operation is dispatched.
            by_index = any(isinstance(leaf, Tensor) for leaf in tree_flatten(args[1])[0])
            put = args[2] if name == "__setitem__" and by_index else None  # by slices it is a copy, from anywhere
            device = indexed_device(name, args[0], args[1], put)
            return wrapped(func(*unwrapped(args)), device)
        if name in WHOLE:
            device = result_device(name, args, kwargs)
            return wrapped(func(*unwrapped(args), **unwrapped(kwargs)), device)
        return func(*args, **kwargs)

    def _moved(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensor = args[0]
        if func.__name__ == "cuda":
            device: torch.device | None = torch.device("cuda", 0)
            dtype = None
        elif len(args) > 1 and isinstance(args[1], Tensor):
            device, dtype = args[1].device, args[1].dtype
        else:
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **{k: v for k, v in kwargs.items() if k != "copy"})
        target = tensor.device if device is None else _indexed(device)
        values = tensor.inner if isinstance(tensor, Pretended) else tensor
        moved = values.to(dtype=dtype or values.dtype, copy=kwargs.get("copy", False))
        if moved is values and target == tensor.device:
            return tensor
        if target.type == "cpu":
            return moved.clone() if moved is values else moved
        return Pretended(moved.clone() if moved is values else moved, target)


def _indexed(device: torch.device) -> torch.device:
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


class NoEvent:
    """Stands for `torch.cuda.Event`."""

    def __init__(self, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: NoEvent) -> float:
        return 1.0


@contextmanager
def pretending(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, device_of: Mapping[str, str] | None = None
) -> Iterator[None]:
    """A model's weights say that they are on ``cuda:0``, or where ``device_of`` says by prefixes of their names."""
    # Torch's builds for CUDA ask a driver about the tensors' device; as for fake tensors, there is none to ask.
    torch._C._ensureCUDADeviceGuardSet()
    monkeypatch.setattr(torch.cuda, "Event", NoEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 1)
    placed: list[tuple[dict[str, Any], str, Any]] = []
    known: dict[int, Any] = {}
    try:
        with Pretending():
            for prefix, module in model.named_modules():
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in tensors.items():
                        if tensor is None:
                            continue
                        place = _place(f"{prefix}.{name}", device_of or {})
                        placed.append((tensors, name, tensor))
                        moved = known.setdefault(id(tensor), Pretended(tensor.detach(), place))
                        tensors[name] = nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved
            yield
    finally:
        for tensors, name, tensor in placed:
            tensors[name] = tensor


class MovesInputs(AlignDevicesHook):
    """Accelerate's, for weights that are where they should be."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module


@contextmanager
def spread(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A model as ``device_map`` spreads it: the tower and the later half of the layers on ``cuda:1``, all else on
    ``cuda:0``."""
    names = [name for name, _ in model.named_modules()]
    towers = [name for name in names if name in ("model.visual", "model.vision_tower")]
    stack = next(name for name in names if name.endswith("language_model.layers"))
    layers = [name for name in names if name.removeprefix(f"{stack}.").isdigit()]
    second = [*towers, *layers[len(layers) // 2 :]]
    first = [*layers[: len(layers) // 2], f"{stack.removesuffix('layers')}norm"]
    first += [name for name in names if name.endswith("multi_modal_projector")]
    own_forward = {module for module in model.modules() if "forward" in module.__dict__}
    with pretending(model, monkeypatch, dict.fromkeys(second, "cuda:1")):
        try:
            for device, modules in (("cuda:0", first), ("cuda:1", second)):
                for name in modules:
                    add_hook_to_module(model.get_submodule(name), MovesInputs(torch.device(device)))
            outer = MovesInputs(torch.device("cuda:0"), io_same_device=True, skip_keys=["past_key_values"])
            add_hook_to_module(model, outer)
            yield
        finally:
            remove_hook_from_submodules(model)
            for module in model.modules():
                if module not in own_forward:
                    module.__dict__.pop("forward", None)


def _place(name: str, device_of: Mapping[str, str]) -> torch.device:
    matching = [prefix for prefix in device_of if name.startswith(prefix)]
    return torch.device(device_of[max(matching, key=len)] if matching else "cuda:0")
