"""T*: the authors' updates of scores and distribution, what is looked at, and what is found."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from spatiotoken.frames.tstar import UNSEEN, TStar, frame_distribution, next_look, spread_scores
from spatiotoken.frames.uniform import uniform_indices
from spatiotoken.structures import FrameChoice, Frames
from tests.vectors import cases


class Watched:
    """A scorer that notes what it is asked for."""

    def __init__(self, relevance: Tensor) -> None:
        self.relevance = relevance
        self.looks: list[list[int]] = []

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        self.looks.append(list(numbers))
        return self.relevance[self.looks[-1]]

    def search(self, method: TStar) -> FrameChoice:
        self.looks.clear()
        return method.select(Frames(torch.arange(self.relevance.shape[0]).double(), score=self))


def test_authors_scores() -> None:
    for hyper, tensors in cases("TStar"):
        scores = torch.full((hyper["total_frame_num"],), UNSEEN, dtype=torch.float64)
        for look in ("0", "1"):
            numbers, confidence = tensors[f"in.sampled_{look}"].tolist(), tensors[f"in.conf_{look}"].flatten()
            scores = spread_scores(scores, numbers, confidence, hyper["window_size"])
            torch.testing.assert_close(scores, tensors[f"out.score_{look}"], atol=0, rtol=0)


def test_authors_distribution() -> None:
    pytest.importorskip("scipy", reason="the spline is SciPy's, which is no dependency")
    for hyper, tensors in cases("TStar"):
        seen = torch.zeros(hyper["total_frame_num"], dtype=torch.bool)
        for look in ("0", "1"):
            seen[tensors[f"in.sampled_{look}"]] = True
            probability = frame_distribution(tensors[f"out.score_{look}"], seen, hyper["spline_s"])
            torch.testing.assert_close(probability, tensors[f"out.P_{look}"], atol=1e-12, rtol=0)
        assert torch.equal((~seen).double(), tensors["out.non_visited"])


def test_a_good_frame_lifts_its_neighbours() -> None:
    before = torch.zeros(8, dtype=torch.float64)
    before[7] = 0.9
    after = spread_scores(before, [1, 4, 6], torch.tensor([0.2, 0.8, 0.1], dtype=torch.float64), 3)
    # Only frame 4 is in the best quarter; frame 1 keeps what it has, for a quarter of 0.8 is not more.
    torch.testing.assert_close(after, torch.tensor([0, 0.2, 0.8 / 3, 0.4, 0.8, 0.4, 0.8 / 3, 0.9], dtype=torch.float64))
    assert before[4] == 0, "the scores before are left alone"
    alone = spread_scores(before, [0], torch.tensor([0.5], dtype=torch.float64), 0)
    assert alone.tolist() == [0.5, 0, 0, 0, 0, 0, 0, 0.9]


def test_the_first_look_covers_the_video() -> None:
    relevance = torch.linspace(0, 1, 100)
    watched = Watched(relevance)
    choice = watched.search(TStar(num_frames=2, grid=10, budget=0.05))
    assert watched.looks == [list(uniform_indices(100, 10))]
    assert choice.indices == (85, 95)
    # The best frame seen counts as one half, those no better than the median as nothing.
    assert choice.scores is not None and choice.scores[95] == pytest.approx(0.5)
    assert (choice.scores[[5, 15, 25, 35, 45]] == 0).all()
    assert choice.scores[90] == pytest.approx(0.5 / 6), "next to a good frame"


def test_all_frames_seen_gives_the_most_relevant() -> None:
    relevance = torch.tensor([0.1, 0.9, 0.2, 0.3, 0.25, 0.8])
    watched = Watched(relevance)
    assert watched.search(TStar(num_frames=2, window=0)).indices == (1, 5)
    assert watched.looks == [list(range(6))]
    assert watched.search(TStar(num_frames=6)).indices == tuple(range(6)) and not watched.looks
    assert Watched(torch.zeros(3)).search(TStar(num_frames=1)).indices == (0,)


def test_no_frame_twice_and_never_more_than_the_budget() -> None:
    pytest.importorskip("scipy", reason="the spline is SciPy's, which is no dependency")
    generator = torch.Generator().manual_seed(0)
    for total, grid, budget in [(100, 16, 0.5), (61, 7, 0.9), (40, 1, 0.2), (50, 3, 1.0)]:
        watched = Watched(torch.rand(total, generator=generator))
        first = watched.search(TStar(num_frames=4, grid=grid, budget=budget)).indices
        looks = [list(look) for look in watched.looks]
        seen = sum(looks, [])
        assert len(seen) == len(set(seen)) == max(grid, -(-total * budget // 1))
        assert watched.search(TStar(num_frames=4, grid=grid, budget=budget)).indices == first
        assert watched.looks == looks
        assert watched.search(TStar(num_frames=4, grid=grid, budget=budget, seed=1)) and watched.looks != looks
    state = torch.get_rng_state()
    watched.search(TStar(num_frames=4, grid=3, budget=0.5))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_short_event_is_found() -> None:
    """Twenty of 1,000 frames show what is asked for; a tenth are looked at."""
    pytest.importorskip("scipy", reason="the spline is SciPy's, which is no dependency")
    place = torch.arange(1000)
    generator = torch.Generator().manual_seed(0)
    event = 0.2 * torch.exp(-(((place - 700) / 40.0) ** 2))
    watched = Watched(0.2 + 0.01 * torch.rand(1000, generator=generator) + event)
    choice = watched.search(TStar())
    assert len(sum(watched.looks, [])) == 100 and len(choice.indices) == 8
    assert all(abs(index - 700) < 80 for index in choice.indices)


def test_draws_come_from_the_likeliest_quarter() -> None:
    probability = torch.full((40,), 0.01, dtype=torch.float64)
    probability[20:30] = 0.09
    seen = torch.zeros(40, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    assert set(next_look(probability, seen, 5, generator)) <= set(range(20, 30))
    seen[20:28] = True
    # A quarter of the video is no longer there to be drawn: any frame that was not seen.
    drawn = next_look(probability, seen, 30, generator)
    assert len(set(drawn)) == 30 and not set(drawn) & set(range(20, 28))


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.interpolate", None)
    watched = Watched(torch.rand(40, generator=torch.Generator().manual_seed(0)))
    assert len(watched.search(TStar(num_frames=4)).indices) == 4, "one look needs no spline"
    with pytest.raises(ImportError, match="spatiotoken.tstar"):
        watched.search(TStar(num_frames=4, budget=1.0))


def test_without_a_scorer() -> None:
    with pytest.raises(ValueError, match="score"):
        TStar(num_frames=2).select(Frames(torch.arange(5.0)))
