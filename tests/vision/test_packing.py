"""Packed rows: attention within chunks, restoring, and means, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spatiotoken.vision.packing import Packing, attend, cut, weighted_mean


def plain_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """``[n, heads, d]`` in float64."""
    logits = torch.einsum("nhd,mhd->hnm", query.double(), key.double()) / math.sqrt(query.shape[-1])
    if bias is not None:
        logits = logits + bias.double()
    return torch.einsum("hnm,mhd->nhd", logits.softmax(-1), value.double())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any), st.booleans(), st.integers(0, 1000))
def test_attention_within_chunks(lengths: list[int], biased: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    query, key, value = torch.randn(3, total, 2, 8, generator=generator)
    bias = torch.rand(total, generator=generator) * 3 if biased else None
    chunks = cut(lengths, None, None, query.device)
    got = attend(query, key, value, chunks, 8**-0.5, bias)
    biases = [None] * len(lengths) if bias is None else bias.split(lengths)
    parts = zip(*(states.split(lengths) for states in (query, key, value)), biases, strict=True)
    wanted = torch.cat([plain_attention(*part) for part in parts])
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 1000))
def test_attention_to_whole_frames(lengths: list[int], seed: int) -> None:
    """Rows that are left attend to all of their frame, each with the states of whatever stands for it."""
    generator = torch.Generator().manual_seed(seed)
    packing = Packing.everything(lengths, None, torch.device("cpu"))
    stays = torch.rand(sum(lengths), generator=generator) < 0.5
    stays[0] = True
    kept = stays.nonzero()[:, 0]
    frame = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    assignment = stays.cumsum(0) - 1  # the latest one that stays, which may be of an earlier frame
    counts = tuple(n for n in frame[kept].bincount().tolist() if n)
    packing = packing.narrowed(kept, assignment, counts)
    query, key, value = torch.randn(3, len(kept), 2, 8, generator=generator)
    got = attend(query, key, value, packing.chunks(windows=False, whole_context=True), 8**-0.5, None)
    for row, origin in enumerate(kept):
        own = assignment[frame == frame[origin]]
        wanted = plain_attention(query[row : row + 1], key[own], value[own], None)[0]
        torch.testing.assert_close(got[row].double(), wanted, atol=1e-5, rtol=1e-5)


def test_windows_that_are_gone() -> None:
    """Chunks of layers with windows, of which one is left empty, and no chunk is made for it."""
    packing = Packing.everything([6, 6], [2, 4, 4, 2], torch.device("cpu"))
    kept = torch.tensor([2, 3, 5, 7, 10])  # 0, 3, 1 and 1 of the windows
    assignment = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 4])
    packing = packing.narrowed(kept, assignment, (3, 2))
    (chunk,) = packing.chunks(windows=True, whole_context=False)
    assert chunk.queries.tolist() == [[0, 1, 2], [3, 5, 5], [4, 5, 5]]
    assert chunk.hidden is not None
    assert chunk.hidden[:, 0, 0].tolist() == [[False] * 3, [False, True, True], [False, True, True]]
    assert packing.sizes.tolist() == [3, 2, 1, 4, 2]
    assert (
        packing.restored(torch.tensor([10, 11, 12, 13, 14])).tolist()
        == [10] * 3 + [11] * 2 + [12] + [13] * 4 + [14] * 2
    )


def test_narrowed_twice_is_narrowed_once() -> None:
    packing = Packing.everything([4, 4], None, torch.device("cpu"))
    packing = packing.narrowed(torch.tensor([0, 2, 4, 6]), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), (2, 2))
    packing = packing.narrowed(torch.tensor([1, 2]), torch.tensor([0, 0, 1, 1]), (1, 1))
    assert packing.origin.tolist() == [2, 4]
    assert packing.owner.tolist() == [0] * 4 + [1] * 4
    assert packing.sizes.tolist() == [4, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weighted_mean(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 5, generator=generator).to(dtype)
    weights = torch.tensor([1.0, 3, 0, 2, 7, 1, 1])
    assignment = torch.tensor([0, 1, 0, 1, 2, 0, 1])
    mean = weighted_mean(values, weights, assignment, 3)
    assert mean.dtype == dtype
    assert torch.equal(mean[2], values[4]), "a single member stays exactly as it is"
    for survivor in range(3):
        own = assignment == survivor
        wanted = (values[own].double() * weights[own, None]).sum(0) / weights[own].sum()
        torch.testing.assert_close(mean[survivor], wanted.to(dtype))
