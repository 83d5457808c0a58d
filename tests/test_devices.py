"""Models on a GPU, or spread over several, where there is none: see ``tests/pretended.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

from spatiotoken import VideoCache, last_report, load_config, patched
from spatiotoken.config import PatchConfig
from spatiotoken.evaluation.sharing import shared_tower
from spatiotoken.probe import TINY_MODEL_TYPES
from spatiotoken.tokens.merging import paired_dot
from tests.cases import REDUCED, config_of, reduced_cases
from tests.conftest import QUESTION, Family, lent
from tests.pretended import DeviceError, Pretended, Pretending, pretending, spread, unwrapped

# The tensors are not there, but a real driver would be asked about them.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU would be asked about pretended devices")
NEWEST = Version(transformers.__version__) >= Version("5.23")
FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
CHOICES = {
    "tokens": config_of(("tokens", "visionzip"), REDUCED["tokens", "visionzip"]),
    "tower": config_of(("vision", "tome"), REDUCED["vision", "tome"]),
    "light": load_config("light"),
}


def batch(family: Family) -> dict[str, Tensor]:
    longer = ("video", "nasa", 8 if family.stacks_videos else 12)
    # Transformers 5.17 itself brings the deepstack features of images and videos together on two devices.
    pictures = [("image", "vp9")] if family.name != "qwen3_vl" or NEWEST else []
    return family.inputs(
        [*pictures, ("video", "pancake", 8), QUESTION],
        ["Describe", longer, ("video", "nasa", 8), "the scene in detail."],
        ["How many people are there?"],
    )


def there(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(FIRST) for name, value in inputs.items()}


def assert_same(actual: Any, expected: Any) -> None:
    assert torch.equal(unwrapped(actual.sequences), expected.sequences)
    scores = torch.stack(unwrapped(actual.scores))
    torch.testing.assert_close(scores, torch.stack(expected.scores), atol=1e-3, rtol=1e-3)


def _plain_dot(first: Tensor, second: Tensor) -> Tensor:
    return (first.float() * second.float()).sum(dim=-1)


@pytest.fixture(autouse=True)
def equal_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU sums products in another order, which would decide between tokens that are as good as equal."""
    monkeypatch.setattr(paired_dot, "__code__", _plain_dot.__code__)


def _cases() -> list[Any]:
    """Every method on every family; by default on one, in turn."""
    return [
        pytest.param(
            name,
            *case.values,
            id=f"{name}-{case.id}",
            marks=[] if place == number % len(TINY_MODEL_TYPES) else [pytest.mark.slow],
        )
        for number, case in enumerate(reduced_cases())
        for place, name in enumerate(TINY_MODEL_TYPES)
    ]


@pytest.mark.parametrize(("name", "config"), _cases())
def test_devices_make_no_difference(
    name: str, config: PatchConfig, families: dict[str, Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of pictures, videos and text through a model that is spread over two devices."""
    if config.attention and "backend" in type(config.attention).model_fields:
        # What runs on a GPU by default, and when a pattern is not worth it, is another matter.
        told = config.to_dict()
        config = load_config({**told, "attention": {**told["attention"], "backend": "reference"}})
    for family in lent(families[name]):
        inputs = batch(family)
        with patched(family.model, config):
            expected = family.generate(inputs, new=1)
            kept = last_report(family.model).visual_kept
        with spread(family.model, monkeypatch), patched(family.model, config):
            assert_same(family.generate(there(inputs), new=1), expected)
            assert last_report(family.model).visual_kept == kept


@pytest.mark.parametrize("config", [pytest.param(config, id=name) for name, config in CHOICES.items()])
def test_one_device(family: Family, config: PatchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch(family)
    with patched(family.model, config):
        expected = family.generate(inputs)
        with pretending(family.model, monkeypatch):
            assert_same(family.generate(there(inputs)), expected)


@pytest.mark.parametrize("config", ["evs", "tome", "light"])
def test_video_cache(family: Family, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = (QUESTION, "Which colour is the pan?")
    asked = [family.inputs([("video", "pancake", 8), question]) for question in questions]
    with patched(family.model, config):
        expected = [family.generate(inputs) for inputs in asked]
    with spread(family.model, monkeypatch), VideoCache(family.model) as cache, patched(family.model, config):
        for inputs, answer in zip(asked, expected, strict=True):
            assert_same(family.generate(there(inputs)), answer)
        assert (cache.hits, cache.misses) == (1, 1)
        if config == "evs":  # the others look at the question, or at what comes after the pictures
            for inputs, answer in zip(asked, expected, strict=True):
                assert_same(family.generate(cache.prefilled(there(inputs))), answer)


def test_shared_tower(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch(family)
    expected = {}
    for name in ("dense", "evs"):
        with patched(family.model, name):
            expected[name] = family.generate(inputs)
    with spread(family.model, monkeypatch), shared_tower(family.model):
        for name, answer in expected.items():
            with patched(family.model, name):
                assert_same(family.generate(there(inputs)), answer)


def test_images_only(image_family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = image_family.inputs([("video", "pancake", 4), QUESTION], ["What?"])
    config = load_config("visionzip", images="frames")
    with patched(image_family.model, config):
        expected = image_family.generate(inputs)
    with spread(image_family.model, monkeypatch), patched(image_family.model, config):
        assert_same(image_family.generate(there(inputs)), expected)


def test_pretended_devices_refuse_what_a_gpu_refuses() -> None:
    here, scalar, index = torch.arange(6.0).view(2, 3), torch.tensor(2.0), torch.tensor([1, 0])
    with Pretending():
        one, other, place = here.to(FIRST), here.to(SECOND), index.to(FIRST)
        for mixed in (
            lambda: one + here,
            lambda: one + other,
            lambda: torch.cat([one, here]),
            lambda: one @ here.T,
            lambda: here[place],
            lambda: one[index.to(SECOND)],
            lambda: one.index_select(0, index),
            lambda: one.masked_fill(here > 2, 0.0),
            lambda: one.__setitem__(place, here),
            lambda: one.index_put_((place,), here),
            lambda: one.index_copy(0, place, here),
            lambda: torch.where(one > 2, one, here),
        ):
            with pytest.raises(DeviceError, match="on cuda:0|on cpu"):
                mixed()
        assert (one * scalar).device == FIRST and torch.equal((one * scalar).cpu(), here * 2)
        assert one[index].device == FIRST and torch.equal(one[index].cpu(), here[index])
        assert one[:, [1, 0]].tolist() == here[:, [1, 0]].tolist()
        made = torch.zeros_like(one), one.new_ones(2), torch.arange(3, device=one.device), one.float().sum()
        assert all(isinstance(tensor, Pretended) and tensor.device == FIRST for tensor in made)
        one[0] = here[1]
        one[1] = 7
        one += 1
        assert one.tolist() == [[4, 5, 6], [8, 8, 8]] and here.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert one.to(SECOND).device == SECOND and float(one.max()) == 8 and not isinstance(one.cpu(), Pretended)
