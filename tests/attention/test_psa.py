"""Blocks pooled by how little they matter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from spatiotoken.attention import PrefillInputs
from spatiotoken.attention.blocks import per_head
from spatiotoken.attention.psa import PSA, block_levels, largest_levels, text_blocks
from spatiotoken.attention.xattention import antidiagonal_mass
from tests.attention import attention_map, prefill_inputs, video_inputs
from tests.vectors import cases

SMALL: dict[str, Any] = {
    "levels": (1, 2, 4),
    "shares": (0.1, 0.3, 0.6),
    "similarity": (-1, -1),
    "stride": 2,
    "block": 4,
    "backend": "reference",
}


def levels_of(method: PSA, inputs: PrefillInputs) -> Tensor:
    mass = antidiagonal_mass(inputs.query, inputs.key, inputs.scale, method.stride, method.block)
    text = text_blocks(inputs.needed("coordinates"), method.block)
    return block_levels(mass, method.levels, method.shares, method.by, text)


def expected_map(method: PSA, inputs: PrefillInputs, level: Tensor) -> Tensor:
    """``[heads, L, L]`` weights: a pooled key's own is spread evenly over its tokens."""
    length, block = inputs.length, method.block
    key = per_head(inputs.key, inputs.groups).double()
    found = torch.zeros(len(inputs.query), length, length, dtype=torch.float64)
    for head, rows in enumerate(level.tolist()):
        for query in range(length):
            weight = torch.zeros(length, dtype=torch.float64)
            for number, size in enumerate(rows[query // block][: query // block + 1]):
                for first in range(number * block, min((number + 1) * block, query + 1), size or block):
                    if size:
                        mean = key[head, first : first + size].mean(dim=0)
                        weight[first : first + size] = (inputs.query[head, query].double() @ mean * inputs.scale).exp()
            found[head, query] = weight / weight.sum()
    return found


def test_levels_of_the_authors() -> None:
    for hyper, tensors in cases("PSA"):
        mass, expected = tensors["in.block_importance"][0], tensors["out.level"][0].long()
        ends = {int(level): bounds[1] for level, bounds in hyper["mask_ratios"].items() if level != "0"}
        by = {"topk": "rank", "energybound": "mass"}[hyper["mode"]]
        text = torch.arange(24) >= 24 - -(-hyper["text_length"] // 128)
        found = block_levels(mass, list(ends), list(ends.values()), by, text)
        assert torch.equal(found, expected) and set(found.unique().tolist()) == {0, 1, 2, 4, 8}


def test_levels_by_hand() -> None:
    mass = torch.zeros(1, 6, 6)
    mass[0, 5] = torch.tensor([0.0, 0.4, 0.05, 0.3, 0.15, 0.1])
    none = torch.zeros(6, dtype=torch.bool)
    assert block_levels(mass, (1, 2, 4), (0.2, 0.4, 0.7), "rank", none)[0, 5].tolist() == [1, 1, 0, 2, 4, 1]
    assert block_levels(mass, (1, 2, 4), (0.5, 0.8, 0.9), "mass", none)[0, 5].tolist() == [1, 1, 0, 2, 4, 1]
    # The heaviest block ends beyond the last share, so it is left out, as the authors' code has it.
    assert block_levels(mass, (1, 2), (0.2, 0.3), "mass", none)[0, 5].tolist() == [1, 0, 0, 0, 0, 1]
    text = torch.arange(6) == 4
    level = block_levels(mass, (1,), (0.0,), "rank", text)[0]
    assert level[4].tolist() == [1, 1, 1, 1, 1, 0] and level[5].tolist() == [1, 0, 0, 0, 1, 1]


def test_key_similarity_caps_the_level() -> None:
    one, other = torch.eye(4)[:2]
    blocks = [
        [one] * 8,  # alike throughout
        [one, one, other, other] * 2,  # within pairs only
        [one, other] * 4,  # neighbours differ
        [one, other, other, one] * 2,  # first and last of four
    ]
    key = torch.stack([row for block in blocks for row in block])[None]
    assert largest_levels(key, 8, (2, 4, 8), (0.75, 0.7, 0.7)).tolist() == [[8, 2, 1, 8]]
    assert largest_levels(key, 8, (2, 4), (0.75, 0.7)).tolist() == [[4, 2, 1, 4]]
    assert largest_levels(key, 8, (2,), (1.0,)).tolist() == [[1, 1, 1, 1]]


def test_text_blocks() -> None:
    def found(grids: list[int]) -> list[bool]:
        return text_blocks(torch.tensor(grids)[:, None].expand(-1, 4), 2).tolist()

    assert found([-1, -1, -1, 0, 0, 0, -1, 0, 0, -1]) == [True, True, False, False, True]
    assert found([0, 0, -1, -1, 1, 1, 1]) == [False, True, False, False]
    assert found([0, 0, 1, 1]) == [False, False]
    assert found([-1]) == [True]


@pytest.mark.parametrize("grid", [(5, 3, 3), (7, 3, 3)])
@pytest.mark.parametrize("by", ["rank", "mass"])
def test_weights(grid: tuple[int, int, int], by: str) -> None:
    inputs = video_inputs(grid, before=2, after=3, dim=8)
    method = PSA.model_validate(SMALL | {"by": by})
    level = levels_of(method, inputs)
    assert set(level.unique().tolist()) == {0, 1, 2, 4}
    expected = expected_map(method, inputs, level)
    found = attention_map(method, inputs)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(4, inputs.length))
    assert not found.triu(1).any()

    # A pooled block costs that much less.
    attended = method.attend(inputs)
    earlier = level.tril(-1)
    keys = (4 / earlier.clamp(min=1)).where(earlier > 0, 0).sum(dim=-1).mean(dim=0).tolist()
    sizes = [min(4, inputs.length - start) for start in range(0, inputs.length, 4)]
    pairs = sum(size * count + size * (size + 1) / 2 for count, size in zip(keys, sizes, strict=True))
    causal = inputs.length * (inputs.length + 1) / 2
    assert attended.density == pytest.approx(pairs / causal) and attended.density < 0.75


def test_finds_what_is_heavy() -> None:
    """One heavy key in a long video: its block is computed as it is, the others are pooled or left out."""
    inputs = video_inputs((10, 2, 4), before=4, after=0, heads=2, dim=8)
    key, query = torch.zeros_like(inputs.key), torch.zeros_like(inputs.query)
    query[..., 0] = 1
    key[:, 42, 0] = 40
    inputs = replace(inputs, query=query, key=key)
    level = levels_of(PSA.model_validate(SMALL), inputs)
    assert (level[:, 11:, 10] == 1).all()
    assert [(row[1:20] == 1).nonzero()[:, 0].tolist() for row in level[:, 20]] == [[9], [9]]
    assert (level[:, 20, 1:20] > 1).any() and (level[:, 20, 1:20] == 0).any()
    assert attention_map(PSA.model_validate(SMALL), inputs)[:, 60, 42].min() > 0.99


def test_edges() -> None:
    method = PSA.model_validate(SMALL)
    assert PSA().is_dense(256, 0, 1) and not PSA().is_dense(257, 0, 1)
    assert PSA(shares=(1, 1, 1, 1)).is_dense(10**6, 0, 1)
    assert method.attend(video_inputs((1, 1, 1), before=0, after=0)).output is None
    assert method.attend(prefill_inputs(60)).output is None  # text alone
    with pytest.raises(ValueError, match="coordinates"):
        method.attend(replace(prefill_inputs(60), coordinates=None))

    same = video_inputs()
    same = replace(same, key=torch.ones_like(same.key))
    attended = method.attend(same)
    assert attended.output is not None and attended.density < 0.75
    torch.testing.assert_close(
        attention_map(method, same).double(), expected_map(method, same, levels_of(method, same)), atol=1e-5, rtol=1e-4
    )
    half = video_inputs()
    half = replace(half, query=half.query.half() * 200, key=half.key.half() * 200, value=half.value.half())
    output = method.attend(half).output
    assert output is not None and output.isfinite().all() and output.dtype == torch.float16


@pytest.mark.parametrize(
    "settings",
    [
        {"levels": (2, 4, 8, 16)},
        {"levels": (1, 2, 3, 6)},
        {"levels": (1, 1, 2, 4)},
        {"levels": (1, 2, 4, 256)},
        {"levels": (1, 2, 4, 0)},
        {"levels": (1, 2)},
        {"shares": (0.5, 0.4, 0.6, 0.7)},
        {"shares": (0.5, 0.6, 0.7, 1.1)},
        {"similarity": (0.5, 0.5, 2)},
        {"block": 136},
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PSA.model_validate(settings)
