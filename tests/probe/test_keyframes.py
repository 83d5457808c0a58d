"""Evidence that frame selectors find."""

from __future__ import annotations

import pytest
import torch

from spatiotoken.config import load_config
from spatiotoken.frames import ScoredSelector
from spatiotoken.frames.uniform import Uniform
from spatiotoken.probe.dataset import examples
from spatiotoken.probe.evaluate import load_probe_model
from spatiotoken.probe.keyframes import CANDIDATES, KEPT, at_hand, find_needles, selectors
from spatiotoken.registry import METHODS
from spatiotoken.structures import FrameChoice, Frames


def test_selectors_that_ask_nothing_find_letters_that_equal_distances_miss() -> None:
    """A letter shows in a few of 64 frames, of which 8 are kept."""
    names = ("uniform", "kmeans", "dpp", "kffocus", "dcode")
    runs = {run.method: run for run in find_needles({name: selectors()[name] for name in names}, 48)}
    assert runs["uniform"].recall < 0.2 and runs["uniform"].scorer == ""
    for name in names[1:]:
        assert runs[name].recall >= 3 * max(runs["uniform"].recall, KEPT / CANDIDATES), name
        assert runs[name].kept == KEPT and runs[name].scorer == "pixels" and runs[name].accuracy is None


def test_what_is_found_decides_what_is_answered() -> None:
    class Oracle(Uniform):
        """Keeps the frames around those of the letter."""

        name = "oracle"
        shows: object = None

        def select(self, frames: Frames) -> FrameChoice:
            rows = next(self.shows).nonzero()[:, 0]
            first = min(max(int(rows[0]) - 3, 0), CANDIDATES - KEPT)
            return FrameChoice(tuple(range(first, first + KEPT)))

    asked = examples("test", 24, num_frames=CANDIDATES, families={"needle"})
    shows = iter([(e.evidence[..., 2] > e.evidence[..., 0]).any(dim=0) for e in asked])
    model, processor = load_probe_model("qwen2_5_vl")
    found = find_needles({"oracle": Oracle(shows=shows), "uniform": selectors()["uniform"]}, 24, model, processor)
    oracle, uniform = found
    assert oracle.recall == 1 and oracle.accuracy is not None and oracle.accuracy > 0.9
    assert uniform.accuracy is not None and uniform.accuracy < 0.5
    assert oracle.recall_interval == (1, 1)


def test_scorers_at_hand() -> None:
    """Whatever the presets name, nothing has to be downloaded, and nothing else changes."""
    for name, method in selectors().items():
        assert method.num_frames == KEPT and method.name == name
        if isinstance(method, ScoredSelector):
            assert method.scorer.kind == ("tower" if method.needs & {"relevance", "score"} else "pixels")
            given = load_config(name).frames
            others = method.model_dump(exclude={"scorer", "num_frames"})
            assert given is not None and others == given.model_dump(exclude={"scorer", "num_frames"})
    assert set(selectors()) == set(METHODS["frames"].items())
    config = load_config("kmeans")
    assert at_hand(config) == config and at_hand(load_config("evs")) == load_config("evs")
    with pytest.raises(ValueError, match="there is no tower to describe frames: pass a model"):
        find_needles({"aks": selectors()["aks"]}, 1)


def test_mixed_frames_are_seen_mixed() -> None:
    from spatiotoken.probe.keyframes import _seen

    frames = torch.stack([torch.full((3, 64, 64), value, dtype=torch.uint8) for value in (0, 100, 200)])
    mixing = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    seen = _seen(frames, FrameChoice((0, 2), mixing=mixing, scales=(1.0, 0.5)))
    assert seen[0].unique().tolist() == [50] and seen[1].unique().tolist() == [200]
