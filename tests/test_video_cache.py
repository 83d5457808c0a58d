"""One video, many questions: what is remembered, that it changes no answer, and that it goes away again."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spatiotoken import VideoCache, load_config, patch_model, patched, unpatch_model
from spatiotoken.patches.adapter import find_adapter
from spatiotoken.picture_store import Recent
from tests.cases import REDUCED, config_of
from tests.conftest import QUESTION, Family

QUESTIONS = (QUESTION, "Which colour is the ball that the tall person throws?")
EVS = config_of(("tokens", "evs"), REDUCED["tokens", "evs"])
TOME = config_of(("vision", "tome"), REDUCED["vision", "tome"])
REUSING = {
    "dense": load_config("dense"),
    "fast_tower": load_config("dense", fast_tower=True),
    "vision": TOME,
    "tokens": EVS,
    "question": config_of(("tokens", "cdpruner"), REDUCED["tokens", "cdpruner"]),
    "frames": config_of(("frames", "uniform"), REDUCED["frames", "uniform"]),
    "layers": config_of(("layers", "fastv"), REDUCED["layers", "fastv"]),
}
SHARED = {
    "tokens": EVS,
    "merging": config_of(("tokens", "aim"), REDUCED["tokens", "aim"]),
    "frames": REUSING["frames"],
    "layers": config_of(("layers", "sttm"), REDUCED["layers", "sttm"]),
    "uneven layers": config_of(("layers", "yopo"), REDUCED["layers", "yopo"]),
    "dense": load_config("dense"),
    "images": load_config(EVS, images=True),
}
SALIENT = config_of(("tokens", "visionzip"), REDUCED["tokens", "visionzip"])


def prompt(family: Family, question: str = QUESTION, clip: str = "pancake") -> dict[str, Tensor]:
    return family.inputs([("video", clip, 8), question])


def assert_same(actual: Any, expected: Any, **tolerance: float) -> None:
    """The same answer, token for token, by the same scores."""
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.scores), torch.stack(expected.scores), **tolerance)


@contextmanager
def counted_towers(family: Family) -> Iterator[list[int]]:
    """How many rows entered the vision tower at each run."""
    adapter = find_adapter(family.model)
    runs: list[int] = []
    first = adapter.tower_layers(adapter.core(family.model))[0]
    handle = first.register_forward_pre_hook(
        lambda _, args, kwargs: runs.append((args[0] if args else kwargs["hidden_states"]).shape[0]), with_kwargs=True
    )
    try:
        yield runs
    finally:
        handle.remove()


def ours(model: Any) -> dict[str, set[str]]:
    """Attributes of every module's instance."""
    return {name: set(module.__dict__) for name, module in model.named_modules()}


# ------------------------------------------------------------------------------------------------------------ outputs


@pytest.mark.parametrize("name", REUSING)
def test_second_question_without_the_tower(family: Family, name: str) -> None:
    prompts = [prompt(family, question) for question in QUESTIONS]
    with patched(family.model, REUSING[name]):
        fresh = [family.generate(inputs) for inputs in prompts]
    with VideoCache(family.model) as cache, patched(family.model, REUSING[name]), counted_towers(family) as runs:
        answers = [family.generate(inputs) for inputs in prompts]
    assert len(runs) == 1 and (cache.hits, cache.misses) == (1, 1) and cache.nbytes > 0
    for actual, expected in zip(answers, fresh, strict=True):
        assert_same(actual, expected, atol=0, rtol=0)


def test_configs_share_and_do_not_disturb_each_other(family: Family) -> None:
    """A method writes into its features; images beside videos; `generate` and plain forwards."""
    inputs = family.inputs([("image", "nasa"), ("video", "pancake", 8), QUESTION])
    configs = (EVS, "dense", SHARED["merging"], EVS)
    fresh = []
    for config in configs:
        with patched(family.model, config):
            fresh.append(family.logits(inputs))
    with VideoCache(family.model) as cache, counted_towers(family) as runs:
        unpatched = family.logits(inputs)
        for config, expected in zip(configs, fresh, strict=True):
            with patched(family.model, config):
                assert torch.equal(family.logits(inputs), expected)
                family.generate(inputs)
    assert torch.equal(unpatched, fresh[1])
    assert len(runs) == 2 == cache.misses and cache.hits == 16


