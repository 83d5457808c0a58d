"""DATE's sampling: the authors' vectors, the shrinking interval, and times that coincide."""

from __future__ import annotations

import torch
from torch import Tensor

from spatiotoken.frames.date_tass import DateTASS, above_mean, apart_in_time
from spatiotoken.structures import Frames
from tests.vectors import cases


def select(method: DateTASS, times: Tensor, relevance: Tensor) -> tuple[int, ...]:
    return method.select(Frames(times, relevance=relevance)).indices


def test_authors_results() -> None:
    for hyper, tensors in cases("DATE"):
        times, scores, count = tensors["in.timestamps"], tensors["in.scores"], hyper["max_frames"]
        order = above_mean(scores, 4 * count)
        if order.shape[0] > count:
            order = order[apart_in_time(times[order], count, hyper["interval"], hyper["decay"])]
        assert order.tolist() == tensors["out.selected_indices_in_order"].tolist()
        assert torch.equal(times[order].sort().values, tensors["out.selected_timestamps"])

        method = DateTASS(num_frames=count, interval=hyper["interval"], decay=hyper["decay"])
        chosen = select(method, times, scores.float())
        if scores.shape[0] > count:
            assert chosen == tuple(order.sort().values.tolist())
        else:
            assert chosen == tuple(range(scores.shape[0])), "a short video is left whole"


def test_the_interval_shrinks_until_there_are_enough() -> None:
    relevance = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    times = torch.tensor([0.0, 1, 2, 10, 30, 40, 50, 60, 70, 80, 90])
    assert above_mean(relevance, 8).tolist() == [0, 1, 2, 3, 4]
    # 20 s: frames 0 and 4; 10 s: frame 3; 5 and 2.5 s: none; 1.25 s: frame 2.
    assert apart_in_time(times[:5], 4, 20.0, 0.5) == [0, 4, 3, 2]
    assert select(DateTASS(num_frames=2), times, relevance) == (0, 4)
    assert select(DateTASS(num_frames=3), times, relevance) == (0, 3, 4)
    assert select(DateTASS(num_frames=4), times, relevance) == (0, 2, 3, 4)
    assert select(DateTASS(num_frames=2, interval=0.0), times, relevance) == (0, 1)
    assert select(DateTASS(num_frames=2, pool=1), times, relevance) == (0, 1), "frame 4 is not among the best two"


def test_fewer_above_the_mean_than_allowed() -> None:
    relevance = torch.zeros(10)
    relevance[[3, 7]] = 1.0
    assert select(DateTASS(num_frames=4), torch.arange(10.0), relevance) == (3, 7)


def test_none_above_the_mean() -> None:
    assert select(DateTASS(num_frames=2), torch.arange(8.0), torch.full((8,), 0.1)) == (2, 6)
    assert select(DateTASS(num_frames=1), torch.arange(2.0), torch.zeros(2)) == (1,)


def test_times_that_coincide_end() -> None:
    relevance = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.0, 0.0, 0.0, 0.0])
    assert select(DateTASS(num_frames=3), torch.zeros(8), relevance) == (1, 2, 3)
    assert select(DateTASS(num_frames=3, decay=0.99), torch.zeros(8), relevance) == (1, 2, 3)
    two = torch.tensor([0.0, 0, 1e-9, 1e-9, 1, 1, 1, 1])
    # Both times are taken before either is taken twice.
    assert select(DateTASS(num_frames=2), two, relevance) == (1, 3)
    assert select(DateTASS(num_frames=3), two, relevance) == (1, 2, 3)
    assert apart_in_time(torch.zeros(4), 4, 20.0, 0.5) == [0, 1, 2, 3]
