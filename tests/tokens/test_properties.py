"""What holds of every method of the ``tokens`` stage, whatever it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, DrawFn, SearchStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spatiotoken.config import load_config
from spatiotoken.encoding import FeatureStages
from spatiotoken.patches.adapter import Item
from spatiotoken.registry import METHODS
from spatiotoken.report import Recorder
from spatiotoken.structures import ReducedTokens, VideoFeatures
from spatiotoken.tokens import TokenReducer
from spatiotoken.tokens.aim import aim_count
from spatiotoken.tokens.aot import aot_count
from spatiotoken.tokens.catp import catp_count
from spatiotoken.tokens.cdpruner import cdpruner_count
from spatiotoken.tokens.divprune import divprune_count
from spatiotoken.tokens.downsample import downsample_count
from spatiotoken.tokens.dtd import dtd_count
from spatiotoken.tokens.dycoke import dycoke_count
from spatiotoken.tokens.evs import evs_count
from spatiotoken.tokens.fastvid import fastvid_count
from spatiotoken.tokens.flashvid import flashvid_budget
from spatiotoken.tokens.fopru import fopru_count
from spatiotoken.tokens.globalcom2 import globalcom2_count
from spatiotoken.tokens.hired import hired_count
from spatiotoken.tokens.ktv_tokens import ktv_tokens_count
from spatiotoken.tokens.learning_free import learning_free_count
from spatiotoken.tokens.merging import mean_by_assignment
from spatiotoken.tokens.random import random_count
from spatiotoken.tokens.todre import todre_count
from spatiotoken.tokens.visionzip import visionzip_count
from spatiotoken.tokens.vqtoken_free import vqtoken_free_count
from spatiotoken.tokens.vtc_cls import vtc_cls_count
from tests.cases import KEEP_ALL, REDUCED
from tests.drawing import Grid, Scene, drawn, grids, instances, known_settings, scenes

ALL: dict[str, type[TokenReducer]] = dict(sorted(METHODS["tokens"].items().items()))  # type: ignore[arg-type]
SHARING = [name for name, method in ALL.items() if method.reduce_views is not TokenReducer.reduce_views]
"""Methods whose budget is shared between the views of a picture."""


def tokens_of(grid: Grid) -> int:
    return grid[0] * grid[1] * grid[2]


def _thumbnail(method: Any, grid: Grid) -> int:
    """Tokens of the frame that is a thumbnail, and stays whole beside the budget."""
    return grid[1] * grid[2] if method.thumbnail != "none" and grid[0] > 1 else 0


COUNTS: dict[str, Callable[[Any, Grid], int | None]] = {
    "aim": lambda m, g: g[0] * aim_count(g[1] * g[2], m.retention),
    "aot": lambda m, g: aot_count(g, m.retention, m.keep, m.clips),
    "catp": lambda m, g: catp_count(tokens_of(g), m.retention),
    "cdpruner": lambda m, g: cdpruner_count(tokens_of(g), m.retention),
    "divprune": lambda m, g: divprune_count(tokens_of(g), m.retention),
    "downsample": lambda m, g: downsample_count(g, m.retention),
    "dtd": lambda m, g: m.retention and g[1] * g[2] + (g[0] - 1) * dtd_count(g[1] * g[2], m.retention),
    "dycoke": lambda m, g: dycoke_count(g[0], g[1] * g[2], m.merging_ratio, m.reference),
    "evs": lambda m, g: evs_count(g, m.retention),
    "fastvid": lambda m, g: fastvid_count(g, m.retention),
    "fopru": lambda m, g: fopru_count(g, m.retention),
    "globalcom2": lambda m, g: globalcom2_count(tokens_of(g), m.retention),
    "hired": lambda m, g: hired_count(tokens_of(g), m.retention),
    "ktv_tokens": lambda m, g: ktv_tokens_count(tokens_of(g), m.retention),
    "learning_free": lambda m, g: learning_free_count(tokens_of(g), m.retention),
    "random": lambda m, g: random_count(tokens_of(g), m.retention),
    "todre": lambda m, g: todre_count(tokens_of(g), m.retention),
    "visionzip": lambda m, g: visionzip_count(g, m.retention),
    "vqtoken_free": lambda m, g: None if m.adaptive else vqtoken_free_count(tokens_of(g), m.retention),
    "vtc_cls": lambda m, g: vtc_cls_count(g, m.retention),
}
"""How many tokens are kept, where that is known before they are seen."""

BOUNDS: dict[str, Callable[[Any, Grid], float]] = {
    # Rounded over the clip.
    "divprune": lambda m, g: max(1, round(tokens_of(g) * m.retention)),
    "random": lambda m, g: max(1, round(tokens_of(g) * m.retention)),
    # At least one token a frame; rounded up, or to the nearest, frame by frame.
    "aim": lambda m, g: tokens_of(g) * m.retention + g[0],
    "downsample": lambda m, g: max(g[0], tokens_of(g) * m.retention),
    "vidcom2": lambda m, g: tokens_of(g) * m.retention + g[0],
    # Rounded up frame by frame, and again where frames share clusters.
    "flashvid": lambda m, g: g[0] * sum(flashvid_budget(g[1] * g[2], m.retention, m.selected)) + g[0] - 1,
    # Rounded up frame by frame, to the nearest in each window of at least two frames.
    "holitom": lambda m, g: tokens_of(g) * m.retention + 1.25 * g[0],
    "ts_llava_tokens": lambda m, g: _thumbnail(m, g) + max(1, (tokens_of(g) - _thumbnail(m, g)) * m.retention),
    # The first frame is whole.
    "dtd": lambda m, g: (
        tokens_of(g) if m.retention is None else g[1] * g[2] + (g[0] - 1) * (g[1] * g[2] * m.retention + 1)
    ),
    "evs": lambda m, g: max(g[1] * g[2], tokens_of(g) * m.retention),
}
"""Most tokens that a method with a retention may keep, where these are more than that share of all, and than one."""

PLAIN_MEANS = ("downsample", "learning_free", "prunevid", "visionzip", "vqtoken_free")
"""Methods whose survivors are the plain means of the tokens that are assigned to them."""


def saliency(kind: str, rows: int, grid: Grid, seed: int) -> Tensor:
    """``[rows, T * H * W]`` attention: softmax weights, alike for all tokens, all on few, or the same in all frames."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, grid[0], grid[1] * grid[2], generator=generator)
    if kind == "same":
        logits = logits[:, :1].expand_as(logits)
    weights = ({"flat": 0.0, "sharp": 200.0}.get(kind, 2.0) * logits).softmax(dim=-1)
    # Towers that see the whole clip at once leave frames with nothing.
    return (weights * (torch.rand(grid[0], 1, generator=generator) < 0.5) if kind == "sharp" else weights).flatten(1)


