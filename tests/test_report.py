"""What reports say about single tokens and layers."""

from __future__ import annotations

import pytest

from spatiotoken import last_report, patched
from tests.conftest import QUESTION, Family

PRUNING = {
    "tokens": {"tokens": {"method": "random", "retention": 0.4}},
    "frames": {"frames": {"method": "uniform", "num_frames": 2}},
    "layers": {"layers": {"method": "fastv", "layer": 2, "retention": 0.5}},
    "all": {
        "frames": {"method": "uniform", "num_frames": 3},
        "tokens": {"method": "random", "retention": 0.5},
        "layers": {"method": "fastv", "layer": 1, "retention": 0.5},
    },
}


@pytest.mark.parametrize("stages", PRUNING)
@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_seen_are_those_of_the_last_layer(family: Family, stages: str, side: str) -> None:
    """Two videos in one sample, one beside an image in the other, and padding."""
    inputs = family.inputs(
        [("video", "pancake", 8), ("video", "nasa", 8), QUESTION],
        [("image", "vp9"), ("video", "vp9", 8), "What?"],
        padding_side=side,
    )
    with patched(family.model, PRUNING[stages]):
        family.logits(inputs)
        report = last_report(family.model)
    places = inputs["input_ids"] == family.model.config.video_token_id
    assert report.seen is not None and [len(row) for row in report.seen] == places.sum(1).tolist()
    images = int((inputs["input_ids"] == family.model.config.image_token_id).sum())
    assert report.layer_tokens[-1] == report.text_tokens + images + sum(map(sum, report.seen))
    assert report.layer_tokens[0] == report.text_tokens + report.visual_kept


def test_merged_tokens_are_seen(family: Family) -> None:
    with patched(family.model, "downsample"):
        family.logits(family.inputs([("video", "pancake", 8), QUESTION]))
        report = last_report(family.model)
    assert report.seen is not None and all(report.seen[0]) and report.visual_kept < report.visual_tokens


def test_nothing_reduced(family: Family) -> None:
    inputs = family.inputs([("video", "pancake", 8), QUESTION], [("video", "nasa", 8), "What?"])
    with patched(family.model, "dense"):
        family.logits(inputs)
        report = last_report(family.model)
    assert report.seen is None
    # Padding is no token.
    assert set(report.layer_tokens) == {int(inputs["attention_mask"].sum())}
    assert report.prefill_flops == report.prefill_flops_dense
