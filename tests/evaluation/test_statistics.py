"""Intervals and tests of differences."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binomtest

from spatiotoken.evaluation.statistics import bootstrap_interval, mcnemar


def one_by_one(values: torch.Tensor) -> tuple[float, float]:
    """The interval where every value is drawn for itself, by the definition."""
    generator = torch.Generator().manual_seed(0)
    n = len(values)
    means = torch.stack([values[torch.randint(n, (n,), generator=generator)].mean() for _ in range(2000)])
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high


def drawn(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=dtype)


class TestBootstrap:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("n", [1, 2, 7, 300])
    def test_single_values_are_drawn_as_ever(self, n: int, dtype: torch.dtype) -> None:
        for values in (drawn(n, dtype), (drawn(n, dtype) > 0).to(dtype)):
            assert bootstrap_interval(values) == one_by_one(values)
            assert bootstrap_interval(values, [f"video {at}" for at in range(n)]) == one_by_one(values)

    def test_it_covers_what_a_normal_distribution_would(self) -> None:
        right = (torch.arange(1000) % 4 > 0).double()
        low, high = bootstrap_interval(right)
        reach = 1.96 * math.sqrt(0.75 * 0.25 / 1000)
        assert (low, high) == (pytest.approx(0.75 - reach, abs=0.003), pytest.approx(0.75 + reach, abs=0.003))

    def test_values_of_a_cluster_stay_together(self) -> None:
        values = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
        # Either of the two is drawn twice with a probability of a quarter: means 1, 1/4 and 0.
        assert bootstrap_interval(values, ["a", "b", "b", "b"]) == (0.0, 1.0)
        # There is but one way to draw one cluster.
        assert bootstrap_interval(values, ["a"] * 4) == (0.25, 0.25)

    def test_means_are_over_values_not_clusters(self) -> None:
        # 39 clusters of one wrong answer and one of 39 right ones: drawn k times, that has 39k of 39k + 40 - k answers.
        values = torch.tensor([1.0] * 39 + [0.0] * 39, dtype=torch.float64)
        low, high = bootstrap_interval(values, ["large"] * 39 + [f"small {at}" for at in range(39)])
        # It is drawn 3 times or less with a probability of 0.98, 2 times or less with one of 0.92.
        assert (low, high) == (0.0, pytest.approx(117 / 154))

    def test_repeated_answers_are_no_evidence(self) -> None:
        """Ten questions about each video that all go like the first: the interval is that of the videos."""
        videos = (drawn(50) > 0).double()
        narrow = bootstrap_interval(videos.repeat_interleave(10))
        wide = bootstrap_interval(videos.repeat_interleave(10), [str(at // 10) for at in range(500)])
        assert wide == pytest.approx(bootstrap_interval(videos))
        assert wide[1] - wide[0] > 2.5 * (narrow[1] - narrow[0])

    def test_names_and_their_order_do_not_matter(self) -> None:
        values = (drawn(6) > 0).double()
        assert bootstrap_interval(values, list("aabbcc")) == bootstrap_interval(values, list("zzyyxx"))
        mixed = torch.tensor([0, 2, 4, 1, 3, 5])
        assert bootstrap_interval(values[mixed], list("abcabc")) == bootstrap_interval(values, list("aabbcc"))

    def test_many_questions(self) -> None:
        values = (drawn(10_000) > 0).double()
        low, high = bootstrap_interval(values, [str(at % 900) for at in range(10_000)])
        assert low < values.mean() < high and high - low < 0.03

    @pytest.mark.parametrize(
        "values", [torch.zeros(0), torch.zeros(2, 2), torch.tensor(1.0), torch.tensor([1, 0]), torch.tensor([True])]
    )
    def test_no_values(self, values: torch.Tensor) -> None:
        with pytest.raises(ValueError, match="a vector of floats"):
            bootstrap_interval(values)

    def test_a_cluster_each(self) -> None:
        with pytest.raises(ValueError, match="each of 2 values, got 1"):
            bootstrap_interval(torch.zeros(2), ["a"])


def answers(only_mine: int, only_other: int, same: int = 3) -> tuple[list[bool], list[bool]]:
    mine = [True] * only_mine + [False] * only_other + [True, False] * same
    other = [False] * only_mine + [True] * only_other + [True, False] * same
    return mine, other


class TestMcNemar:
    @pytest.mark.parametrize("only_mine", range(8))
    @pytest.mark.parametrize("only_other", [0, 1, 2, 5, 30])
    def test_it_is_the_exact_binomial_test(self, only_mine: int, only_other: int) -> None:
        if only_mine + only_other:
            expected = binomtest(only_mine, only_mine + only_other, 0.5).pvalue
            assert mcnemar(*answers(only_mine, only_other)) == pytest.approx(expected, rel=1e-12)

    def test_values_by_hand(self) -> None:
        # 2 * (1 + 5) / 32.
        assert mcnemar(*answers(1, 4)) == 0.375
        assert mcnemar(*answers(4, 1)) == 0.375
        assert mcnemar(*answers(0, 6)) == 2 / 64
        assert mcnemar(*answers(5, 5)) == 1.0

    def test_those_that_agree_do_not_count(self) -> None:
        assert mcnemar(*answers(1, 9, same=0)) == mcnemar(*answers(1, 9, same=500))
        assert mcnemar(*answers(0, 0)) == 1.0

    @pytest.mark.parametrize(("only_mine", "only_other"), [(2400, 2600), (2500, 2500), (2000, 3000)])
    def test_many(self, only_mine: int, only_other: int) -> None:
        expected = binomtest(only_mine, only_mine + only_other, 0.5).pvalue
        assert mcnemar(*answers(only_mine, only_other)) == pytest.approx(expected, rel=1e-9)

    def test_what_is_below_all_floats_is_nought(self) -> None:
        assert mcnemar(*answers(0, 5000)) == 0.0

    def test_there_must_be_as_many_of_both(self) -> None:
        with pytest.raises(ValueError, match="got 0 and 0"):
            mcnemar([], [])
        with pytest.raises(ValueError, match="got 2 and 1"):
            mcnemar([True, False], [True])