@dataclass(frozen=True)
class Clip:
    """What a method is given: all that it may ask for, of a tower of any depth."""

    grid: Grid
    scene: Scene
    depth: int = 24
    dim: int = 16
    tower_dim: int = 16
    attention: str = "soft"
    summaries_of_their_own: bool = True
    question: int = 5

    def video(self, method: TokenReducer) -> VideoFeatures:
        hidden = self.scene.tokens(self.grid, self.tower_dim, 10)
        summary = hidden.unflatten(0, (self.grid[0], -1)).mean(dim=1)
        if self.summaries_of_their_own:
            summary = self.scene.rows(self.grid[0], self.tower_dim, 30)
        return VideoFeatures(
            self.scene.tokens(self.grid, self.dim),
            self.grid,
            saliency=saliency(self.attention, len(method.saliency_layers(self.depth)), self.grid, self.scene.seed),
            hidden=hidden,
            keys=self.scene.tokens(self.grid, self.tower_dim, 20).float(),
            frame_features=summary,
            question=self.scene.rows(self.question, self.dim, 40),
        )


def clips(grid: SearchStrategy[Grid]) -> SearchStrategy[Clip]:
    return st.builds(
        Clip,
        grid=grid,
        scene=scenes(),
        depth=st.integers(2, 26),
        dim=st.integers(1, 12),
        tower_dim=st.integers(1, 6),
        attention=st.sampled_from(["soft", "flat", "sharp", "same"]),
        summaries_of_their_own=st.booleans(),
        question=st.integers(0, 5),
    )


