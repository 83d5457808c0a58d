"""How lmms-eval finds this library's models; `test_lmms_eval.py` has it ask them."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import pytest

from spatiotoken.evaluation.lmms_models import MODELS, manifests
from spatiotoken.probe import TINY_MODEL_TYPES


def test_every_family_that_takes_videos_has_a_model() -> None:
    assert sorted(MODELS) == sorted(f"spatiotoken_{name}" for name in TINY_MODEL_TYPES)


def test_installed_entry_point_is_the_list_of_models() -> None:
    (found,) = entry_points(group="lmms_eval.models", name="spatiotoken")
    assert found.load() is manifests


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lmms_eval", "lmms_eval.models", "lmms_eval.models.registry_v2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="need the package lmms-eval, version 0.7 or newer"):
        manifests()
