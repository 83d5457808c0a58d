"""Configs, the registry and the undo log: what is found, what is refused and how it is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import spatiotoken
from spatiotoken import ConfigError, PatchConfig, available, load_config, patch_model
from spatiotoken.config import config_schema, presets
from spatiotoken.patches.adapter import ADAPTERS, find_adapter
from spatiotoken.registry import METHODS, STAGES, Registry, UnknownNameError
from spatiotoken.tokens.divprune import DivPrune
from spatiotoken.tokens.evs import EVS
from spatiotoken.undo import Undo, UndoError
from tests.conftest import QUESTION, Family


def test_a_preset_a_path_a_dict_and_a_config_are_equal(tmp_path: Path) -> None:
    preset = load_config("divprune")
    path = tmp_path / "mine.yaml"
    path.write_text(preset.to_yaml())
    assert load_config(path) == load_config(str(path)) == load_config(preset.to_dict()) == load_config(preset) == preset
    assert preset.tokens == DivPrune(retention=0.098)


def test_overrides() -> None:
    config = load_config("balanced", **{"tokens.retention": 0.5, "images": True, "layers": None})
    assert config.tokens == DivPrune(retention=0.5) and config.images and config.layers is None
    swapped = load_config("balanced", **{"tokens.retention": 0.5, "tokens.method": "evs"})
    assert swapped.tokens == EVS(retention=0.5)
    assert load_config({}, **{"tokens.method": "evs"}).to_dict()["tokens"]["method"] == "evs"


BAD: list[tuple[Any, dict[str, Any], list[str]]] = [
    ("ballanced", {}, ["'ballanced'", "did you mean 'balanced'", "aggressive"]),
    ("no/such/file.yaml", {}, ["no/such/file.yaml"]),
    ({"tokens": {"method": "divprune", "retention": 0}}, {}, ["tokens.retention", "0", "greater than 0"]),
    ({"tokens": {"method": "divprune", "retention": 1.5}}, {}, ["tokens.retention", "1.5", "less than or equal to 1"]),
    ({"tokens": {"method": "divprune", "retentoin": 0.5}}, {}, ["'tokens.retentoin'", "divprune", "retention"]),
    ({"tokens": {"method": "divprun"}}, {}, ["'divprun'", "did you mean 'divprune'", "evs"]),
    ({"tokens": {"retention": 0.5}}, {}, ["'method'", "divprune"]),
    ({"tokens": 5}, {}, ["tokens", "5"]),
    ({"tokenz": {"method": "evs"}}, {}, ["'tokenz'", "tokens"]),
    ({"tokens": {"method": "fastv"}}, {}, ["'fastv'", "'tokens'", "evs"]),
    ({"tokens": {"method": "evs", "retention": True}}, {}, ["retention", "True is not a number"]),
    ({"layers": {"method": "pyramiddrop", "layers": [False]}}, {}, ["layers", "False is not a number"]),
    ({"tokens": "evs"}, {"tokens.retention": 0.5}, ["tokens.retention", "'evs'", "'method'"]),
    (None, {}, ["a preset's name", "None"]),
    ({"images": "perhaps"}, {}, ["images", "perhaps"]),
    ({}, {"tokens.retention": 0.5}, ["tokens.retention", "tokens.method"]),
    ({}, {"tokenz.retention": 0.5}, ["tokenz", "frames, vision, tokens, layers, attention"]),
    ("evs", {"tokens.retention": 2}, ["tokens.retention", "2"]),
    ("evs", {"tokens.nothing": 2}, ["tokens.nothing", "retention"]),
]


@pytest.mark.parametrize(("config", "overrides", "said"), BAD, ids=lambda value: str(value)[:40])
def test_wrong_configs_say_what_is_allowed(config: Any, overrides: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(config, **overrides)
    message = str(error.value)
    assert "\n" not in message
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tokens: {method: evs}\ntokens: {method: random}", "'tokens' is given twice"),
        ("tokens: {method: evs", "not valid YAML"),
        ("- 1\n- 2", "must be a mapping"),
        ("", "must be a mapping"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        load_config(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="wrong.yaml"):
        load_config(path)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_config(tmp_path)


def test_yaml_cannot_build_objects(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("tokens: !!python/object/apply:os.system ['true']")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(path)


def test_order_of_overrides() -> None:
    for keys in (("tokens", "tokens.method", "tokens.retention"), ("tokens.retention", "tokens.method", "tokens")):
        values = {"tokens": {"method": "random"}, "tokens.method": "evs", "tokens.retention": 0.7}
        config = load_config({}, **{key: values[key] for key in keys})
        assert config.tokens == EVS(retention=0.7)
    built = load_config({"tokens": DivPrune(retention=0.5)}, **{"tokens.retention": 0.7})
    assert built.tokens == DivPrune(retention=0.7)


def test_schema_describes_every_method() -> None:
    schema = config_schema()
    json.dumps(schema)
    for stage in STAGES:
        variants = schema["properties"][stage]["anyOf"]
        named = {v["properties"]["method"]["const"]: v for v in variants if "properties" in v}
        assert set(named) == set(METHODS[stage].items())
        for name, variant in named.items():
            assert set(variant["properties"]) == {"method", *METHODS[stage].get(name).model_fields}
            assert variant["additionalProperties"] is False


def test_registry_is_guarded() -> None:
    registry: Registry[type] = Registry("thing", (), "spatiotoken.no-such-group")
    registry.register("a", int)
    registry.register("a", int)
    with pytest.raises(ValueError, match="'a' is already registered"):
        registry.register("a", str)
    with pytest.raises(UnknownNameError, match="unknown thing 'b'; supported: a"):
        registry.get("b")


THIRD_PARTY = """
from spatiotoken.structures import ReducedTokens
from spatiotoken.tokens import TokenReducer

