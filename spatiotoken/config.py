"""Configs: the YAML schema, and how one is found, checked, overridden and written.

A config names at most one method per stage::

    description: Global segmentation and merging.
    images: false
    frames: {method: uniform, num_frames: 32}
    tokens: {method: divprune, retention: 0.25}
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, ValidationInfo, field_validator

from spatiotoken.attention import SparsePrefill
from spatiotoken.frames import FrameSelector
from spatiotoken.layers import LayerReducer
from spatiotoken.registry import METHODS, STAGES, Method
from spatiotoken.tokens import TokenReducer
from spatiotoken.vision import TowerReducer


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key, the value and what is allowed, in one line."""


class PatchConfig(BaseModel):
    """What ``patch_model`` does to a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str = Field("", description="one sentence for `spatiotoken list`")
    images: bool | Literal["frames"] = Field(
        False, description="reduce images too, not only videos; frames: those of one prompt together, as one video"
    )
    fast_tower: bool = Field(
        False, description="run the vision tower in fewer calls and less memory; the same values but for rounding"
    )
    frames: SerializeAsAny[FrameSelector] | None = Field(None, description="which frames are seen at all")
    vision: SerializeAsAny[TowerReducer] | None = Field(None, description="fewer patches within the vision tower")
    tokens: SerializeAsAny[TokenReducer] | None = Field(None, description="prune or merge before the language model")
    layers: SerializeAsAny[LayerReducer] | None = Field(None, description="prune or merge between decoder layers")
    attention: SerializeAsAny[SparsePrefill] | None = Field(None, description="compute prefill attention sparsely")

    @field_validator(*STAGES, mode="before")
    @classmethod
    def _build(cls, value: Any, info: ValidationInfo) -> Any:
        return build_method(str(info.field_name), value) if isinstance(value, Mapping) else value

    def methods(self) -> dict[str, Method]:
        """The methods that are set, by stage, in the order in which the data passes them."""
        return {stage: method for stage in STAGES if (method := getattr(self, stage)) is not None}

    @property
    def places_tokens(self) -> bool:
        """Whether a stage inside the model wants to know where in space and time each token lies."""
        return any(stage is not None and "coordinates" in stage.needs for stage in (self.layers, self.attention))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``load_config`` reads back to an equal config."""
        head: dict[str, Any] = {name: getattr(self, name) for name in type(self).model_fields if name not in STAGES}
        return head | {stage: {"method": m.name} | m.model_dump(mode="json") for stage, m in self.methods().items()}

    def to_yaml(self) -> str:
        return dump_yaml(self.to_dict())


def dump_yaml(data: Mapping[str, Any]) -> str:
    """``data`` as this library writes YAML."""
    return yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=120)


def build_method(stage: str, settings: Mapping[str, Any]) -> Method:
    """The method that ``settings`` (``method`` and its parameters) describes.

    Raises:
        ValueError: unknown method, unknown parameter or a value out of range.
    """
    parameters = dict(settings)
    if "method" not in parameters:
        raise ValueError(f"{stage} needs a key 'method'; supported: {', '.join(sorted(METHODS[stage].items()))}")
    method = METHODS[stage].get(str(parameters.pop("method")))
    try:
        return method.model_validate(parameters)
    except ValidationError as error:
        raise ConfigError(_one_line(error, method, f"{stage}.")) from None


def load_config(config: str | Path | Mapping[str, Any] | PatchConfig, /, **overrides: Any) -> PatchConfig:
    """A checked config from a preset's name, a YAML path, a dict or a config.

    Args:
        config: ``"divprune"`` is a preset, ``"divprune-10"`` the same at a retention of 10 %.
        overrides: single keys to change, as ``**{"tokens.retention": 0.1}`` or ``**{"frames.scorer.kind": "clip"}``.
            ``"tokens.method"`` swaps the method and forgets the parameters of the one before; ``tokens=None`` removes
            the stage.

    Raises:
        ConfigError: with the key, the value and what is allowed.
    """
    if isinstance(config, PatchConfig) and not overrides:
        return config  # its methods need not be registered
    data = dict(config.to_dict() if isinstance(config, PatchConfig) else _read(config))
    # Whole stages first, then `stage.method`, which resets the parameters that the others set.
    for key, value in sorted(overrides.items(), key=lambda item: ("." in item[0], not item[0].endswith(".method"))):
        _override(data, key, value)
    try:
        return PatchConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_one_line(error, PatchConfig, "")) from None


def presets() -> dict[str, PatchConfig]:
    """The named configs that come with the library."""
    return {name: load_config(name) for name in _preset_names()}


