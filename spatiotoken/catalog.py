"""What there is: methods with their parameters, presets and models, as plain data."""

from __future__ import annotations

from typing import Any

from spatiotoken.config import presets
from spatiotoken.patches.adapter import ADAPTERS
from spatiotoken.registry import METHODS, STAGES, Method


def available() -> dict[str, Any]:
    """Everything that is registered.

    Returns:
        ``{"methods": {stage: [{"name", "summary", "paper", "parameters"}]}, "configs": [{"name", "description"}],
        "models": [model_type]}``, each list sorted by name.
    """
    return {
        "methods": {
            stage: [_describe(method) for _, method in sorted(METHODS[stage].items().items())] for stage in STAGES
        },
        "configs": [{"name": name, "description": config.description} for name, config in presets().items()],
        "models": sorted(ADAPTERS.items()),
    }


def _describe(method: type[Method]) -> dict[str, Any]:
    properties = method.model_json_schema().get("properties", {})
    parameters = [
        {"name": name} | {key: value for key, value in schema.items() if key != "title"}
        for name, schema in properties.items()
    ]
    return {"name": method.name, "summary": method.summary(), "paper": method.paper, "parameters": parameters}
