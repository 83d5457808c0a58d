"""HiRED: the authors' vectors, their flat split and the one in two directions, and views of one picture."""

from __future__ import annotations

import torch
from torch import Tensor

from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens.budgets import top_of_groups
from spatiotoken.tokens.hired import HiRED, hired_budgets, hired_count, hired_hits, hired_quotas
from spatiotoken.tokens.merging import top_indices
from tests.vectors import cases


def joined(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """``[S, tiles, side * side]`` values as those of one picture, ``[S, N]``."""
    side = int(tiles.shape[-1] ** 0.5)
    return tiles.unflatten(-1, (side, side)).unflatten(1, (rows, columns)).transpose(2, 3).flatten(1)


def views(early: Tensor, late: Tensor, rows: int, columns: int) -> list[VideoFeatures]:
    """A picture as the authors' vectors have it, ``[1 + tiles, side * side]`` attention, with its places as tokens."""
    saliency, side = torch.stack([early, late]), int(early.shape[-1] ** 0.5)
    return [
        VideoFeatures(torch.arange(values.shape[1])[:, None].float(), grid, saliency=values, tiles=tiles)
        for values, grid, tiles in (
            (saliency[:, 0], (1, side, side), (1, 1)),
            (joined(saliency[:, 1:], rows, columns), (1, rows * side, columns * side), (rows, columns)),
        )
    ]


def test_authors_results() -> None:
    for hyper, tensors in cases("HiRED"):
        early, late = tensors["in.top_cls"].sum(1), tensors["in.bottom_cls"].sum(1)
        partitions, places = early.shape
        tiles = partitions - 1
        first, rest = hired_budgets(places, tiles * places, hyper["token_budget_rate"], hyper["alpha"])
        flat = torch.arange(places) * tiles // places  # their split of the whole view
        quotas = hired_quotas(hired_hits(early[0], flat, tiles, hyper["alpha"]), torch.full((tiles,), places), rest)
        assert [first, *quotas.tolist()] == tensors["out.per_partition"].tolist()
        group = torch.arange(tiles * places) // places
        assert torch.equal(top_of_groups(late[1:].flatten(), group, quotas), tensors["out.mask"][1:].flatten())
        assert torch.equal(top_indices(late[0], first), tensors["out.mask"][0].nonzero()[:, 0])


def test_views_where_both_splits_agree() -> None:
    agreeing = 0
    for hyper, tensors in cases("HiRED"):
        columns, rows = hyper["grid_wh"]
        early, late = tensors["in.top_cls"].sum(1), tensors["in.bottom_cls"].sum(1)
        method = HiRED(retention=hyper["token_budget_rate"], alpha=hyper["alpha"])
        whole, tiles = method.reduce_views(views(early, late, rows, columns))
        assert torch.equal(whole.source, tensors["out.mask"][0].nonzero()[:, 0])
        expected = joined(tensors["out.mask"][None, 1:], rows, columns)[0]
        if columns == 1:
            agreeing += 1
            assert torch.equal(tiles.source, expected.nonzero()[:, 0])
        else:
            # As many tokens, up to truncation; of each tile the same ones, so far as the smaller quota goes.
            assert abs(tiles.source.shape[0] - int(expected.sum())) < rows * columns
            mask = torch.zeros_like(expected).index_fill_(0, tiles.source, True)
            side = rows * int(early.shape[1] ** 0.5)
            for mine, theirs in zip(*(quarters(x.view(side, side)) for x in (mask, expected)), strict=True):
                assert int((mine & theirs).sum()) == min(int(mine.sum()), int(theirs.sum()))
    assert agreeing == 1


def quarters(picture: Tensor) -> list[Tensor]:
    return [part for half in picture.chunk(2) for part in half.chunk(2, dim=1)]


def test_budget_follows_the_corner_that_is_looked_at() -> None:
    early = torch.zeros(5, 6, 6)
    early[0, :3, :3] = 1  # the upper left quarter of the whole view; the authors give half of this to the upper right
    late = torch.rand(5, 36, generator=torch.Generator().manual_seed(0))
    method = HiRED(retention=0.1, alpha=0.75)
    whole, tiles = method.reduce_views(views(early.flatten(1), late, 2, 2))
    assert whole.source.shape == (int(18 * 0.75),)
    assert tiles.source.shape == (18 - 13,)
    assert (tiles.source // 12 < 6).all() and (tiles.source % 12 < 6).all()
    assert torch.equal(tiles.embeddings[:, 0].long(), tiles.source)


def test_either_view_keeps_a_token() -> None:
    pair = views(torch.ones(5, 16), torch.ones(5, 16), 2, 2)
    assert [reduced.source.tolist() for reduced in HiRED(retention=0.001).reduce_views(pair)] == [[0], [0]]
    everything = HiRED(retention=1.0).reduce_views(pair)
    assert all(reduced.embeddings is view.embeddings for reduced, view in zip(everything, pair, strict=True))


def test_frames_share_by_late_saliency() -> None:
    early, late = torch.rand(12), torch.tensor([9.0, 8, 7, 0, 6, 1, 1, 1, 2, 2, 2, 3])
    clip = VideoFeatures(torch.randn(12, 3), (3, 2, 2), saliency=torch.stack([early, late]))
    # Of the 6 most salient tokens three are in the first frame, one in the second, two in the third.
    assert hired_hits(late, torch.arange(12) // 4, 3, 0.5).tolist() == [3, 1, 2]
    assert hired_count(12, 0.5) == 6
    assert HiRED(retention=0.5).reduce(clip).source.tolist() == [0, 1, 2, 4, 8, 11]
    assert HiRED(retention=0.1).reduce(clip).source.tolist() == [0]
    assert HiRED().saliency_layers(23) == (0, 22)