def test_outputs_of_reduced_towers_are_told_apart(family: Family) -> None:
    """From each other, from those of the whole tower, and from what a `frames` method sees of all frames."""
    inputs = family.inputs([("image", "nasa"), ("video", "pancake", 8), QUESTION])
    every = {"method": "longvu", "num_frames": 1000, "scorer": "tower"}
    configs = [
        *("dense", TOME, load_config(TOME, **{"vision.retention": 0.6})),
        *(load_config(TOME, images=True), load_config(TOME, frames=every)),
    ]
    fresh = []
    for config in configs:
        with patched(family.model, config):
            fresh.append(family.logits(inputs))
    assert torch.equal(fresh[1], fresh[4]), "all frames are kept"
    with VideoCache(family.model) as cache, counted_towers(family) as runs:
        for _ in range(2):
            for config, expected in zip(configs, fresh, strict=True):
                with patched(family.model, config):
                    assert torch.equal(family.logits(inputs), expected)
    # Video and image as they are; the video at two retentions; the image at one.
    assert len(runs) == 5 == cache.misses


def test_images_alone(image_family: Family) -> None:
    inputs = image_family.inputs([("image", "nasa"), QUESTION])
    config = load_config(EVS, images=True)
    with patched(image_family.model, config):
        expected = image_family.generate(inputs)
    with VideoCache(image_family.model) as cache, patched(image_family.model, config):
        for _ in range(2):
            assert_same(image_family.generate(inputs), expected, atol=0, rtol=0)
            assert_same(image_family.generate(cache.prefilled(inputs)), expected)
    assert cache.misses == 2  # an output and a prefix


def test_methods_that_look_into_the_tower_have_it_run(family: Family) -> None:
    inputs = prompt(family)
    with patched(family.model, SALIENT):
        expected = family.generate(inputs)
    with VideoCache(family.model) as cache, counted_towers(family) as runs:
        family.generate(inputs)
        with patched(family.model, SALIENT):
            for _ in range(2):
                assert_same(family.generate(inputs), expected, atol=0, rtol=0)
    assert len(runs) == 3 and (cache.hits, cache.misses) == (0, 3)


