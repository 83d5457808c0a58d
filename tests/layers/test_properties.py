"""What holds of every method of the ``layers`` stage, whatever it is given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, DrawFn, SearchStrategy
from safetensors.torch import save_file
from torch import Tensor, nn

from spatiotoken.layers.aim_prune import aim_count
from spatiotoken.layers.base import LayerReducer
from spatiotoken.layers.depth import layer_index
from spatiotoken.layers.fastv import fastv_count
from spatiotoken.layers.framefusion import FrameFusion
from spatiotoken.layers.holitom_merge import holitom_merge_count
from spatiotoken.layers.spatten import SpAtten, spatten_count
from spatiotoken.layers.sttm import STTM
from spatiotoken.registry import METHODS
from spatiotoken.structures import LayerReduction, LayerTokens
from spatiotoken.tokens.budgets import whole_share
from tests.cases import KEEP_ALL, REDUCED
from tests.drawing import Grid, Scene, drawn, grids, instances, scenes

ALL: dict[str, type[LayerReducer]] = dict(sorted(METHODS["layers"].items().items()))  # type: ignore[arg-type]

MAY_DROP_ALL = ("aim_prune", "dyvte", "todre_drop", "yopo")
IN_PLACE = ("framefusion", "sttm")
"""Methods that merge along the grid: into the first token, no newlines, and no two grids."""
FROM_ZERO = ("sttm", "zipvl_tokens")
"""Methods whose first layer may be the model's first."""
EXACT: dict[str, dict[str, Any]] = {"aim_prune": {"temperature": 1.0}, "sparsevlm": {"recycle": 0.0}}
"""Settings at which equal tokens are not told apart by rounding."""
HEADS = 2


def _shrinking(number: int, shares: tuple[float, ...]) -> int:
    for share in shares:
        number = whole_share(number, share)
    return number


def _last_of_spatten(method: SpAtten, number: int, steps: int) -> int:
    return spatten_count(number, method.shares, steps - 1, steps)


COUNTS: dict[str, Callable[[Any, int, int], int]] = {
    "aim_prune": lambda m, n, depth: aim_count(
        n, depth, layer_index(m.start, depth), layer_index(m.end, depth), m.least
    ),
    "fastv": lambda m, n, _: fastv_count(n, m.retention),
    "holitom_merge": lambda m, n, _: holitom_merge_count(n, m.retention),
    "lazyllm": lambda m, n, _: _shrinking(n, m.shares),
    "pyramiddrop": lambda m, n, _: whole_share(n, m.keep[-1]),
    "spatten": lambda m, n, depth: _last_of_spatten(m, n, len(range(layer_index(m.layer, depth), depth, m.stride))),
    "transprune": lambda m, n, _: whole_share(n, m.keep[-1]),
    "yopo": lambda m, n, depth: 0 if m.prune_layers(depth) else n,
}
"""How many of ``n`` tokens leave the model, where that is known before they are seen."""


class GatedMLP(nn.Module):
    """An MLP as decoder layers have it; the same for the same number of channels."""

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(dim, 8, bias=False, dtype=dtype) for _ in range(2))
        self.act_fn = nn.SiLU()
        for number, part in enumerate((self.gate_proj, self.up_proj)):
            noise = torch.randn(8, dim, generator=torch.Generator().manual_seed(number))
            part.weight = nn.Parameter(noise.to(dtype), requires_grad=False)


