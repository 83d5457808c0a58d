"""A guard for kernels that have no backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[..., Tensor]


def forward_only(name: str) -> Callable[[Kernel], Kernel]:
    """Makes ``kernel(query, key, value, pattern, **options)`` refuse to be differentiated, instead of cutting its
    output off from its inputs, which would make gradients wrong without a word."""

    def guarded(kernel: Kernel) -> Kernel:
        @functools.wraps(kernel)
        def run(query: Tensor, key: Tensor, value: Tensor, pattern: Any, **options: Any) -> Tensor:
            attended: Tensor = _ForwardOnly.apply(
                query, key, value, functools.partial(kernel, **options), pattern, name
            )
            return attended

        return run

    return guarded


class _ForwardOnly(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, pattern: Any, name: str
    ) -> Tensor:
        context.name = name
        return kernel(query.detach(), key.detach(), value.detach(), pattern)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(f"the {context.name} backend has no backward pass; take 'reference' for gradients")
