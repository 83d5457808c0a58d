"""TS-LLaVA's frames and thumbnail: the authors' picture, and what can be seen at a glance."""

from __future__ import annotations

import pytest
import torch

from spatiotoken.config import presets
from spatiotoken.frames.ts_llava import TSLlava, linspace_indices, thumbnail, thumbnail_grid
from spatiotoken.structures import Frames
from tests.vectors import cases


def test_authors_thumbnail() -> None:
    for hyper, tensors in cases("TS-LLaVA"):
        frames = tensors["in.frames"].float()
        chosen = linspace_indices(frames.shape[0], hyper["num_thumb"])
        picture = thumbnail(frames[chosen], tuple(hyper["thumb"]))
        torch.testing.assert_close(picture, tensors["out.thumbnail"], rtol=0, atol=1e-6)
        selector = TSLlava(num_frames=hyper["num_thumb"])
        assert list(selector.select(Frames(torch.arange(float(frames.shape[0])))).indices) == chosen.tolist()


def test_ends_belong_and_halves_go_to_even() -> None:
    assert linspace_indices(10, 7).tolist() == [0, 2, 3, 4, 6, 8, 9]  # steps of 1.5: 1.5, 4.5 and 7.5 lie between two
    assert linspace_indices(9, 3).tolist() == [0, 4, 8]
    assert linspace_indices(9, 1).tolist() == [0]
    assert linspace_indices(4, 4).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="5 of 4"):
        linspace_indices(4, 5)


@pytest.mark.parametrize(("total", "count"), [(28800, 28784), (3469, 3468), (3917, 3916)])
def test_no_index_twice(total: int, count: int) -> None:
    """The authors' rounding repeats an index here."""
    theirs = torch.linspace(0, total - 1, steps=count).round().long()
    ours = linspace_indices(total, count)
    assert bool((ours.diff() >= 1).all()) and ours[0] == 0 and ours[-1] == total - 1
    assert int((ours - theirs).abs().max()) <= 1


def test_no_index_twice_where_float32_ends() -> None:
    total = 2**25 + 3
    assert linspace_indices(total, 5).tolist()[-1] <= total - 1
    near = linspace_indices(total, total // 8)
    assert bool((near.diff() >= 1).all()) and 0 <= near[0] and near[-1] < total


def test_grids_have_no_more_columns_than_rows() -> None:
    assert [thumbnail_grid(count) for count in (1, 2, 4, 5, 6, 8, 9, 12)] == [
        (1, 1),
        (2, 1),
        (2, 2),
        (5, 1),
        (3, 2),
        (4, 2),
        (3, 3),
        (4, 3),
    ]


def test_frames_lie_row_by_row() -> None:
    frames = torch.stack([torch.full((3, 6, 8), value) for value in range(0, 240, 40)]).to(torch.uint8)
    picture = thumbnail(frames, (6, 8))
    assert picture.dtype == torch.uint8 and picture.shape == (3, 6, 8)
    assert picture[0, ::2, ::4].tolist() == [[0, 40], [80, 120], [160, 200]]
    assert torch.equal(picture[0], picture[0, ::2, ::4].repeat_interleave(2, 0).repeat_interleave(4, 1))


def test_areas_are_averaged_and_rounded() -> None:
    frame = torch.tensor([[0, 1, 10, 20], [0, 1, 30, 40]], dtype=torch.uint8).expand(1, 3, 2, 4)
    assert thumbnail(frame, (1, 2))[0].tolist() == [[0, 25]]
    assert thumbnail(frame.half(), (1, 2))[0].tolist() == [[0.5, 25.0]]
    assert torch.equal(thumbnail(frame, (2, 4)), frame[0])
    larger = thumbnail(frame, (4, 8))
    assert larger.shape == (3, 4, 8) and int(larger.max()) == 40 and int(larger.min()) == 0


@pytest.mark.parametrize("side", [(7, 9), (5, 3), (3, 2)])
def test_any_side_is_filled(side: tuple[int, int]) -> None:
    picture = thumbnail(torch.full((6, 3, 10, 10), 77, dtype=torch.uint8), side)
    assert picture.shape == (3, *side) and bool((picture == 77).all())


def test_impossible_thumbnails() -> None:
    frames = torch.zeros(6, 3, 4, 4)
    with pytest.raises(ValueError, match="2x4 pixels has no room for 3x2"):
        thumbnail(frames, (2, 4))
    with pytest.raises(ValueError, match="K >= 1"):
        thumbnail(frames[:0], (4, 4))


def test_selection() -> None:
    assert TSLlava().num_frames == 50
    assert TSLlava(num_frames=3).select(Frames(torch.tensor([0.0, 1.0, 7.0, 8.0, 90.0]))).indices == (0, 2, 4)
    assert TSLlava(num_frames=1).select(Frames(torch.arange(4.0))).indices == (0,)
    assert TSLlava(num_frames=5).select(Frames(torch.arange(4.0))).indices == (0, 1, 2, 3)


def test_preset_names_both_stages() -> None:
    methods = presets()["ts_llava"].methods()
    assert [method.name for method in methods.values()] == ["ts_llava", "ts_llava_tokens"]