class EverySecond(TokenReducer, method="every_second"):
    \"\"\"Keeps every second token.\"\"\"

    def reduce(self, video):
        import torch
        return ReducedTokens.pruned(video, torch.arange(0, video.num_tokens, 2))
"""


@pytest.mark.parametrize("broken", [False, True])
def test_entry_points_of_others(tmp_path: Path, broken: bool) -> None:
    (tmp_path / "others.py").write_text("raise RuntimeError('boom')" if broken else THIRD_PARTY)
    (tmp_path / "others-1.0.dist-info").mkdir()
    (tmp_path / "others-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (tmp_path / "others-1.0.dist-info" / "entry_points.txt").write_text("[spatiotoken.methods]\nsecond = others\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import spatiotoken as s; " + (
        "print(s.load_config({'tokens': {'method': 'every_second'}}).tokens.name)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if broken:
        assert result.returncode != 0 and "entry point 'second'" in result.stderr and "boom" in result.stderr
    else:
        assert result.stdout.strip() == "every_second", result.stderr


def test_importing_costs_nothing() -> None:
    heavy = ["flash_attn", "triton", "decord", "av", "torchcodec", "transformers", "torch"]
    code = f"import spatiotoken, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    # torch and transformers may import triton; what counts is that using us adds nothing to that.
    loaded = f"[name for name in {heavy[:5]} if name in sys.modules]"
    code = (
        f"import sys, transformers.modeling_utils; before = {loaded}; from spatiotoken import patch_model, load_video; "
    )
    code += f"print([name for name in {loaded} if name not in before])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_names_of_the_package() -> None:
    assert set(spatiotoken.__all__) <= set(dir(spatiotoken))
    for name in spatiotoken.__all__:
        assert getattr(spatiotoken, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        spatiotoken.no_such_name  # noqa: B018


def test_undo() -> None:
    class Thing:
        def __init__(self) -> None:
            self.kept = 1

        def method(self) -> int:
            return 1

    thing, undo = Thing(), Undo()
    undo.set(thing, "method", lambda: 2)
    undo.set(thing, "kept", 3)
    undo.set(thing, "kept", 4)
    assert (thing.method(), thing.kept) == (2, 4)
    ours, thing.method = thing.method, lambda: 5  # type: ignore[method-assign]
    with pytest.raises(UndoError, match="Thing.method"):
        undo.revert()
    assert thing.kept == 4
    thing.method = ours  # type: ignore[method-assign]
    undo.revert()
    assert thing.__dict__ == {"kept": 1} and thing.method() == 1
    undo.revert()


def test_unsupported_models_are_named(families: dict[str, Family]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    llama = LlamaForCausalLM(LlamaConfig(**tiny))
    before = dict(llama.__dict__)
    with pytest.raises(ValueError, match="'llama'.*supported.*qwen2_5_vl"):
        patch_model(llama, "evs")
    assert llama.__dict__ == before
    model = families["qwen2_vl"].model
    with pytest.raises(ValueError, match="AutoModelForImageTextToText"):
        patch_model(model.model, "evs")
    with pytest.raises(ValueError, match="not a transformers model"):
        patch_model(object(), "evs")  # type: ignore[type-var]
    assert type(find_adapter(model)).__name__ == "QwenVL"


def test_nothing_is_half_patched(families: dict[str, Family], monkeypatch: pytest.MonkeyPatch) -> None:
    family = families["qwen2_vl"]
    model = family.model
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    wrong: list[tuple[Any, dict[str, Any]]] = [
        ("no-such-preset", {}),
        ("evs", {"tokens.retention": 0}),
        ("fastv", {"layers.layer": 4}),
    ]
    for config, overrides in wrong:
        with pytest.raises(ValueError):
            patch_model(model, config, **overrides)
    model.model.language_model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="flex_attention.*supported: sdpa"):
        patch_model(model, "sliding_vertical")
    model.model.language_model.config._attn_implementation = "sdpa"
    monkeypatch.setattr("spatiotoken.attention.dispatch.register", lambda base: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        patch_model(model, "aggressive")
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before


def test_a_failed_patch_leaves_the_old_one(families: dict[str, Family]) -> None:
    family = families["qwen2_vl"]
    inputs = family.inputs([("video", "pancake", 8), QUESTION])
    with spatiotoken.patched(family.model, "evs"):
        expected = family.logits(inputs)
        with pytest.raises(ConfigError):
            patch_model(family.model, "evs", **{"tokens.retention": 3})
        assert (family.logits(inputs) == expected).all()


def test_compiled_and_peft_models_are_refused(families: dict[str, Family]) -> None:
    import torch

    model = families["qwen2_vl"].model
    with pytest.raises(ValueError, match="compile"):
        patch_model(torch.compile(model), "evs")

    class Wrapper:
        peft_config: dict[str, Any] = {}

        def get_base_model(self) -> Any:
            return model

    with pytest.raises(ValueError, match="get_base_model"):
        patch_model(Wrapper(), "evs")  # type: ignore[type-var]


def test_available_describes_everything() -> None:
    listed = available()
    assert list(listed["methods"]) == list(STAGES)
    evs = next(method for method in listed["methods"]["tokens"] if method["name"] == "evs")
    assert evs["paper"] == "2510.14624" and evs["summary"].startswith("Efficient video sampling")
    assert [parameter["name"] for parameter in evs["parameters"]] == ["positions", "retention"]
    assert {config["name"] for config in listed["configs"]} == set(presets())
    assert listed["models"] == sorted(ADAPTERS.items())
    json.dumps(listed)


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_round_trip(name: str) -> None:
    config = load_config(name)
    assert config.description.endswith(".")
    assert load_config(yaml.safe_load(config.to_yaml())) == config
    assert isinstance(config, PatchConfig)


def test_presets_at_a_percentage() -> None:
    """One file, any retention; nothing else of the preset changes."""
    whole, tenth = load_config("holitom"), load_config("holitom-10")
    assert tenth.tokens == load_config("holitom", **{"tokens.retention": 0.1}).tokens
    assert load_config("holitom-25").tokens != tenth.tokens and tenth.images == whole.images
    assert tenth.description.endswith("; retention of 10 %.")
    assert load_config("fastv-15").layers == load_config("fastv", **{"layers.retention": 0.15}).layers
    for name in presets():
        for percent in (10, 15, 20, 25):
            method = next(iter(load_config(name).methods().values()), None)
            if method is not None and method.stage == "tokens" and "retention" in type(method).model_fields:
                assert load_config(f"{name}-{percent}").tokens.retention == percent / 100  # type: ignore[union-attr]
    for wrong, match in (
        ("evs-0", "1 to 100"),
        ("evs-101", "1 to 100"),
        ("kmeans-10", "no retention"),
        ("evs-x", "evs"),
    ):
        with pytest.raises(ConfigError, match=match):
            load_config(wrong)


def test_scorers() -> None:
    """A kind alone, whole, or in part: what is left out is the method's own."""
    short, whole = load_config("kmeans", **{"frames.scorer": "dinov2"}), {"kind": "dinov2"}
    assert short == load_config("kmeans", **{"frames.scorer": whole}) == load_config(short.to_dict())
    part = load_config("aks", **{"frames.scorer": {"batch": 4}})
    assert part == load_config("aks", **{"frames.scorer.batch": 4})
    assert part.frames is not None and part.to_dict()["frames"]["scorer"] == {
        "kind": "clip",
        "model": None,
        "revision": None,
        "batch": 4,
        "cache": "~/.cache/spatiotoken",
    }
    both = load_config({"frames": {"method": "aks", "scorer": "siglip2"}}, **{"frames.scorer.cache": None})
    assert (
        both.to_dict()["frames"]["scorer"]["kind"] == "siglip2" and both.to_dict()["frames"]["scorer"]["cache"] is None
    )