def test_other_inputs_are_told_apart(qwen: Family) -> None:
    """By their values, their type and their grid."""
    inputs = prompt(qwen)
    pixels, grid = inputs["pixel_values_videos"], inputs["video_grid_thw"]
    other = pixels.clone()
    other[-1, -1] += 1e-3
    turned = grid[:, [0, 2, 1]] if grid[0, 1] != grid[0, 2] else grid * grid.new_tensor([2, 1, 1])
    repeat = int(turned.prod() // grid.prod())
    with torch.no_grad(), VideoCache(qwen.model) as cache:
        for arguments in ((pixels, grid), (other, grid), (pixels.double(), grid), (pixels.repeat(repeat, 1), turned)):
            qwen.model.get_video_features(*arguments)
        assert (cache.hits, cache.misses) == (0, 4)
        qwen.model.get_video_features(pixels.clone(), video_grid_thw=grid.clone(), return_dict=True)
        assert (cache.hits, cache.misses) == (1, 4)


def test_what_a_direct_caller_gets(family: Family) -> None:
    """The same fields at first and later, in the form that the model gives; more of them only from the tower."""
    inputs = prompt(family)
    name = "video_grid_thw"
    rest = {name: inputs[name]} if name in inputs else {}
    pixels = inputs["pixel_values_videos"]
    with torch.no_grad():
        expected = family.model.get_video_features(pixels, **rest)
        with VideoCache(family.model) as cache:
            for _ in range(2):
                output = family.model.get_video_features(pixels, **rest)
                assert type(output.pooler_output) is type(expected.pooler_output)
                assert all(map(torch.equal, output.pooler_output, expected.pooler_output))
                deep = getattr(expected, "deepstack_features", None)
                assert (output.deepstack_features is None) == (deep is None)
                for actual, own in zip(output.deepstack_features or (), deep or (), strict=True):
                    assert all(map(torch.equal, actual, own))
                assert output.last_hidden_state is None
                for tensor in output.pooler_output:
                    tensor.zero_()
            assert cache.hits == 1
            whole = family.model.get_video_features(pixels, **rest, output_hidden_states=True)
            assert isinstance(family.model.model.get_video_features(pixels, **rest, return_dict=False), tuple)
            assert whole.hidden_states is not None and cache.hits == 1


def test_gradients_reach_the_tower(family: Family) -> None:
    fresh = family.fresh()
    inputs = prompt(fresh)
    weight = next(
        parameter for name, parameter in fresh.model.named_parameters() if "visual" in name or "vision" in name
    )
    with VideoCache(fresh.model) as cache:
        fresh.logits(inputs)
        for _ in range(2):
            fresh.model.zero_grad()
            fresh.model(**inputs).logits[:, -1].logsumexp(-1).sum().backward()
            assert weight.grad is not None and weight.grad.abs().sum() > 0
    assert cache.hits == 0


def test_changed_weights_are_noticed(family: Family) -> None:
    fresh = family.fresh()
    adapter = find_adapter(fresh.model)
    projected = [p for p in adapter.core(fresh.model).parameters() if p.ndim == 2][0]
    inputs = prompt(fresh)
    with VideoCache(fresh.model) as cache:
        before = fresh.generate(cache.prefilled(inputs))
        with torch.no_grad():
            projected.mul_(1.5)
        after = fresh.generate(cache.prefilled(inputs))
        assert cache.hits == 0
    assert not torch.equal(before.scores[0], after.scores[0])
    assert_same(after, fresh.generate(inputs))


def test_least_recently_used_goes_first(family: Family) -> None:
    def ask(clip: str) -> None:
        family.logits(prompt(family, clip=clip, question=QUESTION))

    with VideoCache(family.model) as measured:
        sizes = []
        for clip in ("pancake", "nasa", "vp9"):
            before = measured.nbytes
            ask(clip)
            sizes.append(measured.nbytes - before)
    with VideoCache(family.model, max_bytes=sum(sizes) - 1) as cache:
        for clip in ("pancake", "nasa", "pancake", "vp9"):
            ask(clip)
        assert (cache.hits, cache.misses) == (1, 3) and 0 < cache.nbytes < sum(sizes)
        ask("pancake")
        assert (cache.hits, cache.misses) == (2, 3)
        ask("nasa")
        assert (cache.hits, cache.misses) == (2, 4)
    with VideoCache(family.model, max_bytes=min(sizes) - 1) as cache:
        ask("pancake")
        ask("pancake")
        assert (cache.hits, cache.misses, cache.nbytes) == (0, 2, 0)


def test_recent_counts_what_is_put_again_once() -> None:
    recent: Recent[str] = Recent(10)
    recent.put("a", "old", 4)
    recent.put("b", "b", 4)
    recent.put("a", "new", 6)
    assert recent.nbytes == 10 and recent.get("a") == "new" and recent.get("b") == "b"
    recent.put("c", "too large", 11)
    recent.put("d", "d", 1)
    assert recent.get("c") is None and recent.get("a") is None and recent.nbytes == 5


def test_threads(families: dict[str, Family]) -> None:
    family = families["qwen3_vl"]
    prompts = [prompt(family, clip=clip) for clip in ("pancake", "vp9", "nasa")]
    expected = [family.logits(inputs) for inputs in prompts]
    with VideoCache(family.model), ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            for actual, one in zip(pool.map(family.logits, prompts), expected, strict=True):
                assert torch.equal(actual, one)


# --------------------------------------------------------------------------------------------------------------- disk


def test_files_outlive_the_process(family: Family, tmp_path: Path) -> None:
    """Of a model with the same weights, wherever these were loaded from; and not of another."""
    inputs = family.inputs([("image", "nasa"), ("video", "pancake", 8), QUESTION])
    directory = tmp_path / "made" / "when first needed"
    with patched(family.model, EVS):
        expected = family.generate(inputs)
    with VideoCache(family.model, directory=directory), patched(family.model, EVS):
        family.generate(inputs)
    assert sorted(file.suffix for file in directory.iterdir()) == [".safetensors"] * 2
    family.model.save_pretrained(tmp_path / "elsewhere")
    again = Family(family.name, type(family.model).from_pretrained(tmp_path / "elsewhere").eval(), None, {})
    with VideoCache(again.model, directory=directory) as cache, patched(again.model, EVS):
        with counted_towers(again) as runs:
            assert_same(again.generate(inputs), expected, atol=0, rtol=0)
        assert not runs and cache.hits == 2 and cache.nbytes > 0
    adapter = find_adapter(again.model)
    with torch.no_grad():
        adapter.tower_attention(adapter.tower_layers(adapter.core(again.model))[0]).register_parameter(
            "more", torch.nn.Parameter(torch.ones(3))
        )
    with VideoCache(again.model, directory=directory) as cache:
        again.generate(inputs)
        assert (cache.hits, cache.misses) == (0, 2)


@pytest.mark.parametrize("damage", ["cut", "empty", "other tensors", "no safetensors"])
def test_damaged_files_are_made_anew(
    families: dict[str, Family], tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    from safetensors.torch import save_file

    family = families["qwen3_vl"]
    inputs = prompt(family)
    with VideoCache(family.model, directory=tmp_path):
        expected = family.logits(inputs)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    if damage == "other tensors":
        save_file({"features": torch.zeros(3)}, file, metadata={"parts": '{"pooler_output": {"set": [7]}}'})
    else:
        file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "no safetensors": b"x" * len(whole)}[damage])
    with caplog.at_level(logging.WARNING), VideoCache(family.model, directory=tmp_path) as cache:
        assert torch.equal(family.logits(inputs), expected)
    assert cache.misses == 1 and str(file) in caplog.text
    assert file.read_bytes() == whole and list(tmp_path.iterdir()) == [file]


