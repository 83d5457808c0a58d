"""TransPrune: keep the visual tokens that the layers change most, and that the question looks at."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from spatiotoken.layers.depth import LayerPlace
from spatiotoken.layers.staged import StagedPruner
from spatiotoken.layers.words import ROWS, weights_of_words
from spatiotoken.registry import Retention
from spatiotoken.structures import LayerTokens


def transition_weights(before: Tensor, after: Tensor) -> Tensor:
    """``[L]`` float32: how much longer a part of a layer makes each row, by how much it turns it compared to others.

    The turn is the softmax over the rows of 1 minus the cosine.

    Args:
        before, after: ``[L, D]`` input and output of the part.
    """
    before, after = before.float(), after.float()
    growth = after.norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-8)
    return growth * (1 - torch.cosine_similarity(before, after, dim=-1)).softmax(dim=0)


def transprune_scores(transition: Tensor, attention: Tensor) -> Tensor:
    """``[n]`` sum of both shares, each of 1 in total.

    Args:
        transition: ``[n]`` transition weights, summed over parts and layers.
        attention: ``[n]`` mean attention of the question.
    """
    return transition / (transition.sum() + 1e-8) + attention / (attention.sum() + 1e-8)


def question_attention(tokens: LayerTokens) -> Tensor:
    """``[n]`` float32 attention in the layer that is about to be entered, the mean over heads and the question."""
    places, asking = tokens.needed("places"), tokens.needed("asking")
    total = torch.zeros(places.shape[0], device=places.device)
    if not len(asking):
        return total
    for weights, asks in zip(weights_of_words(tokens, entering=True), asking.split(ROWS), strict=True):
        # Picking the rows that ask would make the host wait for a GPU.
        total += (asks[:, None] * weights.mean(dim=0)).sum(dim=0)
    return total / asking.sum().clamp(min=1)


class TransPrune(StagedPruner, method="transprune", paper="2507.20630"):
    """Keep the visual tokens that early layers change most, and that the question looks at (arXiv 2507.20630).

    The transition weight of a token in the attention and in the MLP of a layer is the norm of the part's output over
    that of its normed input, times the softmax over all rows of 1 minus the cosine of both. It is summed up over the
    layers from the one before the first of ``layers`` on. Before each of ``layers``, the ``int(keep * n)`` visual
    tokens with the highest sum of two shares stay, ``n`` being the number that entered the language model: the share
    of these weights, and that of the attention (mean over heads and question) of the layer about to be entered.

    The authors count layers from 1, observe 7 to 12 and prune after 7, 9 and 12, so that the first prune knows one
    layer, the second three and the last six. Counted from 0 these are 6 to 11, and the prunes are before 7, 9 and 12:
    the defaults in a model of 28 layers; the authors ran the same numbers with 32. Their paper takes the absolute
    value of the cosine, their code does not, and neither do we. They renumber positions, while survivors keep theirs
    here. The question is all that follows the last visual token. ``keep`` of 1 everywhere keeps everything.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"weights", "text", "observed"})

    complexity: ClassVar[str] = "O(LD) per observed layer, O(LDK + QLD) per stage for keys of K channels and Q words"
    fidelity: ClassVar[str] = "authors' vectors"

    layers: tuple[LayerPlace, ...] = Field(
        (0.25, 0.32, 0.43),
        min_length=1,
        description="decoder layers before which tokens are dropped (fractions: of the depth)",
    )
    keep: tuple[Retention, ...] = Field(
        (0.875, 0.625, 0.125),
        min_length=1,
        description="share of the original visual tokens that is left from each of these layers on",
    )

    def observed_layers(self, depth: int) -> tuple[int, ...]:
        stages = self.prune_layers(depth)
        return tuple(range(stages[0] - 1, stages[-1]))

    def observe(self, part: str, module: nn.Module, before: Tensor, after: Tensor) -> Tensor:
        return transition_weights(before, after)

    def scores(self, tokens: LayerTokens) -> Tensor:
        assert tokens.observed is not None
        transition = torch.stack([parts.sum(dim=0) for parts in tokens.observed.values()]).sum(dim=0)
        return transprune_scores(transition, question_attention(tokens))
