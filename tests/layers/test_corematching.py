"""CoreMatching: the authors' vectors, and curves whose elbow is evident."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spatiotoken.layers.corematching import CoreMatching, active_neurons, core_mask, elbow_index, shared_neurons
from spatiotoken.structures import LayerTokens
from tests.vectors import cases


class Gated(nn.Module):
    """Neuron ``i``: the SiLU of channel ``i`` times the sum of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(channels, channels, bias=False)
        self.up_proj = nn.Linear(channels, channels, bias=False)
        self.act_fn = nn.SiLU()
        nn.init.eye_(self.gate_proj.weight)
        nn.init.ones_(self.up_proj.weight)


def met(counts: Tensor, layer: int = 1) -> LayerTokens:
    return LayerTokens(layer, counts.shape[0], depth=4, observed={layer - 1: torch.stack([0 * counts, counts])})


def kept(counts: list[int], **fields: float) -> list[int]:
    return CoreMatching(layer=1, **fields).reduce(met(torch.tensor(counts).float()), None).kept.tolist()  # type: ignore[arg-type]


def test_authors_results() -> None:
    for hyper, tensors in cases("CoreMatching"):
        start, stop = hyper["image_span"]
        active = tensors["in.active"]
        method = CoreMatching()
        assert method.reference == -hyper["ref_token"]
        counts = shared_neurons(active, active[-method.reference])[start:stop]
        assert torch.equal(counts, tensors["out.match_count"])
        curve = counts.long().sort(descending=True).values
        assert elbow_index(curve).tolist() == [int(tensors["out.elbow_index"])]
        core = tensors["out.core_tokens"].long()
        assert torch.equal(core_mask(counts).nonzero()[:, 0], core)
        (layer,) = method.prune_layers(32)
        tokens = LayerTokens(layer, stop - start, depth=32, observed={layer - 1: torch.stack([0 * counts, counts])})
        assert torch.equal(method.reduce(tokens, None).kept, core)


def test_layers() -> None:
    assert CoreMatching().prune_layers(32) == (6,) and CoreMatching().observed_layers(32) == (5,)
    assert CoreMatching(layer=3).observed_layers(4) == (2,)


def test_observes_neurons_that_fire_for_the_reference_row_too() -> None:
    mlp = Gated(3)
    # The sum of the channels is negative in the last row, so that negative gates fire there.
    rows = torch.tensor([[1.0, 2.0, 3.0], [1.0, -0.5, 3.0], [-0.1, -0.2, 1.0], [-1.0, -2.0, 1.0]])
    expected = [[True, True, True], [True, False, True], [False, False, True], [True, True, False]]
    assert active_neurons(mlp, rows).tolist() == expected
    method = CoreMatching(layer=1, reference=3)
    assert method.observe("mlp", mlp, rows, rows).tolist() == [2, 2, 1, 1]
    assert method.observe("attention", nn.Identity(), rows, rows).tolist() == [0, 0, 0, 0]
    # A prompt shorter than that is compared with its first row.
    assert CoreMatching(reference=9).observe("mlp", mlp, rows, rows).tolist() == [3, 2, 1, 2]


def test_many_rows_are_counted_in_turn() -> None:
    torch.manual_seed(0)
    mlp, rows = Gated(5), torch.randn(5000, 5)
    active = active_neurons(mlp, rows)
    expected = (active & active[-5]).sum(dim=1).float()
    with torch.no_grad():
        assert torch.equal(CoreMatching().observe("mlp", mlp, rows, rows), expected)


def test_mlp_without_a_gate_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has no gate_proj, up_proj, act_fn"):
        CoreMatching().observe("mlp", nn.Sequential(), torch.ones(6, 3), torch.ones(6, 3))


def test_elbow() -> None:
    # Two stand out; the elbow is the first of the flat tail, which goes.
    assert elbow_index(torch.tensor([9, 8, 1, 1, 1, 0])).tolist() == [2]
    assert kept([1, 9, 1, 8, 0, 1]) == [1, 3]
    # Far above the chord: the elbow is the last of the plateau, and those above it are the core.
    assert kept([9, 6, 0, 7, 8]) == [0, 3, 4]
    # Of points as far, the first is the elbow.
    assert elbow_index(torch.tensor([4, 1, 0, 0])).tolist() == [1]
    assert elbow_index(torch.tensor([6, 6, 3, 0, 0])).tolist() == [1]


def test_some_are_always_left() -> None:
    assert kept([5]) == [0]
    assert kept([5, 5, 5]) == [0, 1, 2]  # nothing tells them apart
    assert kept([1, 2, 3, 4]) == [3]  # a straight line
    assert kept([5, 1, 5, 5]) == [0, 2, 3]  # the elbow is on the plateau at the top


def test_min_retention() -> None:
    counts = [1, 9, 1, 8, 0, 1]
    assert kept(counts, min_retention=0.5) == [0, 1, 3]
    assert kept(counts, min_retention=0.1) == [1, 3]
    assert kept(counts, min_retention=1.0) == [0, 1, 2, 3, 4, 5]