def test_directory_that_cannot_be_written(families: dict[str, Family], tmp_path: Path) -> None:
    family = families["qwen2_vl"]
    (tmp_path / "file").write_text("in the way")
    with VideoCache(family.model, directory=tmp_path / "file" / "cache"):
        with pytest.raises(OSError, match="cannot keep features of pictures in"):
            family.logits(prompt(family))
    assert "get_video_features" not in family.model.model.__dict__


# ----------------------------------------------------------------------------------------------------------- prefixes


@pytest.mark.parametrize("name", SHARED)
def test_prefix_answers_as_a_fresh_run(family: Family, name: str) -> None:
    """Two videos of one size, taking turns, each question with and without a prefix at hand."""
    asked = [(question, clip) for question in QUESTIONS for clip in ("pancake", "nasa")]
    prompts = [family.inputs(["Look:", ("image", "vp9"), ("video", clip, 8), question]) for question, clip in asked]
    with patched(family.model, SHARED[name]):
        fresh = [family.generate(inputs) for inputs in prompts]
    with VideoCache(family.model) as cache, patched(family.model, SHARED[name]), counted_towers(family) as runs:
        answers = [family.generate(cache.prefilled(inputs)) for inputs in (*prompts, *prompts)]
    assert len(runs) == 3  # an image and two videos
    assert cache.misses == 5 and cache.hits == 1 + 6
    for actual, expected in zip(answers, (*fresh, *fresh), strict=True):
        assert_same(actual, expected, atol=1e-4, rtol=1e-4)


def test_prefix_of_an_unpatched_model(family: Family) -> None:
    prompts = [prompt(family, question) for question in QUESTIONS]
    with VideoCache(family.model) as cache:
        for inputs in prompts:
            assert_same(family.generate(cache.prefilled(inputs)), family.generate(inputs), atol=1e-4, rtol=1e-4)
        with patched(family.model, EVS):  # which must not go on with what was made without it
            assert family.generate(cache.prefilled(prompts[0])).past_key_values.layers[0].dropped > 0


