"""Bipartite matching against ToMe's and AIM's own results."""

from __future__ import annotations

import torch

from spatiotoken.tokens.matching import bipartite_matching, merge_matched
from tests.vectors import cases


def test_tome_vectors() -> None:
    """In ToMe's order, with sizes, twice."""
    for hyper, tensors in cases("ToMe"):
        values = tensors["in.features"].float()
        left, places = bipartite_matching(values, hyper["r"], class_token=hyper["class_token"])
        assert torch.equal(places.int(), tensors["out.owner"])
        assert torch.equal(places.gather(1, left), torch.arange(left.shape[1]).expand_as(left))
        values, sizes = merge_matched(values, None, places, left.shape[1])
        torch.testing.assert_close(values, tensors["out.merged"], atol=2e-4, rtol=0)
        assert torch.equal(sizes, tensors["out.size"][..., 0])
        left, places = bipartite_matching(values, hyper["r2"], class_token=hyper["class_token"])
        values, sizes = merge_matched(values, sizes, places, left.shape[1])
        torch.testing.assert_close(values, tensors["out.merged2"], atol=2e-4, rtol=0)
        assert torch.equal(sizes, tensors["out.size2"][..., 0])


def test_merges_the_most_similar_pair() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 3.0], [-1.0, 0.0]]])
    left, places = bipartite_matching(tokens, 1)
    assert left.tolist() == [[0, 1, 3]] and places.tolist() == [[0, 1, 1, 2]]
    merged, sizes = merge_matched(tokens, torch.tensor([[1.0, 3.0, 1.0, 1.0]]), places, 3)
    torch.testing.assert_close(merged, torch.tensor([[[1.0, 0.0], [0.025, 1.5], [-1.0, 0.0]]]))
    assert sizes.tolist() == [[1.0, 4.0, 1.0]]


def test_never_merges_more_than_half() -> None:
    left, places = bipartite_matching(torch.ones(2, 5, 3), 99)
    assert left.tolist() == [[4, 1, 3]] * 2 and places.tolist() == [[1, 1, 1, 2, 0]] * 2
    assert bipartite_matching(torch.ones(1, 1, 3), 1)[1].tolist() == [[0]]


def test_class_token_never_merges() -> None:
    left, places = bipartite_matching(torch.ones(1, 4, 3), 2, class_token=True)
    assert left.tolist() == [[0, 1, 3]] and places.tolist() == [[0, 1, 1, 2]]