@pytest.mark.parametrize(
    ("preset", "key", "value", "message"),
    [
        (
            "aks",
            "frames.scorer",
            "dinov2",
            "aks compares frames with the question, which 'dinov2' cannot; supported: clip",
        ),
        ("kmeans", "frames.scorer.kind", "dino", "frames.scorer.kind: 'dino' is not allowed"),
        ("kmeans", "frames.scorer.size", 3, "unknown key 'frames.scorer.size'; supported kind, model, revision"),
        ("kmeans", "frames.scorer.batch", 0, "frames.scorer.batch: 0 is not allowed"),
        ("kmeans", "frames.scorer.model", "x", "scorer 'pixels' takes no model or revision"),
        ("kmeans", "frames.scorer", 3, "frames.scorer: 3 is not allowed"),
    ],
)
def test_wrong_scorers(preset: str, key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(preset, **{key: value})


def test_schema_of_scorers_can_be_followed() -> None:
    schema = config_schema()
    variants = {
        v["properties"]["method"]["const"]: v for v in schema["properties"]["frames"]["anyOf"] if "properties" in v
    }
    scorer = variants["aks"]["properties"]["scorer"]
    assert scorer["default"]["kind"] == "clip"
    definition = schema["$defs"][scorer["$ref"].removeprefix("#/$defs/")]
    kinds, whole = definition["anyOf"]
    assert "siglip2" in kinds["enum"] and "revision" in whole["properties"]
