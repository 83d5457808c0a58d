"""What holds of every frame selector, whatever it is shown."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spatiotoken.config import load_config
from spatiotoken.frames import FrameSelector
from spatiotoken.frames.encoders import PixelEncoder
from spatiotoken.registry import METHODS
from spatiotoken.structures import Frames

NAMES = sorted(METHODS["frames"].items())
EXACT = {"uniform", "ts_llava", "kmeans", "dpp", "ktv", "kffocus", "mdp3", "tifre", "aks", "dcode"}
"""Those that keep as many frames as they may; others stop where nothing more is worth it."""


def selector(name: str, **changes: Any) -> FrameSelector:
    method = load_config(name, **{f"frames.{key}": value for key, value in changes.items()}).frames
    assert method is not None
    return method


@st.composite
def videos(draw: st.DrawFn) -> Frames:
    """1 to 40 frames: some alike, some not, at even or uneven times."""
    count = draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kinds = torch.randn(draw(st.integers(1, 5)), 4, 3, generator=generator)
    noise = draw(st.sampled_from([0.0, 1e-4, 0.5]))
    patches = kinds[torch.randint(len(kinds), (count,), generator=generator)]
    patches = patches + noise * torch.randn(count, 4, 3, generator=generator)
    if draw(st.booleans()):
        patches = torch.zeros_like(patches)
    gaps = torch.rand(count, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0.1, 3.0, 60.0]))
    times = gaps.cumsum(0) if draw(st.booleans()) else torch.arange(count, dtype=torch.float64)
    relevance = torch.rand(count, generator=generator) * 2 - 1
    if draw(st.booleans()):
        relevance = torch.full_like(relevance, 0.25)
    return Frames(times, patches.flatten(1), patches, relevance, lambda numbers: relevance[list(numbers)])


@pytest.mark.parametrize("name", NAMES)
@given(frames=videos(), budget=st.integers(1, 45))
@settings(max_examples=30, deadline=None)
def test_choice(name: str, frames: Frames, budget: int) -> None:
    method = selector(name, num_frames=budget)
    choice = method.select(frames)
    kept = len(choice.indices)
    assert 1 <= kept <= min(budget, frames.num_frames)
    assert all(type(index) is int for index in choice.indices)
    assert choice.indices[0] >= 0 and choice.indices[-1] < frames.num_frames, "rising, as FrameChoice itself checks"
    if name in EXACT:
        assert kept == min(budget, frames.num_frames)
    if choice.scores is not None:
        assert choice.scores.shape == (frames.num_frames,) and torch.isfinite(choice.scores).all()
    if choice.mixing is not None:
        assert choice.mixing.shape == (kept, frames.num_frames) and (choice.mixing >= 0).all()
        torch.testing.assert_close(choice.mixing.sum(dim=1), torch.ones(kept))
        own = choice.mixing[torch.arange(kept), list(choice.indices)]
        assert torch.equal(own, choice.mixing.max(dim=1).values), "each frame is mostly itself"
    again = method.select(frames)
    assert (again.indices, again.scales) == (choice.indices, choice.scales), "nothing is left to chance"


@pytest.mark.parametrize("name", NAMES)
@given(frames=videos())
@settings(max_examples=10, deadline=None)
def test_a_video_within_the_budget_is_left_whole(name: str, frames: Frames) -> None:
    changes: dict[str, Any] = {"num_frames": 1000}
    changes |= {"fps": {"rate": 1000.0}, "f2c": {"full_frames": 1000}, "slow_fast": {"fast_share": 1.0}}.get(name, {})
    if name == "fps":
        frames = Frames(torch.arange(frames.num_frames, dtype=torch.float64))
    if name == "longvu":
        changes["num_frames"] = 400
    choice = selector(name, **changes).select(frames)
    assert choice.indices == tuple(range(frames.num_frames))
    assert choice.mixing is None and set(choice.scales or (1.0,)) == {1.0}


@pytest.mark.parametrize("name", NAMES)
def test_needs_are_all_that_is_read(name: str) -> None:
    """A selector is told no more than it asks for, and says so where even that is missing."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(20, 6, 3, generator=generator)
    relevance = torch.rand(20, generator=generator)
    everything = {
        "features": patches.flatten(1),
        "patches": patches,
        "relevance": relevance,
        "score": lambda numbers: relevance[list(numbers)],
    }
    method, times = selector(name, num_frames=5), torch.arange(20, dtype=torch.float64)
    needed = {key: value for key, value in everything.items() if key in method.needs}
    assert method.select(Frames(times, **needed)).indices == method.select(Frames(times, **everything)).indices
    for key in method.needs:
        with pytest.raises(ValueError, match=f"without {key}"):
            method.select(Frames(times, **{other: value for other, value in needed.items() if other != key}))


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_refused(name: str) -> None:
    """By the frames themselves, so that no selector can pass over it."""
    with pytest.raises(ValueError, match="features of the frames contain NaN"):
        selector(name).select(Frames(torch.arange(3.0), torch.tensor([[0.0], [float("nan")], [1.0]])))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_hour(name: str) -> None:
    """3,600 candidates of smooth footage by the pixels."""
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randint(0, 256, (60, 3, 16, 16), generator=generator, dtype=torch.uint8)
    pixels = scenes.repeat_interleave(60, dim=0)
    described = PixelEncoder().describe(pixels, patches=True)
    relevance = torch.rand(3600, generator=generator)
    frames = Frames(
        torch.arange(3600, dtype=torch.float64),
        described.features,
        described.patches,
        relevance,
        lambda numbers: relevance[list(numbers)],
    )
    assert 1 <= len(selector(name, num_frames=32).select(frames).indices) <= 32