def config_schema() -> dict[str, Any]:
    """JSON schema of a config file, with every registered method, for editors."""
    schema = PatchConfig.model_json_schema()
    definitions: dict[str, Any] = {}
    for stage in STAGES:
        variants = []
        for name, method in sorted(METHODS[stage].items().items()):
            variant = method.model_json_schema()
            definitions |= variant.pop("$defs", {})  # references in a variant are to the whole schema's
            variant["properties"] = {"method": {"const": name}} | variant.get("properties", {})
            variant["required"] = ["method"]
            variants.append(variant)
        description = schema["properties"][stage]["description"]
        schema["properties"][stage] = {"description": description, "anyOf": [*variants, {"type": "null"}]}
    schema["$defs"] = definitions
    return schema


def _read(config: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    if not isinstance(config, str | Path):
        raise ConfigError(f"a config is a preset's name, a path, a dict or a PatchConfig, not {config!r}")
    path = Path(config)
    percent: int | None = None
    if isinstance(config, str) and path.name == config and path.suffix not in {".yaml", ".yml"}:
        name, percent = _preset_name(config)
        text, where = _preset_text(name), f"preset {name!r}"
    else:
        try:
            text, where = path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read config {str(path)!r}: {error}") from None
    try:
        data = yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must be a mapping of keys, not {type(data).__name__}")
    return data if percent is None else _at_percent(dict(data), percent, where)


class _UniqueKeys(yaml.SafeLoader):
    """Safe, and refuses a key that is given twice, of which the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _preset_name(name: str) -> tuple[str, int | None]:
    """``divprune-10`` is the preset ``divprune`` at a retention of 10 %."""
    base, dash, percent = name.rpartition("-")
    if dash and base in _preset_names() and percent.isdecimal():
        return base, int(percent)
    return name, None


def _at_percent(data: dict[str, Any], percent: int, where: str) -> dict[str, Any]:
    for stage in ("tokens", "layers", "vision"):
        settings = data.get(stage) or {}
        if settings and "retention" in METHODS[stage].get(str(settings.get("method"))).model_fields:
            if not 1 <= percent <= 100:
                raise ConfigError(f"{where} at {percent} %: a retention is a whole percentage from 1 to 100")
            description = f"{str(data.get('description', '')).rstrip('.')}; retention of {percent} %."
            return data | {"description": description, stage: {**settings, "retention": percent / 100}}
    raise ConfigError(f"{where} has no retention ratio that could be {percent} %")


def _preset_names() -> list[str]:
    folder = resources.files("spatiotoken.configs")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def _preset_text(name: str) -> str:
    names = _preset_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(
            f"unknown preset {name!r}{hint}; supported: {', '.join(names)}, one of these with a retention in percent "
            "(divprune-10), or the path of a .yaml file"
        )
    return (resources.files("spatiotoken.configs") / f"{name}.yaml").read_text(encoding="utf-8")


def _override(data: dict[str, Any], key: str, value: Any) -> None:
    stage, _, parameter = key.partition(".")
    if not parameter:
        data[stage] = value
        return
    if stage not in STAGES:
        raise ConfigError(f"cannot set {key!r}: {stage!r} is not a stage; supported: {', '.join(STAGES)}")
    settings = data.get(stage) or {}
    if isinstance(settings, Method):
        settings = {"method": settings.name} | settings.model_dump(mode="json")
    if not isinstance(settings, Mapping):
        raise ConfigError(f"cannot set {key!r}: {stage} is {settings!r}, not a mapping with a key 'method'")
    if parameter == "method":
        data[stage] = {"method": value}
    elif not settings:
        raise ConfigError(f"cannot set {key!r}: the config has no {stage} method; set '{stage}.method' too")
    else:
        name, _, inner = parameter.partition(".")
        if inner:
            whole = settings.get(name, {})
            # A scorer may be given by its kind alone.
            value = (dict(whole) if isinstance(whole, Mapping) else {"kind": whole}) | {inner: value}
        data[stage] = dict(settings) | {name: value}


def _one_line(error: ValidationError, model: type[BaseModel], prefix: str) -> str:
    lines = []
    for issue in error.errors(include_url=False):
        key = prefix + ".".join(map(str, issue["loc"]))
        if issue["type"] == "extra_forbidden":
            known: Any = model if len(issue["loc"]) == 1 else model.model_fields[str(issue["loc"][0])].annotation
            allowed = ", ".join(known.model_fields) or "none"
            if issubclass(known, Method):
                allowed = f"of method {known.name!r}: {allowed}"
            lines.append(f"unknown key {key!r}; supported {allowed}")
        elif issue["type"] == "value_error":
            lines.append(issue["msg"].removeprefix("Value error, "))
        else:
            lines.append(f"{key}: {issue['input']!r} is not allowed: {issue['msg'].lower()}")
    return "; ".join(lines)
