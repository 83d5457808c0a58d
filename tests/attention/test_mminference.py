"""Grid heads over permuted videos, and patterns that are cut at modality borders."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spatiotoken.attention import PrefillInputs
from spatiotoken.attention.grid_heads import (
    Span,
    equal_candidates,
    grid_segments,
    modality_spans,
    recovered,
    text_key_blocks,
)
from spatiotoken.attention.head_patterns import seen_by
from spatiotoken.attention.minference import MInference
from spatiotoken.attention.mminference import MMInference
from tests.attention import attention_map, prefill_inputs, video_inputs

SMALL = {"sink": 1, "local": 1, "last_queries": 8, "block": 4, "backend": "gather"}
TEXT = -torch.ones(1, 4, dtype=torch.int64)


def grid_places(frames: int, height: int, width: int, number: int = 0) -> Tensor:
    axes = [torch.arange(side) for side in (frames, height, width)]
    return torch.nn.functional.pad(torch.cartesian_prod(*axes), (1, 0), value=number)


def inputs_at(places: Tensor, **kinds: int) -> PrefillInputs:
    return replace(prefill_inputs(len(places), **kinds), coordinates=places)


def with_newlines(frames: int, height: int, width: int) -> Tensor:
    """Text, a video with a newline after each line and after the whole, text."""
    lines = grid_places(frames, height, width).split(width)
    return torch.cat([TEXT.expand(5, 4), *(x for line in lines for x in (line, TEXT)), TEXT, TEXT.expand(6, 4)])


def check_map(method: MMInference, inputs: PrefillInputs) -> Tensor:
    """Weights of each query are whole and causal, it sees itself, and every query is in one part."""
    weights = attention_map(method, inputs)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:2]), atol=1e-4, rtol=0)
    assert not weights.triu(1).any() and (weights.diagonal(dim1=1, dim2=2) > 0).all()
    rows = [part.rows for part in method.parts(inputs)]
    every = torch.cat([row.expand(len(weights), -1) for row in rows if row is not None], dim=1).sort(dim=1).values
    assert torch.equal(every, torch.arange(inputs.length).expand(len(weights), -1))
    return weights


def test_spans() -> None:
    video, picture = grid_places(3, 2, 2), grid_places(1, 2, 3, 1)
    assert modality_spans(torch.cat([TEXT, TEXT, video, picture, TEXT])) == [
        Span(0, 2, 0),
        Span(2, 14, 3),
        Span(14, 20, 1),
        Span(20, 21, 0),
    ]
    assert modality_spans(video) == [Span(0, 12, 3)]
    assert modality_spans(TEXT.expand(7, 4)) == [Span(0, 7, 0)]
    assert modality_spans(torch.cat([video[:5], TEXT, TEXT, video[5:], TEXT])) == [Span(0, 14, 3), Span(14, 15, 0)]


def test_segments_are_places() -> None:
    places = grid_places(8, 2, 3)
    segment = grid_segments(places, 0, 8)
    assert torch.equal(segment, places[:, 2] * 3 + places[:, 3])
    # Text among them goes along with what is before it.
    mixed = torch.cat([places[:4], TEXT, places[4:]])
    size = grid_segments(mixed, 0, 49)
    assert not size.any() and grid_segments(mixed, 0, 9).tolist()[:5] == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("before", [0, 4, 8])
def test_grid_heads_see_their_place(before: int) -> None:
    """The block divides the frames and the text before, so nothing is rounded."""
    inputs = video_inputs((8, 2, 3), before=before, after=7, heads=2)
    places = inputs.needed("coordinates")
    weights = check_map(MMInference(heads=(("grid", "grid"),), density=0.01, **SMALL), inputs)
    stop = before + 48
    position = torch.arange(stop + 7)
    same = (places[:, None, 2:] == places[:, 2:]).all(dim=-1)
    expected = ((position < before) | same | (position >= stop)[:, None]) & (position <= position[:, None])
    assert torch.equal(weights > 0, expected.expand(2, -1, -1))


@pytest.mark.parametrize("block", [1, 3, 4, 16])
@pytest.mark.parametrize("before", [0, 1, 5])
def test_grid_heads_at_any_border(before: int, block: int) -> None:
    inputs = video_inputs((5, 3, 3), before=before, after=3, heads=2)
    method = MMInference(heads=(("grid", "vertical_slash:3:2"),), density=0.3, **{**SMALL, "block": block})
    weights = check_map(method, inputs)
    assert (weights[0, :, :before] > 0).sum() == (inputs.length - before) * before + before * (before + 1) // 2
    size = block * -(-max(5, 0.3 * (before % block + 45)) // block)
    segment = grid_segments(inputs.needed("coordinates")[before : before + 45], before % block, int(size))
    visual = weights[0, before : before + 45, before : before + 45] > 0
    assert torch.equal(visual, (segment[:, None] == segment).tril())


def test_newlines_in_and_after_a_video() -> None:
    places = with_newlines(6, 3, 4)
    inputs = inputs_at(places, heads=2, kv_heads=1)
    stop = 5 + 6 * 3 * 5 - 1
    assert modality_spans(places) == [Span(0, 5, 0), Span(5, stop, 6), Span(stop, len(places), 0)]
    for heads in ((), (("grid", "grid"),), (("a_shape:2:8", "vertical_slash:6:6"),)):
        weights = check_map(MMInference(heads=heads, density=0.1, **SMALL), inputs)
        assert ((weights[:, stop:] > 0).sum(dim=-1) == torch.arange(stop + 1, len(places) + 1)).all()
        assert (weights[:, 5:, :5] > 0).all()


def test_several_grids() -> None:
    text = TEXT.expand(3, 4)
    places = torch.cat([text, grid_places(1, 4, 5), text, grid_places(4, 3, 3, 1), grid_places(1, 4, 4, 2), text])
    inputs = inputs_at(places, heads=4, kv_heads=2)
    method = MMInference(heads=(("grid", "a_shape:1:4", "vertical_slash:3:2", "block_sparse:1"),), **SMALL)
    weights = check_map(method, inputs)
    # A grid head sees all that precedes a grid, and the others all text that does.
    assert (weights[0, 62:78, :62] > 0).all()
    assert (weights[:, 62:78][..., (places[:62, 0] < 0).nonzero()[:, 0]] > 0).all()
    assert not (weights[1:, 62:78, 8:16] > 0).all()


def test_without_pictures_it_is_vertical_slash() -> None:
    inputs = prefill_inputs(60)
    for heads in ((), (("grid",) * 4,)):
        method = MMInference(heads=heads, vertical=5, slash=4, **SMALL)
        same = MInference(vertical=5, slash=4, **SMALL)
        found, expected = method.attend(inputs), same.attend(inputs)
        assert found.output is not None and expected.output is not None
        assert torch.equal(found.output, expected.output) and found.density == expected.density


def planted() -> PrefillInputs:
    """Three heads: one looks at its place in all frames, one at the latest keys, one at two columns."""
    frames, height, width = 16, 4, 4
    places = torch.cat([TEXT.expand(4, 4), grid_places(frames, height, width), TEXT.expand(5, 4)])
    length = len(places)
    query, key = torch.zeros(3, length, 300), torch.zeros(3, length, 300)
    cell = (places[:, 2] * width + places[:, 3]).clamp(min=0)
    query[0].scatter_(1, cell[:, None], 30)
    key[0].scatter_(1, cell[:, None], 1)
    row = torch.arange(length)
    key[1, row, row] = 1
    for back in range(4):
        query[1, row[back:], row[back:] - back] = 30
    key[2, row, row] = 1
    query[2, 60:, 30] = query[2, 150:, 120] = 30
    value = torch.randn(query.shape, generator=torch.Generator().manual_seed(0))
    return PrefillInputs(query, key, value, 1.0, coordinates=places)


def test_each_head_takes_what_recovers_most() -> None:
    inputs = planted()
    method = MMInference(density=0.07, **{**SMALL, "last_queries": 12})
    spans = modality_spans(inputs.needed("coordinates"))
    known = replace(inputs, **{name: getattr(inputs, name)[:, : spans[1].stop] for name in ("query", "key", "value")})
    segment = grid_segments(inputs.needed("coordinates")[4:260], 0, 20)
    is_grid, other = method._kinds(known, spans[1], segment)
    assert is_grid.tolist() == [True, False, False]
    assert other.columns is not None and not (other.columns[0, 1] >= 0).any()
    assert {30, 120} <= set(other.columns[0, 2].tolist())
    attended = method.attend(inputs)
    assert attended.output is not None and attended.density < 0.3
    dense = torch.nn.functional.scaled_dot_product_attention(
        inputs.query, inputs.key, inputs.value, is_causal=True, scale=1.0
    )
    torch.testing.assert_close(attended.output[1], dense[1], atol=1e-3, rtol=0)


def test_candidates_are_about_equal() -> None:
    inputs = prefill_inputs(400, heads=4, kv_heads=2, dim=8)
    candidates = equal_candidates(inputs, 0.2, sink=1, local=9, last_queries=16, block=8)
    latest = torch.arange(384, 400)
    for one in candidates:
        share = seen_by(one, latest, 400).sum(dim=(1, 2)) / (latest + 1).sum()
        assert (share > 0.15).all() and (share < 0.25).all()
    causal = (torch.arange(400) <= latest[:, None])[None]
    mass = recovered(inputs, 16, [causal, ~causal])
    torch.testing.assert_close(mass, torch.tensor([[16.0], [0.0]]).expand(2, 4))


def test_text_blocks() -> None:
    places = torch.cat([TEXT, grid_places(1, 3, 3), TEXT])
    assert text_key_blocks(places, 14, 4).tolist() == [True, False, True, False]
    assert text_key_blocks(places[:0], 5, 4).tolist() == [False, False]


def test_dense_where_all_is_computed() -> None:
    inputs = video_inputs()
    assert MMInference(density=1.0).is_dense(10**6, 0, 1)
    assert MMInference(density=1.0, heads=(("grid",) * 4,), **SMALL).attend(inputs).output is None
    with pytest.raises(ValueError, match="heads describes 2 layers, the model has 1"):
        MMInference(heads=(("grid",) * 4,) * 2).attend(inputs)
    with pytest.raises(ValueError, match="heads describes 3 heads at layer 0, the model has 4"):
        MMInference(heads=(("grid",) * 3,)).attend(inputs)
    with pytest.raises(ValueError, match="block_sparse:<blocks>, grid"):
        MMInference(heads=(("grid:4",),))


@pytest.mark.parametrize(
    ("grid", "before", "after"), [((1, 1, 1), 0, 0), ((1, 1, 1), 1, 1), ((2, 1, 1), 0, 3), ((3, 5, 1), 2, 0)]
)
def test_small_prompts(grid: tuple[int, int, int], before: int, after: int) -> None:
    inputs = video_inputs(grid, before=before, after=after, heads=2)
    # All keys alike, and so large that half precision would overflow.
    inputs = replace(inputs, key=torch.full_like(inputs.key, 300).half(), query=(inputs.query * 300).half())
    parts = MMInference(**SMALL).parts(replace(inputs, value=inputs.value.half()))
    assert sum(part.query.shape[1] for part in parts) == inputs.length
    for part in parts:
        size = part.pattern.blocks.shape[-1]
        assert size == -(-part.key.shape[1] // 4)
        assert part.pattern.blocks[..., range(size), range(size)][..., -1].all()
