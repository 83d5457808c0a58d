"""CDPruner: the authors' vectors from their relevance on, and determinants that can be seen."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from spatiotoken.structures import VideoFeatures
from spatiotoken.tokens.cdpruner import CDPruner, cdpruner_count, cdpruner_order, cdpruner_relevance
from tests.vectors import cases


def test_authors_results() -> None:
    for hyper, tensors in cases("CDPruner"):
        image, text = (normalize(tensors[f"in.{name}_embeds"].float(), dim=-1) for name in ("image", "text"))
        relevance = cdpruner_relevance(-(image @ text.T).mean(dim=-1))  # negated, as in their code
        torch.testing.assert_close(relevance, tensors["out.relevance"], atol=2e-4, rtol=0)
        unit = normalize(tensors["in.features"].float(), dim=-1)
        order = cdpruner_order(unit, tensors["out.relevance"], hyper["visual_token_num"])
        assert torch.equal(order.sort(dim=1).values.int(), tensors["out.selected_sorted"])


def test_class_selects_as_the_functions_do() -> None:
    for hyper, tensors in cases("CDPruner"):
        frames = tensors["in.features"].float()
        count, places, width = frames.shape
        question = torch.randn(7, width, generator=torch.Generator().manual_seed(0))
        clip = VideoFeatures(frames.flatten(0, 1), (count, 1, places), question=question)
        unit = normalize(frames, dim=-1)
        relevance = cdpruner_relevance(unit @ normalize(question.mean(0), dim=0))
        kept = cdpruner_order(unit, relevance, hyper["visual_token_num"]).sort(dim=1).values
        expected = (kept + places * torch.arange(count)[:, None]).flatten()
        method = CDPruner(retention=hyper["visual_token_num"] / places)
        assert torch.equal(method.reduce(clip).source, expected)


def test_relevant_unless_alike() -> None:
    east, north = torch.eye(2)
    unit = torch.stack([east, east, north, normalize(east + north, dim=0)])[None]
    relevance = torch.tensor([[1.0, 0.9, 0.2, 0.8]])
    # After east (the most relevant): its copy adds nothing, and half of the diagonal's square is left, .8**2 / 2.
    assert cdpruner_order(unit, relevance, 2).tolist() == [[0, 3]]
    # The plane is spanned by now, so what remains comes by relevance.
    assert cdpruner_order(unit, relevance, 4).tolist() == [[0, 3, 1, 2]]
    assert cdpruner_order(unit, torch.tensor([[1.0, 0.9, 0.8, 0.1]]), 2).tolist() == [[0, 2]]


def test_largest_determinant_of_two() -> None:
    unit = normalize(torch.randn(1, 9, 5, generator=torch.Generator().manual_seed(3)), dim=-1)
    relevance = torch.rand(1, 9, generator=torch.Generator().manual_seed(4))
    first, second = cdpruner_order(unit, relevance, 2)[0].tolist()
    kernel = (relevance.T * (unit[0] @ unit[0].T) * relevance).double()
    assert first == int(kernel.diagonal().argmax())

    def determinant(other: int) -> Tensor:
        return kernel[[first, other]][:, [first, other]].det()

    assert second == max((i for i in range(9) if i != first), key=lambda i: float(determinant(i)))


def test_budget_below_one_token_per_frame() -> None:
    question = torch.tensor([[1.0, 0.0]])
    angles = torch.tensor([[0.9, 0.8], [0.1, 0.3], [0.7, 0.6], [0.5, 0.4]])
    frames = torch.stack([angles.cos(), angles.sin()], dim=-1)
    clip = VideoFeatures(frames.flatten(0, 1), (4, 1, 2), question=question)
    assert cdpruner_count(8, 0.25) == 2
    # The frames nearest to the question, and of these the nearest tokens.
    assert CDPruner(retention=0.25).reduce(clip).source.tolist() == [2, 7]
    assert CDPruner(retention=0.7).reduce(clip).source.tolist() == [1, 2, 3, 5, 7]


def test_nothing_to_tell_tokens_apart() -> None:
    assert cdpruner_relevance(torch.full((2, 3), 0.4)).tolist() == [[1, 1, 1], [1, 1, 1]]
    same = VideoFeatures(torch.ones(6, 4), (2, 1, 3), question=torch.ones(1, 4))
    assert CDPruner(retention=0.7).reduce(same).source.tolist() == [0, 1, 3, 4]
    nothing = VideoFeatures(torch.zeros(6, 4), (2, 1, 3), question=torch.zeros(0, 4))
    assert CDPruner(retention=0.34).reduce(nothing).source.tolist() == [0, 3]