@dataclass(frozen=True)
class Prompt:
    """All rows of a sample between two decoder layers.

    Attributes:
        hidden: ``[L, D]``.
        visual: ``[L]`` bool.
        coordinates: ``[L, 4]``, -1 at words too.
        initial: how many visual tokens there were.
        attention: what weights are like: "soft", "sharp" (mostly 0) or "flat": the same for all keys but the first,
            in whole parts of 2^16, whose sums are exact in any order. Torch adds equal columns in different orders.
        observed: ``[2, L]`` by layer.
    """

    hidden: Tensor
    visual: Tensor
    coordinates: Tensor
    initial: int
    depth: int
    attention: str
    observed: dict[int, Tensor]
    layer: int = 0

    def weights(self, layer: int) -> Tensor:
        """``[heads, L, L]`` of a decoder layer."""
        length = len(self.hidden)
        if self.attention == "flat":
            parts = (2**16 // torch.arange(1, length + 1))[:, None].expand(length, length).tril().float() / 2**16
            return torch.cat([1 - parts[:, 1:].sum(dim=1, keepdim=True), parts[:, 1:]], dim=1).expand(HEADS, -1, -1)
        noise = torch.randn(HEADS, length, length, generator=torch.Generator().manual_seed(1000 * layer + length))
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        return ((200 if self.attention == "sharp" else 2) * noise).masked_fill(later, -torch.inf).softmax(dim=-1)

    def tokens(self, needs: frozenset[str]) -> LayerTokens:
        """No more than ``needs``."""
        places, text = self.visual.nonzero()[:, 0], (~self.visual).nonzero()[:, 0]
        after = text > places[-1]
        before = self.weights(self.layer - 1) if self.layer else None
        here = self.weights(self.layer)

        def weights(rows: Tensor, entering: bool) -> Tensor:
            chosen = here if entering else before
            assert chosen is not None, "nothing is before the first layer"
            return chosen[:, rows]

        def received() -> Tensor:
            assert before is not None
            return before.mean(dim=(0, 1))[places]

        optional = {
            "attention": None if before is None else before[:, -1, places],
            "received": None if before is None else received,
            "hidden": self.hidden[places],
            "coordinates": self.coordinates[places],
            "text": text,
            "asking": after | ~after.any(),
            "rows": lambda rows: self.hidden[rows],
            "weights": weights,
            "observed": {layer: noted[:, places] for layer, noted in self.observed.items()},
        }
        asked = needs | ({"asking"} if "text" in needs else set())
        given = {name: value for name, value in optional.items() if name in asked}
        return LayerTokens(self.layer, self.initial, depth=self.depth, length=len(self.hidden), places=places, **given)

    def without(self, reduction: LayerReduction) -> Prompt:
        """What enters the layer."""
        places, hidden = self.visual.nonzero()[:, 0], self.hidden
        if reduction.hidden is not None:
            hidden = hidden.index_put((places[reduction.kept],), reduction.hidden)
        stays = ~self.visual
        stays[places[reduction.kept]] = True
        observed = {layer: noted[:, stays] for layer, noted in self.observed.items()}
        rows = {"hidden": hidden[stays], "visual": self.visual[stays], "coordinates": self.coordinates[stays]}
        return replace(self, **rows, observed=observed)

    def through(self, method: LayerReducer, noise: float) -> Prompt:
        """What the layer makes of it."""
        observed = dict(self.observed)
        if self.layer in method.observed_layers(self.depth):
            mlp, turned = GatedMLP(self.hidden.shape[1], self.hidden.dtype), self.hidden.roll(1, dims=1) + 1
            parts = [method.observe(part, mlp, self.hidden, turned) for part in ("attention", "mlp")]
            assert all(each.shape == self.hidden.shape[:1] and each.dtype == torch.float32 for each in parts)
            noted = torch.stack(parts)
            observed[self.layer] = (64 * noted).round() / 64 if self.attention == "flat" else noted
        generator = torch.Generator().manual_seed(self.layer)
        size = noise * self.hidden.float().std() if len(self.hidden) > 1 else 0.0
        change = (size * torch.randn(self.hidden.shape, generator=generator)).to(self.hidden.dtype)
        return replace(self, layer=self.layer + 1, hidden=self.hidden + change, observed=observed)


@dataclass(frozen=True)
class Sample:
    """Visual tokens among words: videos and pictures, of which frames were left out, with newlines after them.

    Attributes:
        newlines: after each grid; they are visual tokens too.
        words: before the first grid, before each other one, and after the last.
        share: of the visual tokens that a method before has left.
    """

    scene: Scene
    dim: int
    grids: tuple[Grid, ...]
    newlines: tuple[int, ...]
    words: tuple[int, int, int]
    share: float
    depth: int
    attention: str

    def prompt(self) -> Prompt:
        generator = torch.Generator().manual_seed(self.scene.seed)
        hidden, coordinates, visual = [], [], []

        def add(rows: Tensor, places: Tensor | None, seen: bool) -> None:
            hidden.append(rows)
            coordinates.append(torch.full((len(rows), 4), -1) if places is None else places)
            visual.append(torch.full((len(rows),), seen))

        for number, (grid, newlines) in enumerate(zip(self.grids, self.newlines, strict=False)):
            add(self.scene.rows(self.words[min(number, 1)], self.dim, 100 * number + 70), None, False)
            frames = torch.randperm(2 * grid[0], generator=generator)[: grid[0]].sort().values
            places = torch.cartesian_prod(frames, torch.arange(grid[1]), torch.arange(grid[2]))
            places = torch.nn.functional.pad(places, (1, 0), value=number)
            add(self.scene.tokens(grid, self.dim, 100 * number), places, True)
            add(self.scene.rows(newlines, self.dim, 100 * number + 50), None, True)
        add(self.scene.rows(self.words[2], self.dim, 90), None, False)
        seen = torch.cat(visual)
        left = ~seen | (torch.rand(len(seen), generator=generator) <= self.share)
        left[self.words[0]] = True
        return Prompt(
            torch.cat(hidden)[left],
            seen[left],
            torch.cat(coordinates)[left],
            int(seen[left].sum()),
            self.depth,
            self.attention,
            {},
        )


def samples(gaps: bool) -> SearchStrategy[Sample]:
    """With ``gaps`` tokens may be missing anywhere."""
    return st.builds(
        Sample,
        scene=scenes(),
        dim=st.integers(1, 12),
        grids=st.lists(grids(most=60, frames=12), min_size=1, max_size=3).map(tuple),
        newlines=st.tuples(*[st.integers(0, 3)] * 3),
        words=st.tuples(st.integers(0, 3), st.integers(0, 2), st.sampled_from([5, 1, 40, 0])),
        share=st.sampled_from([1.0, 0.9, 0.5, 0.1] if gaps else [1.0]),
        depth=st.integers(4, 12),
        attention=st.sampled_from(["soft", "flat", "sharp"]),
    )


@st.composite
def layers(draw: DrawFn, name: str, depth: int) -> dict[str, Any]:
    """Fields of the method that name layers, each as its number or as a share of the depth."""

    def places(count: int, first: int) -> list[int | float]:
        indices = draw(st.sets(st.integers(first, depth - 1), min_size=count, max_size=count))
        return [draw(st.sampled_from([index, index / depth or 0])) for index in sorted(indices)]

    known = ALL[name].model_fields
    if "layers" in known:
        return {"layers": places(draw(st.integers(1, 3)), 1)}
    if "start" in known:
        return dict(zip(("start", "end"), places(2, 0), strict=True))
    return {"layer": places(1, 0 if name in FROM_ZERO else 1)[0]} if "layer" in known else {}


def settings(name: str, depth: int, **fixed: Any) -> SearchStrategy[Any]:
    return layers(name, depth).flatmap(lambda places: instances(ALL[name], **{**places, **fixed}))


def check_contract(method: LayerReducer, prompt: Prompt, reduction: LayerReduction) -> None:
    before, kept = prompt.hidden[prompt.visual], reduction.kept
    count = before.shape[0]
    assert kept.dtype == torch.int64 and kept.ndim == 1 and len(kept) <= count
    assert len(kept) or method.name in MAY_DROP_ALL
    assert (kept.diff() > 0).all() and (kept >= 0).all() and (kept < count).all()
    if reduction.assignment is None:
        assert reduction.hidden is None or torch.equal(reduction.hidden, before[kept])
        return
    assert method.merges
    assignment, merged = reduction.assignment, reduction.hidden
    assert assignment.dtype == torch.int64 and assignment.shape == (count,)
    assert assignment.min() >= -1 and assignment.max() < kept.shape[0]
    assert torch.equal(assignment[kept], torch.arange(kept.shape[0]))
    assert merged is not None and merged.dtype == before.dtype and merged.shape == (kept.shape[0], before.shape[1])
    absorbed = assignment >= 0
    check_means(merged, before[absorbed], assignment[absorbed])
    members = torch.bincount(assignment[absorbed])
    lone = members == 1
    assert torch.equal(merged[lone], before[kept[lone]])
    if method.name in IN_PLACE:
        assert absorbed.all()
        assert (kept[assignment] <= torch.arange(count)).all(), "what comes first stays"
        # A newline is nobody's twin.
        coordinates = prompt.coordinates[prompt.visual]
        alone = (coordinates < 0).any(dim=1)
        assert torch.isin(alone.nonzero()[:, 0], kept).all()
        assert (members[assignment[alone]] == 1).all()
        # And no grid merges with another.
        assert torch.equal(coordinates[kept][assignment, 0], coordinates[:, 0])


def check_means(merged: Tensor, tokens: Tensor, assignment: Tensor) -> None:
    """Finite, and in each channel between the least and the greatest of the members, but for rounding."""
    rows, wide = assignment[:, None].expand(tokens.shape), tokens.double()
    low = merged.double().scatter_reduce(0, rows, wide, "amin", include_self=False)
    high = merged.double().scatter_reduce(0, rows, wide, "amax", include_self=False)
    slack = (2 * torch.finfo(merged.dtype).eps + 1e-5) * wide.abs().amax(dim=0)
    assert torch.isfinite(merged).all()
    assert (merged.double() >= low - slack).all() and (merged.double() <= high + slack).all()


def equal(first: Any, second: Any) -> bool:
    """Bit by bit, whatever holds the tensors."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if type(first) is not type(second):
        return False
    if is_dataclass(first):
        return all(equal(getattr(first, each.name), getattr(second, each.name)) for each in fields(first))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def walk(method: LayerReducer, prompt: Prompt, noise: float) -> list[LayerReduction]:
    """What is left before each decoder layer of the visual tokens that reach it, until none does."""
    pruning, observed = method.prune_layers(prompt.depth), method.observed_layers(prompt.depth)
    assert list(pruning) == sorted(set(pruning)) and set(pruning) <= set(range(prompt.depth))
    assert list(observed) == sorted(set(observed)) and set(observed) <= set(range(prompt.depth))
    assert "observed" in method.needs or not observed
    memory: Any = None
    left = []
    while prompt.layer < prompt.depth and prompt.visual.any():
        reduction = LayerReduction(torch.arange(int(prompt.visual.sum())), memory=memory)
        if prompt.layer in pruning:
            tokens = prompt.tokens(method.needs)
            before = copy.deepcopy((tokens, memory))
            reduction = method.reduce(tokens, memory)
            assert equal((tokens, memory), before), "what was given was changed"
            check_contract(method, prompt, reduction)
            assert equal(method.reduce(*before), reduction)
            memory = reduction.memory
        left.append(reduction)
        prompt = prompt.without(reduction).through(method, noise)
    return left


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
@drawn(40)
def test_contract(name: str, data: DataObject) -> None:
    prompt = data.draw(samples(gaps=name != "sttm"), label="sample").prompt()
    method = data.draw(settings(name, prompt.depth), label="method")
    left = [len(each.kept) for each in walk(method, prompt, data.draw(st.sampled_from([0.0, 0.1])))]
    assert left == sorted(left, reverse=True) and left[0] <= prompt.initial
    if name in COUNTS:
        assert left[-1] == COUNTS[name](method, prompt.initial, prompt.depth)


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
@drawn(15)
def test_keep_all(name: str, data: DataObject) -> None:
    """Bit by bit, whatever the other settings are."""
    prompt = data.draw(samples(gaps=name != "sttm"), label="sample").prompt()
    method = data.draw(settings(name, prompt.depth, **KEEP_ALL["layers", name]), label="method")
    left = walk(method, prompt, 0.0)
    assert len(left) == prompt.depth
    for reduction in left:
        assert torch.equal(reduction.kept, torch.arange(prompt.initial))
        assert reduction.hidden is None or torch.equal(reduction.hidden, prompt.hidden[prompt.visual])


@pytest.mark.parametrize("name", ALL)
def test_something_is_reduced(name: str) -> None:
    """By the settings that other tests rely on for that, else what is said here would be of little."""
    sample = Sample(Scene("drifting"), 8, ((8, 2, 3),), (0,), (2, 0, 5), 1.0, 4, "soft")
    left = walk(ALL[name](**REDUCED["layers", name]), sample.prompt(), 0.0)
    assert len(left[-1].kept) < 48


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("words", [(0, 0, 0), (2, 0, 3)])
def test_one_token(name: str, words: tuple[int, int, int]) -> None:
    """It stays, unless the method is one that may drop all, at all settings that reduce more of them."""
    for dtype in (torch.float32, torch.float16):
        sample = Sample(Scene("random", dtype=dtype), 4, ((1, 1, 1),), (0,), words, 1.0, 4, "soft")
        left = walk(ALL[name](**REDUCED["layers", name]), sample.prompt(), 0.0)
        assert all(each.kept.tolist() == [0] for each in left[:-1])
        assert left[-1].kept.tolist() == [0] or (name in MAY_DROP_ALL and not len(left[-1].kept))


@pytest.mark.parametrize("name", [name for name in ALL if name not in IN_PLACE])
@given(data=st.data())
@drawn(15)
def test_of_equal_tokens_the_first_stay(name: str, data: DataObject) -> None:
    sample = data.draw(samples(gaps=True), label="sample")
    alike = replace(sample.scene, content="equal")
    sample = replace(sample, scene=alike, attention="flat", grids=sample.grids[:1], newlines=(0,))
    method = data.draw(settings(name, sample.depth, **EXACT.get(name, {})), label="method")
    for reduction in walk(method, sample.prompt(), 0.0):
        assert torch.equal(reduction.kept, torch.arange(len(reduction.kept)))


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files ``D.safetensors`` with gates of 12 layers for ``D`` channels."""
    folder, generator = tmp_path_factory.mktemp("gates"), torch.Generator().manual_seed(0)
    for dim in range(1, 13):
        shapes = {"w1": (3, 2 * dim), "w2": (2, 3)}
        names = {(layer, part): shape for layer in range(12) for part, shape in shapes.items()}
        tensors = {
            f"visual_gates_router.{layer}.{part}.weight": torch.randn(shape, generator=generator)
            for (layer, part), shape in names.items()
        }
        save_file(tensors, folder / f"{dim}.safetensors")
    return folder


@given(data=st.data())
@drawn(30)
def test_dyvte_with_gates(gates: Path, data: DataObject) -> None:
    prompt = data.draw(samples(gaps=True), label="sample").prompt()
    path = gates / f"{prompt.hidden.shape[1]}.safetensors"
    method = data.draw(settings("dyvte", prompt.depth, weights=path), label="method")
    left = walk(method, prompt, data.draw(st.sampled_from([0.0, 0.1])))
    assert {len(each.kept) for each in left} <= {0, prompt.initial}


@given(data=st.data())
@drawn(40)
def test_framefusion_spends_its_budget(data: DataObject) -> None:
    """On all layers together, once it is done, but for rounding and for one token that is always left."""
    prompt = data.draw(samples(gaps=True), label="sample").prompt()
    method: Any = data.draw(instances(FrameFusion), label="method")
    left = walk(method, prompt, data.draw(st.sampled_from([0.0, 0.1])))
    counts = [prompt.initial, *(len(each.kept) for each in left)]
    done = [layer for layer, each in enumerate(left) if each.memory.phase == "done"]
    if done:
        before, after = counts[: done[0] + 1], counts[done[0] + 1 :]
        assert len(done) == len(after) and set(after) == {after[-1]}
        spent, budget = sum(before[1:]), method.cost * prompt.depth * prompt.initial
        most = spent + len(after) * before[-1]
        assert min(budget, most) - len(after) <= spent + sum(after) <= max(budget, spent + len(after)) + len(after)


@given(data=st.data())
@drawn(30)
def test_sttm_asks_for_whole_frames(data: DataObject) -> None:
    prompt = data.draw(samples(gaps=False), label="sample").prompt()
    tokens = prompt.tokens(STTM.needs)
    places = tokens.needed("coordinates")
    together = (places[:, None, :2] == places[None, :, :2]).all(dim=2).sum(dim=1)
    corners = ((places[:, 2:] == 0).all(dim=1) & (together > 1)).nonzero()[:, 0].tolist()
    if corners:
        others = torch.arange(prompt.initial) != data.draw(st.sampled_from(corners))
        tokens = replace(tokens, hidden=tokens.needed("hidden")[others], coordinates=places[others])
        with pytest.raises(ValueError, match="whole frames"):
            STTM().reduce(tokens, None)
