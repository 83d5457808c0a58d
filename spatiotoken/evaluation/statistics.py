"""How sure a mean over questions is, and whether one config is better than another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_RESAMPLES = 2000


def bootstrap_interval(values: Tensor, clusters: Sequence[str] | None = None) -> tuple[float, float]:
    """95 % percentile interval of the mean of ``values [n]``; the same for the same values.

    With ``clusters``, a name per value, it is whole clusters that are drawn, as many as there are: a mean is then the
    sum of the drawn clusters' values over the number of these. Questions about one video are no independent draws, and
    an interval that takes them for such is too narrow.

    Raises:
        ValueError: there are no values, they are no vector of floats, or have not one cluster each.
    """
    if values.ndim != 1 or not values.shape[0] or not values.is_floating_point():
        raise ValueError(f"expected a vector of floats, got {values.dtype} {list(values.shape)}")
    values = values.cpu()
    sizes = torch.ones_like(values)
    if clusters is not None:
        if len(clusters) != len(values):
            raise ValueError(f"expected a cluster for each of {len(values)} values, got {len(clusters)}")
        numbers = {name: at for at, name in enumerate(dict.fromkeys(clusters))}
        rows = torch.tensor([numbers[name] for name in clusters])
        empty = values.new_zeros(len(numbers))
        values, sizes = empty.index_add(0, rows, values), empty.index_add(0, rows, sizes)
    generator = torch.Generator().manual_seed(0)
    n = values.shape[0]
    means = torch.empty(_RESAMPLES, dtype=values.dtype)
    for at in range(_RESAMPLES):
        drawn = torch.randint(n, (n,), generator=generator)
        means[at] = values[drawn].sum() / sizes[drawn].sum()
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high


def mcnemar(mine: Sequence[bool], other: Sequence[bool]) -> float:
    """Two-sided p-value of McNemar's exact test: how probable it is that two configs that are equally good differ as
    much as these, or more, in the questions that one of them alone has right. 1.0 where there is no such question.

    Raises:
        ValueError: there are no questions, or not as many of one as of the other.
    """
    if not mine or len(mine) != len(other):
        raise ValueError(f"expected as many answers of one as of the other, got {len(mine)} and {len(other)}")
    only_mine = sum(bool(a and not b) for a, b in zip(mine, other, strict=True))
    only_other = sum(bool(b and not a) for a, b in zip(mine, other, strict=True))
    n = only_mine + only_other
    # Whole numbers: powers of two soon leave the range of floats, their quotient does not.
    ways = tail = 1
    for count in range(1, min(only_mine, only_other) + 1):
        ways = ways * (n - count + 1) // count
        tail += ways
    return min(1.0, 2 * tail / 2**n)
