"""Adapters: how the features of images and videos lie, whatever their shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spatiotoken import load_video, patched
from spatiotoken.frames.kmeans import KMeans
from spatiotoken.patches.adapter import Part, Segment, find_adapter
from tests.conftest import DATA, QUESTION, Family

NEWLINES_OF_STRIPS = {(10, 300): 0, (300, 10): 12}
"""Images of whose tiles LLaVA leaves nothing but so many newlines."""
SHAPES = [(84, 84), (60, 200), (200, 60), (300, 310), (90, 100), *NEWLINES_OF_STRIPS]
"""Height and width of images: square, wide, tall, larger than the tiles, strips."""


def image_inputs(family: Family, shapes: list[tuple[int, int]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=generator) for shape in shapes]
    content: list[dict[str, str]] = [{"type": "image"} for _ in images] + [{"type": "text", "text": QUESTION}]
    text = family.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(family.processor(text=[text], images=images, return_tensors="pt"))


def encoding_of(family: Family, kind: str, inputs: dict[str, Tensor]) -> dict[str, Any]:
    wanted = {
        "video": ("pixel_values_videos", "video_grid_thw"),
        "image": ("pixel_values", "image_grid_thw", "image_sizes", "batch_num_images"),
    }[kind]
    return {name: inputs[name] for name in wanted if name in inputs}


def features_of(family: Family, kind: str, encoding: dict[str, Any]) -> Tensor:
    """What the model puts at the placeholders, in their order."""
    core = family.model.model
    with torch.inference_mode():
        output = getattr(core, f"get_{kind}_features")(*encoding.values(), return_dict=True)
    return find_adapter(family.model).read(output)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_images_of_any_shape(family: Family, shape: tuple[int, int]) -> None:
    inputs = image_inputs(family, [shape])
    encoding = {k: v for k, v in encoding_of(family, "image", inputs).items() if k != "batch_num_images"}
    adapter, core = find_adapter(family.model), family.model.model
    features = features_of(family, "image", encoding)
    (item,) = adapter.items(core, "image", encoding)
    assert item.size == len(features) == int((inputs["input_ids"] == family.model.config.image_token_id).sum())
    covered = torch.cat([segment.rows(features.device) for segment in item.segments])
    assert len(covered) == len(set(covered.tolist())) == sum(s.grid[0] * s.grid[1] * s.grid[2] for s in item.segments)
    rest = sorted(set(range(len(features))) - set(covered.tolist()))
    if family.stacks_videos:
        newline = (features == core.image_newline).all(dim=1).nonzero()[:, 0]
        assert len(item.segments) == (1 if shape in NEWLINES_OF_STRIPS else 2)
        lines = NEWLINES_OF_STRIPS[shape] if shape in NEWLINES_OF_STRIPS else item.segments[1].grid[1]
        assert rest == newline.tolist() and len(rest) == lines
    else:
        assert not rest


def test_several_images(family: Family) -> None:
    inputs = image_inputs(family, SHAPES)
    with patched(family.model, {"tokens": {"method": "random", "retention": 0.5}, "images": True}):
        assert torch.isfinite(family.logits(inputs)).all()
    items = find_adapter(family.model).items(family.model.model, "image", encoding_of(family, "image", inputs))
    assert len(items) == len(SHAPES)
    assert sum(item.size for item in items) == int((inputs["input_ids"] == family.model.config.image_token_id).sum())


def test_chosen_frames_have_the_features_they_have_alone(family: Family) -> None:
    """Frames are encoded apart from each other, so leaving some out does not change the others."""
    inputs = family.inputs([("video", "pancake", 8), ("video", "nasa", 8), QUESTION])
    adapter, core = find_adapter(family.model), family.model.model
    encoding = encoding_of(family, "video", inputs)
    full, items = features_of(family, "video", encoding), adapter.items(core, "video", encoding)
    chosen = [(0, 2), (1, 3)]
    ((taken, count),) = adapter.take_frames(core, encoding, [[Part(units)] for units in chosen])
    assert count == 2
    part = features_of(family, "video", taken)
    start = start_part = 0
    trailing = (len(full) - sum(item.size for item in items)) // len(items)
    for item, units, part_item in zip(items, chosen, adapter.items(core, "video", taken), strict=True):
        (segment,) = item.segments
        assert isinstance(segment, Segment) and part_item.segments[0].grid == (2, *segment.grid[1:])
        expected = full[start : start + item.size].unflatten(0, (segment.grid[0], -1))[list(units)].flatten(0, 1)
        torch.testing.assert_close(part[start_part : start_part + part_item.size], expected, atol=1e-4, rtol=1e-4)
        start += item.size + trailing
        start_part += part_item.size + trailing


def test_frame_patches_follow_the_picture(family: Family) -> None:
    """Equal frames have equal features, and a cut between two scenes is the largest step."""
    still, moving = (
        family.video("nasa", 1)[0].expand(4, -1, -1, -1),
        family.video("nasa", 1)[0].flip(-1).expand(4, -1, -1, -1),
    )
    frames = torch.cat([still, 255 - moving])
    metadata = {"fps": 8.0, "frames_indices": list(range(8)), "total_num_frames": 8}
    text = family.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
    )
    inputs = family.processor(
        text=[text], videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
    )
    (patches,) = find_adapter(family.model).frame_patches(family.model.model, encoding_of(family, "video", inputs))
    features = patches.flatten(1)
    assert patches.shape[2] == 3 and 0 <= float(patches.min()) and float(patches.max()) <= 1
    steps = (features[1:] - features[:-1]).norm(dim=1)
    units = len(features)
    assert steps.argmax() == units // 2 - 1
    assert float(steps.sum() - steps.max()) < 1e-3 * float(steps.max())


def test_keyframes_while_decoding() -> None:
    path = DATA / "flipping_a_pancake.mkv"
    video = load_video(path, selector=KMeans(num_frames=5), candidate_fps=2.0)
    assert len(video.indices) == 5 and video.frames.shape == (5, 3, 240, 426)
    assert torch.equal(video.frames, load_video(path, indices=video.indices).frames)
    assert all(abs(index / 30 * 2 - round(index / 30 * 2)) < 0.1 for index in video.indices), "candidates only"
