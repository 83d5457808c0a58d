"""The card of a trained probe model, with the accuracy that it has."""

from __future__ import annotations

from pathlib import Path

from spatiotoken.config import load_config
from spatiotoken.probe.dataset import examples
from spatiotoken.probe.evaluate import PROBE_MARK, ask, load_probe_model
from spatiotoken.probe.scenes import FPS, SIDE

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [video, probe, spatiotoken]
---

# spatiotoken probe, {architecture}

A video LLM of {millions:.1f} million parameters in the `{model_type}` architecture of Hugging Face Transformers. It
answers questions about made videos of coloured shapes and nothing else. It exists to measure what token reduction and
sparse attention cost in accuracy where no large model can be run.

**Input**: videos of {side} x {side} pixels (others are resized), made for 16 frames at {fps:g} frames a second, and one
question in the words of the probe.

## Training

- **Data**: {scenes:,} scenes of the `train` split of `spatiotoken.probe` (seed {seed}), up to 8 questions each. They
  are generated; nobody's pictures or texts are in them.
- **Steps**: {steps:,}, of which the first teach the vision tower alone. `scripts/train_probe.py --model-type
  {model_type}` does it again; the course is in `spatiotoken/probe/training.py`, its
  curves in `curves.jsonl`.
- **Hardware**: {hardware}, {minutes} minutes, bfloat16 arithmetic, torch {torch}.

## Accuracy

On {questions:,} questions of the `test` split at 16 frames, unpatched, float32; an answer is one of the question's
options. Blank: the same with grey frames, to see that the text gives nothing away.

| family | accuracy, % | 95 % interval | blank, % | chance, % | questions |
|---|---|---|---|---|---|
{table}

## Licence

Apache-2.0, as spatiotoken.
"""


def model_card(directory: Path, questions: int) -> str:
    """The card of the model in a directory, measured on the first ``questions`` of the test split."""
    model, processor = load_probe_model(directory)
    dense = {"dense": load_config("dense")}
    seen = ask(model, processor, dense, examples("test", questions))["dense"].run("dense")
    blank = ask(model, processor, dense, examples("test", questions), blank=True)["dense"].run("blank")
    rows = []
    for family, score in seen.families.items():
        low, high = score.interval
        figures = [score.accuracy, blank.families[family].accuracy, score.chance]
        accuracy, unseen, chance = (f"{100 * figure:.1f}" for figure in figures)
        rows.append(
            f"| {family} | {accuracy} | {100 * low:.1f} to {100 * high:.1f} | {unseen} | {chance} | {score.n} |"
        )
    return _CARD.format(
        architecture=type(model).__name__.removesuffix("ForConditionalGeneration"),
        model_type=model.config.model_type,
        millions=model.num_parameters() / 1e6,
        side=SIDE,
        fps=FPS,
        questions=questions,
        table="\n".join(rows),
        **getattr(model.config, PROBE_MARK),
    )
