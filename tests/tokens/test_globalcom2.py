"""GlobalCom2: the authors' vectors, and views of one picture."""

from __future__ import annotations

import torch
from torch import Tensor

from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens.budgets import group_sums
from spatiotoken.tokens.globalcom2 import (
    GlobalCom2,
    globalcom2_count,
    globalcom2_guide,
    globalcom2_quotas,
    globalcom2_scales,
    globalcom2_scores,
)
from spatiotoken.tokens.views import tile_of_joined, tile_of_whole
from tests.vectors import cases

SIDE = (12, 12)


def in_tiles(values: Tensor, tile: Tensor, tiles: int) -> Tensor:
    """``[tiles, n]`` values of a joined picture, tile by tile, each in order of place."""
    return torch.stack([values[tile == index] for index in range(tiles)])


def test_authors_results() -> None:
    for hyper, tensors in cases("GlobalCom2"):
        columns, rows = hyper["grid"]
        base, crops = tensors["in.base_attn"], tensors["in.crop_attn"]
        tiles, places = crops.shape
        grid = (rows * SIDE[0], columns * SIDE[1])
        tile = tile_of_joined(grid, (rows, columns), SIDE)
        sizes = torch.full((tiles,), places)
        sums = group_sums(base.double(), tile_of_whole(SIDE, grid, tile), tiles)
        scales = globalcom2_scales(sums, sizes, hyper["base_scale"], hyper["temperature"])
        torch.testing.assert_close(scales.float(), tensors["out.scales"], atol=1e-6, rtol=0)
        quotas = globalcom2_quotas(scales, sizes)
        assert torch.equal(quotas.int(), tensors["out.n_kept"])
        guide = globalcom2_guide(base, SIDE, grid)
        torch.testing.assert_close(in_tiles(guide, tile, tiles), tensors["out.global_scores"], atol=2e-4, rtol=0)

        local = torch.empty(tiles * places)
        for index in range(tiles):
            local[tile == index] = crops[index]
        scores = in_tiles(globalcom2_scores(local, guide, tile, tiles), tile, tiles)
        best = scores.argsort(dim=1, descending=True, stable=True)
        expected = tensors["out.kept_unsorted"].split(quotas.tolist())
        for row, kept in zip(best, expected, strict=True):
            assert torch.equal(row[: kept.shape[0]].int(), kept)

        method = GlobalCom2(retention=hyper["base_scale"], temperature=hyper["temperature"])
        whole = VideoFeatures(torch.randn(places, 4), (1, *SIDE), saliency=base[None])
        picture = VideoFeatures(torch.randn(tiles * places, 4), (1, *grid), saliency=local[None], tiles=(rows, columns))
        first, second = method.reduce_views([whole, picture])
        assert torch.equal(first.source, base.argsort(descending=True)[: int(places * 0.25)].sort().values)
        mask = torch.zeros(tiles * places, dtype=torch.bool).index_fill_(0, second.source, True)
        for row, kept in zip(in_tiles(mask, tile, tiles), expected, strict=True):
            assert torch.equal(row.nonzero()[:, 0].int(), kept.sort().values)


def test_scales() -> None:
    sizes = torch.tensor([10, 10, 10])
    even = globalcom2_scales(torch.full((3,), 2.0, dtype=torch.float64), sizes, 0.3, 10.0)
    torch.testing.assert_close(even, torch.full((3,), 0.3, dtype=torch.float64))
    assert globalcom2_quotas(even, sizes).tolist() == [3, 3, 3]
    steep = globalcom2_scales(torch.tensor([9.0, 0.0, 0.0], dtype=torch.float64), sizes, 0.6, 0.1)
    torch.testing.assert_close(steep, torch.tensor([1.0, 0.4, 0.4], dtype=torch.float64))
    # Tiles of unequal sizes keep, together, no more than their share.
    unequal = torch.tensor([4, 20, 4])
    scales = globalcom2_scales(torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64), unequal, 0.5, 1.0)
    torch.testing.assert_close((scales * unequal).sum(), torch.tensor(14.0, dtype=torch.float64))
    assert scales[1] > 0.5 > scales[0]


def test_padded_tiles() -> None:
    """Three tiles of 4 x 4 in a row, of whose 12 columns 2 at either end were cut off."""
    whole = VideoFeatures(torch.randn(16, 3), (1, 4, 4), saliency=torch.rand(1, 16))
    picture = VideoFeatures(torch.randn(32, 3), (1, 4, 8), saliency=torch.rand(1, 32), tiles=(1, 3))
    first, second = GlobalCom2(retention=0.5, temperature=1e12).reduce_views([whole, picture])
    assert first.source.shape == (8,)
    column = second.source % 8
    assert [int(part.sum()) for part in (column < 2, (column >= 2) & (column < 6), column >= 6)] == [4, 8, 4]


def test_either_view_keeps_a_token() -> None:
    pair = [
        VideoFeatures(torch.randn(16, 3), (1, 4, 4), saliency=torch.rand(1, 16)),
        VideoFeatures(torch.randn(64, 3), (1, 8, 8), saliency=torch.rand(1, 64), tiles=(2, 2)),
    ]
    assert [reduced.source.shape for reduced in GlobalCom2(retention=0.001).reduce_views(pair)] == [(1,), (1,)]
    everything = GlobalCom2(retention=1.0).reduce_views(pair)
    assert all(reduced.embeddings is view.embeddings for reduced, view in zip(everything, pair, strict=True))


def test_frames_take_the_part_of_the_tiles() -> None:
    saliency = torch.tensor([[0.0, 1.0, 2.0, 3.0, 9.0, 0.0, 8.0, 7.0]])
    clip = VideoFeatures(torch.randn(8, 3), (2, 2, 2), saliency=saliency)
    assert globalcom2_count(8, 0.5) == 4
    assert GlobalCom2(retention=0.5, temperature=1e6).reduce(clip).source.tolist() == [2, 3, 4, 6]
    assert GlobalCom2(retention=0.5, temperature=0.1).reduce(clip).source.tolist() == [3, 4, 6, 7]
