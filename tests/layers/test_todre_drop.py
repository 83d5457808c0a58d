"""ToDRE's second stage: all or nothing, by the question's attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spatiotoken.layers.todre_drop import ToDREDrop
from spatiotoken.layers.words import text_to_visual
from spatiotoken.structures import LayerTokens


def prompt(weights: Tensor, places: list[int], layer: int = 3) -> LayerTokens:
    """A sample with these weights ``[heads, L, L]`` in the layer before; rows of words are all but ``places``."""
    length = weights.shape[1]

    def of(rows: Tensor, entering: bool) -> Tensor:
        assert not entering and len(rows) <= 32
        return weights[:, rows]

    text = torch.tensor([row for row in range(length) if row not in places], dtype=torch.int64)
    asking = text > max(places)
    return LayerTokens(
        layer=layer,
        num_initial=len(places),
        depth=4,
        length=length,
        places=torch.tensor(places),
        text=text,
        asking=asking if asking.any() else ~asking,
        weights=of,
    )


def causal(heads: int, length: int) -> Tensor:
    """Random causal attention."""
    logits = torch.randn(heads, length, length, generator=torch.Generator().manual_seed(length))
    return logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(dim=-1)


def test_share_of_the_question_alone_counts() -> None:
    weights = torch.zeros(2, 5, 5)
    weights[:, :3, 0] = 1
    # The first of two words gives the picture (rows 1, 2) 0.2 in one head and 0.4 in the other, the second 0.1 in both.
    weights[0, 3] = torch.tensor([0.5, 0.1, 0.1, 0.3, 0])
    weights[1, 3] = torch.tensor([0.5, 0.4, 0.0, 0.1, 0])
    weights[:, 4] = torch.tensor([0.4, 0.0, 0.1, 0.2, 0.3])
    tokens = prompt(weights, [1, 2])
    assert text_to_visual(tokens).item() == pytest.approx(0.2)
    assert ToDREDrop(threshold=0.19).reduce(tokens, None).kept.tolist() == [0, 1]
    dropped = ToDREDrop(threshold=0.21).reduce(tokens, None).kept
    assert dropped.shape == (0,) and dropped.dtype == torch.int64


@pytest.mark.parametrize("length", [4, 40, 150])
def test_equals_all_rows_at_once(length: int) -> None:
    weights, places = causal(3, length), [1, 2]
    expected = weights.mean(dim=0)[3:, places].sum(dim=1).mean()
    torch.testing.assert_close(text_to_visual(prompt(weights, places)), expected)


def test_pictures_at_the_end_stay() -> None:
    """Of a prompt without words, too."""
    method = ToDREDrop(threshold=1)
    for places in ([4, 5], [0, 1, 2, 3, 4, 5]):
        tokens = prompt(causal(1, 6), places)
        assert text_to_visual(tokens).isnan()
        assert method.reduce(tokens, None).kept.tolist() == list(range(len(places)))


def test_edges() -> None:
    tokens = prompt(causal(2, 9), [1, 2, 3])
    assert ToDREDrop(threshold=0).reduce(tokens, None).kept.tolist() == [0, 1, 2]
    assert not ToDREDrop(threshold=1).reduce(tokens, None).kept.shape[0]
    assert ToDREDrop().prune_layers(28) == (24,) and ToDREDrop(layer=2).prune_layers(4) == (2,)
