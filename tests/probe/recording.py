"""What the probe models answered when last looked at. ``make record-probe`` writes it anew; review the diff."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from spatiotoken import load_config
from spatiotoken.config import PatchConfig
from spatiotoken.probe.dataset import examples
from spatiotoken.probe.evaluate import ask, load_probe_model
from spatiotoken.probe.keyframes import at_hand
from spatiotoken.probe.models import PROBE_MODEL_TYPES
from spatiotoken.probe.short_prompts import PROBE_SETTINGS
from spatiotoken.registry import METHODS

PATH = Path(__file__).with_name("recorded.json")
ANSWERS, QUESTIONS = 200, 42
# Presets are made for longer videos: at 16 small frames these would reduce nothing.
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"frames.num_frames": 4} for name in METHODS["frames"].items()},
    "f2c": {"frames.num_frames": 6, "frames.full_frames": 3},
    **{
        name: {f"attention.{key}": value for key, value in {"backend": "gather", **settings}.items()}
        for name, settings in PROBE_SETTINGS.items()
    },
}


def methods() -> list[str]:
    return sorted(name for registry in METHODS.values() for name in registry.items())


def preset(method: str) -> PatchConfig:
    return at_hand(load_config(method, **SETTINGS.get(method, {})))


def answers(model_type: str) -> list[str]:
    """What the unpatched model answers to the first questions."""
    model, processor = load_probe_model(model_type)
    return ask(model, processor, {"": load_config("dense")}, examples("test", ANSWERS))[""].answers


def measure(model_type: str, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Accuracy, evidence recall and retention of methods' presets."""
    model, processor = load_probe_model(model_type)
    tallies = ask(model, processor, {name: preset(name) for name in names}, examples("test", QUESTIONS))
    runs = {name: tally.run(name) for name, tally in tallies.items()}
    fields = ("accuracy", "evidence_recall", "retention")
    return {name: {field: round(getattr(run, field), 4) for field in fields} for name, run in runs.items()}


def recorded() -> Mapping[str, Any]:
    return json.loads(PATH.read_text())


def main() -> None:
    torch.set_num_threads(1)  # as in the tests
    document = {kind: {"answers": answers(kind), "methods": measure(kind, methods())} for kind in PROBE_MODEL_TYPES}
    PATH.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {PATH}")


if __name__ == "__main__":
    main()
