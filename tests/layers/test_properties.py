"""What holds of every method of the ``layers`` stage, whatever it is given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, SearchStrategy
from torch import Tensor

from spatiotoken.layers.base import LayerReducer
from spatiotoken.layers.fastv import fastv_count
from spatiotoken.layers.framefusion import FrameFusion
from spatiotoken.layers.sttm import STTM
from spatiotoken.registry import METHODS
from spatiotoken.structures import LayerReduction, LayerTokens
from tests.cases import KEEP_ALL
from tests.drawing import Grid, Scene, drawn, grids, instances, scenes

ALL: dict[str, type[LayerReducer]] = dict(sorted(METHODS["layers"].items().items()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Sample:
    """Visual tokens of one sample: videos and pictures, of which frames were left out, with newlines after them.

    Attributes:
        newlines: after each grid.
        share: of the tokens that a method before has left.
    """

    scene: Scene
    dim: int
    grids: tuple[Grid, ...]
    newlines: tuple[int, ...]
    share: float
    depth: int

    def tokens(self) -> LayerTokens:
        generator = torch.Generator().manual_seed(self.scene.seed)
        hidden, coordinates = [], []
        for number, (grid, newlines) in enumerate(zip(self.grids, self.newlines, strict=False)):
            frames = torch.randperm(2 * grid[0], generator=generator)[: grid[0]].sort().values
            places = torch.cartesian_prod(frames, torch.arange(grid[1]), torch.arange(grid[2]))
            coordinates.append(torch.nn.functional.pad(places, (1, 0), value=number))
            coordinates.append(torch.full((newlines, 4), -1 - self.scene.seed % 2))
            hidden.append(self.scene.tokens(grid, self.dim, 100 * number))
            hidden.append(self.scene.rows(newlines, self.dim, 100 * number + 50))
        left = torch.rand(sum(map(len, hidden)), generator=generator) <= self.share
        left[0] = True
        tokens, places = torch.cat(hidden)[left], torch.cat(coordinates)[left]
        return entering(LayerTokens(0, tokens.shape[0], hidden=tokens, coordinates=places, depth=self.depth))


def samples(gaps: bool) -> SearchStrategy[Sample]:
    """With ``gaps`` tokens may be missing anywhere."""
    return st.builds(
        Sample,
        scene=scenes(),
        dim=st.integers(1, 12),
        grids=st.lists(grids(most=150, frames=16), min_size=1, max_size=4).map(tuple),
        newlines=st.tuples(*[st.integers(0, 3)] * 4),
        share=st.sampled_from([1.0, 0.9, 0.5, 0.1] if gaps else [1.0]),
        depth=st.integers(3, 28),
    )


def entering(tokens: LayerTokens) -> LayerTokens:
    """With attention of the layer before."""
    count = tokens.needed("hidden").shape[0]
    generator = torch.Generator().manual_seed(count + 1000 * tokens.layer)
    attention = torch.randn(3, count, generator=generator).softmax(dim=-1)
    return replace(tokens, attention=attention, received=lambda: attention.mean(dim=0))


def following(tokens: LayerTokens, reduction: LayerReduction, noise: float) -> LayerTokens:
    """What enters the next layer."""
    hidden, places = tokens.needed("hidden")[reduction.kept], tokens.needed("coordinates")[reduction.kept]
    if reduction.hidden is not None:
        hidden = reduction.hidden
    generator = torch.Generator().manual_seed(tokens.layer)
    size = noise * hidden.float().std() if hidden.shape[0] > 1 else 0.0
    hidden = hidden + (size * torch.randn(hidden.shape, generator=generator)).to(hidden.dtype)
    return entering(replace(tokens, layer=tokens.layer + 1, hidden=hidden, coordinates=places))


def check_contract(tokens: LayerTokens, reduction: LayerReduction) -> None:
    before, kept = tokens.needed("hidden"), reduction.kept
    count = before.shape[0]
    assert kept.dtype == torch.int64 and 1 <= kept.shape[0] <= count
    assert (kept.diff() > 0).all() and kept[0] >= 0 and kept[-1] < count
    if reduction.assignment is None:
        assert reduction.hidden is None or torch.equal(reduction.hidden, before[kept])
        return
    assert reduction.assignment.dtype == torch.int64 and reduction.assignment.shape == (count,)
    assert reduction.assignment.min() >= 0 and reduction.assignment.max() < kept.shape[0]
    assert torch.equal(reduction.assignment[kept], torch.arange(kept.shape[0]))
    assert (kept[reduction.assignment] <= torch.arange(count)).all(), "what comes first stays"
    assert reduction.hidden is not None
    assert reduction.hidden.dtype == before.dtype and reduction.hidden.shape == (kept.shape[0], before.shape[1])
    check_means(reduction.hidden, before, reduction.assignment)
    # A newline is nobody's twin.
    alone = (tokens.needed("coordinates") < 0).any(dim=1)
    assert torch.isin(alone.nonzero()[:, 0], kept).all()
    members = torch.bincount(reduction.assignment)
    assert (members[reduction.assignment[alone]] == 1).all()
    lone = members == 1
    assert torch.equal(reduction.hidden[lone], before[kept[lone]])
    # And no grid merges with another.
    grid = tokens.needed("coordinates")[:, 0]
    assert torch.equal(grid[kept][reduction.assignment], grid)


def check_means(merged: Tensor, tokens: Tensor, assignment: Tensor) -> None:
    """Finite, and in each channel between the least and the greatest of the members, but for rounding."""
    rows, wide = assignment[:, None].expand(tokens.shape), tokens.double()
    low = merged.double().scatter_reduce(0, rows, wide, "amin", include_self=False)
    high = merged.double().scatter_reduce(0, rows, wide, "amax", include_self=False)
    slack = (2 * torch.finfo(merged.dtype).eps + 1e-5) * wide.abs().amax(dim=0)
    assert torch.isfinite(merged).all()
    assert (merged.double() >= low - slack).all() and (merged.double() <= high + slack).all()


def equal(first: LayerReduction, second: LayerReduction) -> bool:
    pairs = [(getattr(first, name), getattr(second, name)) for name in ("kept", "hidden", "assignment")]
    same = all(a is b is None or torch.equal(a, b) for a, b in pairs)
    return same and first.memory == second.memory


def walk(method: LayerReducer, tokens: LayerTokens, noise: float) -> list[LayerReduction]:
    """What is left before each decoder layer."""
    memory: Any = None
    left = []
    while tokens.layer < tokens.depth:
        reduction = LayerReduction(torch.arange(tokens.needed("hidden").shape[0]), memory=memory)
        if tokens.layer in method.prune_layers(tokens.depth):
            hidden, places = tokens.needed("hidden").clone(), tokens.needed("coordinates").clone()
            reduction = method.reduce(tokens, memory)
            check_contract(tokens, reduction)
            assert equal(method.reduce(replace(tokens, hidden=hidden, coordinates=places), memory), reduction)
            assert torch.equal(tokens.needed("hidden"), hidden) and torch.equal(tokens.needed("coordinates"), places)
            memory = reduction.memory
        left.append(reduction)
        tokens = following(tokens, reduction, noise)
    return left


def chosen(data: DataObject, method: type[LayerReducer], depth: int, **fixed: Any) -> Any:
    drawn = data.draw(instances(method, **fixed), label="method")
    return drawn.model_copy(update={"layer": min(drawn.layer, depth - 1)}) if "layer" in method.model_fields else drawn


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
@drawn(80)
def test_contract(name: str, data: DataObject) -> None:
    tokens = data.draw(samples(gaps=name != "sttm"), label="sample").tokens()
    method = chosen(data, ALL[name], tokens.depth)
    counts = [each.kept.shape[0] for each in walk(method, tokens, data.draw(st.sampled_from([0.0, 0.1])))]
    assert counts == sorted(counts, reverse=True)
    if name == "fastv":
        assert counts[-1] == fastv_count(tokens.num_initial, method.retention)
        assert counts[-1] <= max(1, tokens.num_initial * method.retention)


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
@drawn(30)
def test_keep_all(name: str, data: DataObject) -> None:
    """Bit by bit, whatever the other settings are."""
    tokens = data.draw(samples(gaps=name != "sttm"), label="sample").tokens()
    method = chosen(data, ALL[name], tokens.depth, **KEEP_ALL["layers", name])
    for reduction in walk(method, tokens, 0.0):
        assert torch.equal(reduction.kept, torch.arange(tokens.num_initial))
        assert reduction.hidden is None or torch.equal(reduction.hidden, tokens.needed("hidden"))


@given(data=st.data())
@drawn(80)
def test_framefusion_spends_its_budget(data: DataObject) -> None:
    """On all layers together, once it is done, but for rounding and for one token that is always left."""
    tokens = data.draw(samples(gaps=True), label="sample").tokens()
    method = data.draw(instances(FrameFusion), label="method")
    left = walk(method, tokens, data.draw(st.sampled_from([0.0, 0.1])))
    counts = [tokens.num_initial, *(each.kept.shape[0] for each in left)]
    done = [layer for layer, each in enumerate(left) if each.memory.phase == "done"]
    if done:
        before, after = counts[: done[0] + 1], counts[done[0] + 1 :]
        assert len(done) == len(after) and set(after) == {after[-1]}
        spent, budget = sum(before[1:]), method.cost * tokens.depth * tokens.num_initial
        most = spent + len(after) * before[-1]
        assert min(budget, most) - len(after) <= spent + sum(after) <= max(budget, spent + len(after)) + len(after)


@given(data=st.data())
@drawn(30)
def test_sttm_asks_for_whole_frames(data: DataObject) -> None:
    tokens = data.draw(samples(gaps=False), label="sample").tokens()
    places = tokens.needed("coordinates")
    together = (places[:, None, :2] == places[None, :, :2]).all(dim=2).sum(dim=1)
    corners = ((places[:, 2:] == 0).all(dim=1) & (together > 1)).nonzero()[:, 0].tolist()
    if corners:
        others = torch.arange(tokens.num_initial) != data.draw(st.sampled_from(corners))
        tokens = replace(tokens, hidden=tokens.needed("hidden")[others], coordinates=places[others])
        with pytest.raises(ValueError, match="whole frames"):
            STTM().reduce(tokens, None)
