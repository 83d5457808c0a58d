"""What is kept comes back, by content; what is damaged is made anew; nobody sees half a file."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from spatiotoken.frames import Scorer
from spatiotoken.frames.cache import FeatureCache, content_key, key, tensor_key
from spatiotoken.frames.encoders import Described, describe_stream, open_encoder
from spatiotoken.frames.keys import model_key
from tests.conftest import DATA
from tests.frames.conftest import pictures

CLIP = DATA / "flipping_a_pancake.mkv"


def description(seed: int = 0, *, patches: bool = True) -> Described:
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(4, 6, 5, generator=generator)
    return Described(parts.mean(dim=1), parts if patches else None)


def same(left: Described | None, right: Described) -> bool:
    assert left is not None
    if left.patches is None or right.patches is None:
        return left.patches is right.patches and torch.equal(left.features, right.features)
    return torch.equal(left.features, right.features) and torch.equal(left.patches, right.patches)


@pytest.mark.parametrize("patches", [False, True])
def test_what_is_put_comes_back(patches: bool, tmp_path: Path) -> None:
    cache, described = FeatureCache(tmp_path / "some" / "where"), description(patches=patches)
    assert cache.get(key("a")) is None and not cache.directory.exists()
    cache.put(key("a"), described)
    assert same(cache.get(key("a")), described) and cache.get(key("b")) is None
    cache.put(key("a"), description(1))
    assert same(FeatureCache(str(cache.directory)).get(key("a")), description(1))
    assert len(list(cache.directory.iterdir())) == 1


def test_slices_and_transposed_values_come_back(tmp_path: Path) -> None:
    whole = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(0))
    described = Described(whole[:, 0], whole[:, 1:].transpose(1, 2))
    cache = FeatureCache(tmp_path)
    cache.put("k", described)
    assert same(cache.get("k"), described)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 4 * whole.numel() + 1000


def test_nothing_is_a_description_of_no_frames(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.put("k", Described(torch.zeros(0, 5), torch.zeros(0, 3, 5)))
    found = cache.get("k")
    assert found is not None and found.features.shape == (0, 5)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    FeatureCache("~/.cache/spatiotoken").put("k", description())
    assert (tmp_path / ".cache" / "spatiotoken" / "k.safetensors").is_file()


# ---------------------------------------------------------------------------------------------------------------- keys


def test_keys_tell_parts_apart() -> None:
    parts: list[tuple[str | bytes, ...]] = [(), ("",), ("", ""), ("ab",), ("a", "b"), ("b", "a"), (b"ab",), ("ab", "")]
    keys = [key(*some) for some in parts]
    assert len(set(keys)) == len(keys)
    assert key("é", b"\x00") == key("é", b"\x00") and int(key("a"), 16) and len(key("a")) == 40


def test_content_and_not_the_name_is_the_key(tmp_path: Path) -> None:
    copy = shutil.copyfile(CLIP, tmp_path / "renamed.mp4")
    assert content_key(copy) == content_key(str(CLIP))
    with open(copy, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    assert content_key(copy) != content_key(CLIP)
    with pytest.raises(FileNotFoundError):
        content_key(tmp_path / "nowhere")


def test_tensors_are_told_apart() -> None:
    base = torch.arange(6, dtype=torch.uint8)
    others: list[Tensor] = [
        base,
        base.view(2, 3),
        base.view(3, 2),
        base.view(2, 3).T,
        base.to(torch.int8),
        base.bfloat16(),
        base.float(),
        base.flip(0),
        base[:0],
        torch.tensor(3.0),
        torch.tensor([True]),
    ]
    assert len({tensor_key(tensor) for tensor in others}) == len(others)
    assert tensor_key(base.view(2, 3).T) == tensor_key(base.view(2, 3).T.contiguous())
    assert tensor_key(base[::2]) == tensor_key(torch.tensor([0, 2, 4], dtype=torch.uint8))


def test_models_are_told_apart_by_weights_and_settings(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        save_file({"w": torch.zeros(2)}, directory / "model.safetensors")
    (second / "README.md").write_text("about")
    (second / "checkpoints").mkdir()
    assert model_key(first) == model_key(second)
    (second / "config.json").write_text("{ }")
    assert model_key(first) != model_key(second)


# -------------------------------------------------------------------------------------------------------------- damage


def damaged(path: Path, how: str) -> None:
    data = path.read_bytes()
    wrong: dict[str, dict[str, Tensor]] = {
        "other names": {"weight": torch.zeros(2, 2)},
        "more names": {"features": torch.zeros(2, 2), "weight": torch.zeros(2, 2)},
        "other type": {"features": torch.zeros(2, 2, dtype=torch.float16)},
        "other shape": {"features": torch.zeros(2)},
        "other frames": {"features": torch.zeros(2, 2), "patches": torch.zeros(3, 2, 2)},
    }
    if how in wrong:
        save_file(wrong[how], path)
    else:
        path.write_bytes({"truncated": data[:-10], "header": data[:20], "empty": b"", "text": b"<html>" * 99}[how])


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "header",
        "empty",
        "text",
        "other names",
        "more names",
        "other type",
        "other shape",
        "other frames",
    ],
)
def test_damaged_entries_are_made_anew(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = FeatureCache(tmp_path)
    cache.put("k", description())
    damaged(tmp_path / "k.safetensors", how)
    with caplog.at_level(logging.WARNING, "spatiotoken"):
        assert cache.get("k") is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "k.safetensors" in caplog.text and "described anew" in caplog.text
    assert same(cache.get_or_put("k", description), description())
    caplog.clear()
    assert same(cache.get("k"), description()) and not caplog.records


def test_what_is_missing_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert FeatureCache(tmp_path).get("k") is None and not caplog.records


def test_unwritable_directories_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        cache = FeatureCache(directory)
        with pytest.raises(OSError, match="scorer: {cache: null}") as caught:
            cache.put("k", description())
        assert str(directory) in str(caught.value) and "\n" not in str(caught.value)


def test_failed_writes_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: str) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spatiotoken.frames.cache.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        FeatureCache(tmp_path).put("k", description())
    assert not list(tmp_path.iterdir())


def test_many_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    descriptions = [description(seed) for seed in range(3)]
    FeatureCache(tmp_path).put("k", descriptions[0])

    def work(index: int) -> bool:
        cache = FeatureCache(tmp_path)
        cache.put("k", descriptions[index % 3])
        found = cache.get("k")
        return any(same(found, one) for one in descriptions)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(60)))
    assert not caplog.records and [file.name for file in tmp_path.iterdir()] == ["k.safetensors"]


# ------------------------------------------------------------------------------------------------------- with encoders


def test_a_hit_does_not_run_the_model(scorer_models: dict[str, Path], tmp_path: Path) -> None:
    encoder: Any = open_encoder(Scorer(kind="clip", model=str(scorer_models["clip"]), batch=2))
    calls: list[int] = []
    encoder.model.vision_model.register_forward_hook(lambda module, args, output: calls.append(1))
    cache, frames = FeatureCache(tmp_path / "cache"), pictures(4)
    copy = shutil.copyfile(CLIP, tmp_path / "same.mkv")

    def described(path: Path, *, patches: bool = False) -> Described:
        entry = key(encoder.identity, content_key(path), str(patches))
        return cache.get_or_put(entry, lambda: describe_stream(encoder, frames.split(2), patches=patches))

    first = described(CLIP)
    assert len(calls) == 2
    assert same(described(CLIP), first) and same(described(copy), first)
    assert len(calls) == 2
    relevance = encoder.relevance(described(CLIP).features, "what is it")
    assert torch.equal(relevance, encoder.relevance(first.features, "what is it")) and len(calls) == 2
    assert described(CLIP, patches=True).patches is not None and len(calls) == 4
    assert described(DATA / "nasa_13013_rotated.mp4").patches is None and len(calls) == 6


def test_failed_descriptions_are_not_kept(tmp_path: Path) -> None:
    def fails() -> Described:
        raise ValueError("no frames")

    cache = FeatureCache(tmp_path)
    with pytest.raises(ValueError, match="no frames"):
        cache.get_or_put("k", fails)
    assert cache.get("k") is None