def tensors(video: VideoFeatures) -> dict[str, Tensor]:
    every = {field.name: getattr(video, field.name) for field in fields(video)}
    return {name: value for name, value in every.items() if isinstance(value, Tensor)}


def bare(method: TokenReducer, video: VideoFeatures) -> VideoFeatures:
    """A copy with no more than the method says that it reads."""
    left = set(tensors(video)) - {"embeddings"} - method.needs
    copies = {name: value.clone() for name, value in tensors(video).items()}
    return replace(video, **{**copies, **dict.fromkeys(left)})


def check_contract(method: TokenReducer, video: VideoFeatures, reduced: ReducedTokens) -> None:
    tokens, kept = video.embeddings, reduced.source.shape[0]
    assert reduced.source.dtype == reduced.assignment.dtype == torch.int64
    assert 1 <= kept <= video.num_tokens
    assert (reduced.source.diff() > 0).all() and reduced.source[0] >= 0 and reduced.source[-1] < video.num_tokens
    assert reduced.assignment.shape == (video.num_tokens,)
    assert reduced.assignment.min() >= -1 and reduced.assignment.max() < kept
    assert torch.equal(reduced.assignment[reduced.source], torch.arange(kept))
    assert reduced.embeddings.dtype == tokens.dtype and reduced.embeddings.shape == (kept, tokens.shape[1])
    if method.merges:
        check_within(reduced.embeddings, tokens)
        if method.name in PLAIN_MEANS:
            torch.testing.assert_close(reduced.embeddings, mean_by_assignment(tokens, reduced.assignment, kept))
    else:
        assert torch.equal(reduced.embeddings, tokens[reduced.source])
        assert int((reduced.assignment >= 0).sum()) == kept, "what is dropped is assigned to none"


def check_within(merged: Tensor, tokens: Tensor) -> None:
    """Finite, and in each channel between the least and the greatest of the tokens, but for rounding."""
    merged, tokens, slack = merged.double(), tokens.double(), 2 * torch.finfo(merged.dtype).eps + 1e-5
    assert torch.isfinite(merged).all()
    low, high = tokens.aminmax(dim=0)
    slack = slack * tokens.abs().amax(dim=0)
    assert (merged >= low - slack).all() and (merged <= high + slack).all()


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
@drawn(100)
def test_contract(name: str, data: DataObject) -> None:
    method: Any = data.draw(instances(ALL[name]), label="method")
    video = data.draw(clips(grids()), label="clip").video(method)
    before = bare(method, video)
    reduced = method.reduce(video)
    kept = reduced.source.shape[0]
    check_contract(method, video, reduced)
    for field, value in tensors(before).items():
        assert torch.equal(getattr(video, field), value), f"{field} was changed"
    again = method.reduce(before)
    assert all(torch.equal(value, getattr(again, field)) for field, value in vars(reduced).items())
    if name in COUNTS and (expected := COUNTS[name](method, video.grid)) is not None:
        assert kept == expected
    if "retention" in ALL[name].model_fields:
        bound = BOUNDS.get(name, lambda m, g: max(1, tokens_of(g) * m.retention))(method, video.grid)
        assert kept <= bound + 1e-6


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
@drawn(20)
def test_keep_all(name: str, data: DataObject) -> None:
    """Bit by bit, whatever the other settings are."""
    method: Any = data.draw(instances(ALL[name], **KEEP_ALL["tokens", name]), label="method")
    video = data.draw(clips(grids()), label="clip").video(method)
    reduced, index = method.reduce(video), torch.arange(video.num_tokens)
    assert torch.equal(reduced.embeddings, video.embeddings) and reduced.embeddings.dtype == video.embeddings.dtype
    assert torch.equal(reduced.source, index) and torch.equal(reduced.assignment, index)


