"""One run of the vision tower for several configs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spatiotoken import patched
from spatiotoken.config import load_config
from spatiotoken.evaluation.sharing import leaves_the_tower_alone, shared_tower
from spatiotoken.patches.adapter import find_adapter
from tests.conftest import QUESTION, Family

PROMPT = [("image", "nasa"), ("video", "pancake", 4), QUESTION]
CONFIGS = ("dense", "random", "divprune", "framefusion", "fastv", "downsample")


@pytest.mark.parametrize(
    ("name", "alone"),
    [("dense", True), ("divprune", True), ("fastv", True), ("visionzip", False), ("kmeans", False), ("holitom", False)],
)
def test_which_configs_may_share(name: str, alone: bool) -> None:
    """Not those that choose frames, or read the tower's attention."""
    assert leaves_the_tower_alone(load_config(name)) == alone


def test_outputs_are_the_same(family: Family) -> None:
    """Bit by bit, and the tower runs once for pictures of a kind."""
    inputs = family.inputs(PROMPT)
    expected = {}
    for name in CONFIGS:
        with patched(family.model, name):
            expected[name] = family.logits(inputs)
    runs = []
    layer = find_adapter(family.model).tower_layers(find_adapter(family.model).core(family.model))[0]
    handle = layer.register_forward_hook(lambda *_: runs.append(1))
    before = dict(find_adapter(family.model).core(family.model).__dict__)
    try:
        with shared_tower(family.model) as tower:
            for name in CONFIGS:
                with patched(family.model, name):
                    assert torch.equal(family.logits(inputs), expected[name]), name
            shared = len(runs)
            assert tower.saved_ms > 0
            tower.active = False
            family.logits(inputs)
            once = len(runs) - shared
            # Transformers 5.17 asks for the output's form by another argument than we do.
            assert once > 0 and shared in (once, 2 * once)
            tower.active, tower.saved_ms = True, 0.0
            other = family.inputs([("image", "pancake"), ("video", "nasa", 4), QUESTION])
            family.logits(other)
            assert len(runs) == shared + 2 * once and tower.saved_ms == 0, "other pictures are not taken for the same"
            tower.forget()
            family.logits(inputs)
            assert len(runs) == shared + 3 * once
    finally:
        handle.remove()
    assert find_adapter(family.model).core(family.model).__dict__ == before


def test_nothing_is_left_after_an_error(family: Family) -> None:
    core: Any = find_adapter(family.model).core(family.model)
    with pytest.raises(RuntimeError, match="on purpose"), shared_tower(family.model):
        raise RuntimeError("on purpose")
    assert not {"get_video_features", "get_image_features"} & core.__dict__.keys()
