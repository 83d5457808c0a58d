"""Random integers that depend on nothing but their address.

A draw is a hash of (seed, sample, name, position). So a sample is the same in any batch, order, process, Python and
torch version, and on any device: the arithmetic is on integers alone, and no generator has a state to share.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of SplitMix64
_WORD = 1 << 64


def _signed(value: int) -> int:
    """The 64-bit integer with the same bits, for torch has no unsigned arithmetic."""
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch's shift copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mixed(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: neighbouring int64 values become unrelated ones. Overflow wraps around."""
    x = (x ^ _shifted(x, 30)) * _signed(_FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(_SECOND)
    return x ^ _shifted(x, 31)


class Draws:
    """Draws for a batch of samples.

    Args:
        seed: of the whole set.
        samples: ``[B]`` int64 numbers of the samples; the draws are made on their device.
    """

    def __init__(self, seed: int, samples: Tensor) -> None:
        self._seed = seed
        self._samples = samples

    def hashes(self, name: str, *shape: int) -> Tensor:
        """``[B, *shape]`` int64, uniform over all of them."""
        digest = hashlib.blake2b(f"{self._seed} {name}".encode(), digest_size=8).digest()
        key = mixed(self._samples * _signed(_GOLDEN) + int.from_bytes(digest, "little", signed=True))
        size = 1
        for side in shape:
            size *= side
        positions = torch.arange(1, size + 1, device=key.device) * _signed(_GOLDEN)
        return mixed(key[:, None] + positions).view(-1, *shape)

    def integers(self, name: str, low: int | Tensor, high: int | Tensor, *shape: int) -> Tensor:
        """``[B, *shape]`` int64 in ``[low, high)``; the bounds may be tensors that broadcast to that shape."""
        return low + ((_shifted(self.hashes(name, *shape), 32) * (high - low)) >> 32)

    def chance(self, name: str, percent: int, *shape: int) -> Tensor:
        """``[B, *shape]`` bool, true with that probability."""
        return self.integers(name, 0, 100, *shape) < percent

    def permutations(self, name: str, length: int) -> Tensor:
        """``[B, length]``: an order of ``range(length)`` for each sample."""
        return self.hashes(name, length).argsort(dim=1, stable=True)