@st.composite
def pictures(draw: DrawFn) -> tuple[Clip, Grid, tuple[int, int]]:
    """A picture as a whole, the grid of its tiles when joined (cut where padded, perhaps made smaller), the tiles."""
    whole = draw(clips(st.tuples(st.just(1), st.integers(1, 9), st.integers(1, 9))))
    tiles = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    grid = [count * length for count, length in zip(tiles, whole.grid[1:], strict=True)]
    cut, shrink = draw(st.integers(0, 1)), draw(st.sampled_from([1, 1, 2, 3]))
    grid[cut] = draw(st.integers(1, grid[cut]))
    return whole, (1, -(-grid[0] // shrink), -(-grid[1] // shrink)), tiles


@pytest.mark.parametrize("name", SHARING)
@given(data=st.data())
@drawn(200)
def test_views_of_a_picture(name: str, data: DataObject) -> None:
    method: Any = data.draw(instances(ALL[name]), label="method")
    whole, grid, tiles = data.draw(pictures(), label="picture")
    views = [whole.video(method), replace(replace(whole, grid=grid).video(method), tiles=tiles)]
    views = views[: data.draw(st.sampled_from([2, 2, 2, 1]), label="views")]
    reduced = method.reduce_views(views)
    assert len(reduced) == len(views)
    for view, left in zip(views, reduced, strict=True):
        check_contract(method, view, left)
        if method.retention == 1:
            assert left.source.shape[0] == view.num_tokens
    kept = sum(left.source.shape[0] for left in reduced)
    assert kept <= sum(max(1, view.num_tokens * method.retention) for view in views) + 1e-6


class Watch(TorchDispatchMode):
    """Notes how many bytes the largest tensor has that anything makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [each for each in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(each, Tensor)]
        self.largest = max([self.largest, *(each.untyped_storage().nbytes() for each in made)])
        return out


@pytest.mark.parametrize("frames", [64, pytest.param(256, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ALL)
def test_memory_is_not_quadratic(name: str, frames: int) -> None:
    """8 KiB per token: a sixth of what all pairs of tokens of 64 frames take, a twenty-fourth of those of 256.

    Most reach 64 bytes per token, which is a copy of it. VQToken's blocks of 64 MiB are the most for 64 frames; those
    of DivPrune, 4 KiB per token, for 256.
    """
    clip, left = Clip((frames, 14, 14), Scene("drifting")), []
    for settings in known_settings(ALL[name]):
        method = ALL[name](**settings)
        video = clip.video(method)
        with Watch() as watch:
            reduced = method.reduce(video)
        left.append(reduced.source.shape[0] / video.num_tokens)
        assert watch.largest <= 8 * 1024 * video.num_tokens
    assert min(left) < 1, "nothing was reduced"


class Sighted:
    """An adapter of a model whose whole output is the features of one video of 2 x 2 x 2 tokens."""

    trailing = (0,)

    def items(self, core: Any, kind: str, encoding: Any) -> list[Item]:
        return [Item.of_grid((2, 2, 2))]

    def read(self, output: Any) -> list[Tensor]:
        return [output.features]

    def write(self, output: Any, features: list[Tensor], sizes: list[int]) -> None:
        output.features = features[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["evs", "downsample", "prunevid"])
def test_features_that_are_not_finite_are_refused(name: str, value: float) -> None:
    """By whatever the method: merging would spread them, and nothing can be ranked by them."""
    adapter: Any = Sighted()
    stages = FeatureStages(adapter, None, load_config({"tokens": {"method": name, **REDUCED["tokens", name]}}))
    output, recorder = SimpleNamespace(features=torch.randn(8, 4)), Recorder(torch.device("cpu"), 1)
    stages.run("video", {}, lambda _: output, recorder)
    output.features = torch.randn(8, 4)
    output.features[5, 2] = value
    with pytest.raises(ValueError, match="video features contain NaN or infinity"):
        stages.run("video", {}, lambda _: output, recorder)