def test_conversation_goes_on_after_a_prefix(family: Family) -> None:
    """Two conversations about one video, turn by turn."""
    turn = family.processor.tokenizer(" And then?", return_tensors="pt").input_ids

    def conversation(first: Any) -> Any:
        ids = torch.cat([first.sequences, turn], dim=1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return family.generate(again, past_key_values=first.past_key_values)

    prompts = [prompt(family, question) for question in QUESTIONS]
    with patched(family.model, EVS):
        fresh = [conversation(family.generate(inputs)) for inputs in prompts]
        with pytest.raises(ValueError, match="attach the VideoCache first"), VideoCache(family.model):
            pass
    with VideoCache(family.model) as cache, patched(family.model, EVS):
        firsts = [family.generate(cache.prefilled(inputs)) for inputs in prompts]
        for first, expected in zip(firsts, fresh, strict=True):
            assert_same(conversation(first), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [EVS, load_config("dense")], ids=["tokens", "dense"])
def test_prefix_of_a_slowly_sampled_video(families: dict[str, Family], config: Any) -> None:
    """Temporal positions run ahead of the text's, so a prefix alone does not say where the question stands."""
    family = families["qwen2_5_vl"]
    prompts = [prompt(family, question) | {"second_per_grid_ts": torch.tensor([40.0])} for question in QUESTIONS]
    with patched(family.model, config):
        fresh = [family.generate(inputs) for inputs in prompts]
    with VideoCache(family.model) as cache, patched(family.model, config):
        for inputs, expected in zip(prompts, fresh, strict=True):
            assert_same(family.generate(cache.prefilled(inputs)), expected, atol=1e-4, rtol=1e-4)
        family.generate(cache.prefilled(prompts[0] | {"second_per_grid_ts": torch.tensor([1.0])}))
        assert cache.misses == 3  # an output and two prefixes


def _sharing(name: str) -> Any:
    return [
        pytest.param(config_of(key, settings), id="-".join(key), marks=[] if name == "quick" else [pytest.mark.slow])
        for key, settings in REDUCED.items()
    ]


def check_shared_or_refused(family: Family, config: Any) -> None:
    """Every method either says by name that no prefix can be shared, or answers as a fresh run does."""
    prompts = [prompt(family, question) for question in QUESTIONS]
    ((stage, method),) = config.methods().items()
    with VideoCache(family.model) as cache, patched(family.model, config):
        try:
            answers = [family.generate(cache.prefilled(inputs)) for inputs in prompts]
        except ValueError as error:
            assert f"{stage} method {method.name!r}" in str(error) and "generate(**inputs)" in str(error)
            return
    with patched(family.model, config):
        for inputs, actual in zip(prompts, answers, strict=True):
            assert_same(actual, family.generate(inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", _sharing("quick"))
def test_every_method_shares_or_refuses(families: dict[str, Family], config: Any) -> None:
    check_shared_or_refused(families["llava_onevision"], config)


@pytest.mark.parametrize("config", _sharing("slow"))
def test_every_method_shares_or_refuses_on_every_family(family: Family, config: Any) -> None:
    check_shared_or_refused(family, config)


@pytest.mark.parametrize(
    "key", [("frames", "aks"), ("tokens", "cdpruner"), ("layers", "fastv"), ("attention", "powerattention")]
)
def test_methods_that_look_at_the_question_are_refused(families: dict[str, Family], key: tuple[str, str]) -> None:
    family = families["qwen2_vl"]
    with VideoCache(family.model) as cache, patched(family.model, config_of(key, REDUCED[key])):
        with pytest.raises(ValueError, match=f"{key[0]} method '{key[1]}' .*cannot share a prefix"):
            cache.prefilled(prompt(family))


def test_prompts_without_a_prefix(families: dict[str, Family]) -> None:
    family = families["qwen2_5_vl"]
    inputs = prompt(family)
    with VideoCache(family.model) as cache:
        with pytest.raises(ValueError, match="ask one by one"):
            cache.prefilled(family.inputs([("video", "pancake", 8), QUESTION], [("video", "nasa", 8), QUESTION]))
        with pytest.raises(ValueError, match="no picture"):
            cache.prefilled(family.inputs([QUESTION]))
        last = int((inputs["input_ids"][0] == family.model.config.video_token_id).nonzero().max())
        cut = {name: inputs[name][:, : last + 1] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
        with pytest.raises(ValueError, match="no text follows"):
            cache.prefilled(inputs | cut)
    with pytest.raises(RuntimeError, match="within the `with` block"):
        cache.prefilled(inputs)


# -------------------------------------------------------------------------------------------------------- the model


def test_nothing_stays_on_the_model(family: Family) -> None:
    """After the block, after an error, and with a patch that was left on."""
    inputs = prompt(family)
    expected = family.logits(inputs)
    before = ours(family.model)
    cache = VideoCache(family.model)
    assert ours(family.model) == before
    with cache, patched(family.model, EVS):
        family.generate(cache.prefilled(inputs))
        assert ours(family.model) != before
    assert ours(family.model) == before
    with pytest.raises(KeyError, match="on purpose"), VideoCache(family.model):
        patch_model(family.model, EVS)
        family.logits(inputs)
        raise KeyError("on purpose")
    assert ours(family.model) == before
    assert torch.equal(family.logits(inputs), expected)
    with cache:  # it still knows the video
        assert torch.equal(family.logits(inputs), expected)
    assert cache.hits == 1 and ours(family.model) == before


def test_what_cannot_be_attached(families: dict[str, Family]) -> None:
    model = families["llava_onevision"].model
    patch_model(model, EVS)
    before = ours(model)
    with pytest.raises(ValueError, match="attach the VideoCache first"), VideoCache(model):
        pass
    assert ours(model) == before
    unpatch_model(model)
    with VideoCache(model):
        with pytest.raises(ValueError, match="has a VideoCache already"), VideoCache(model):
            pass
        with pytest.raises(RuntimeError, match="cannot be copied"):
            copy.deepcopy(model)
        assert "get_video_features" in model.model.__dict__
    with pytest.raises(ValueError, match="max_bytes must be at least 0"):
        VideoCache(model, max_bytes=-1)
    with pytest.raises(ValueError, match="supported"):
        VideoCache(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
