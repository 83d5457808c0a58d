"""What there is: methods with their parameters, presets and models, as plain data."""

from __future__ import annotations

from typing import Any

from spatiotoken.config import presets
from spatiotoken.patches.adapter import ADAPTERS
from spatiotoken.registry import METHODS, STAGES, Method
from spatiotoken.tokens import TokenReducer


def available() -> dict[str, Any]:
    """Everything that is registered.

    Returns:
        ``{"methods": {stage: [{"name", "summary", "paper", "parameters"}]}, "configs": [{"name", "description"}],
        "models": [model_type]}``, each list sorted by name. Methods of the ``tokens`` stage also tell their ``kind``,
        ``needs``, whether they merge (``merges``), arithmetic (``cost``) and what they were compared with
        (``fidelity``).
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
    described = {"name": method.name, "summary": method.summary(), "paper": method.paper, "parameters": parameters}
    if issubclass(method, TokenReducer):
        described |= {
            "kind": method.kind,
            "needs": sorted(method.needs),
            "merges": method.merges,
            "cost": method.cost,
            "fidelity": method.fidelity,
        }
    return described


def methods_page() -> str:
    """``docs/methods.md``: what there is to choose from in the ``tokens`` stage."""
    lines = [_PAGE_HEAD]
    for kind in _KINDS:
        lines += [f"\n## {kind.capitalize()}\n", _TABLE_HEAD]
        for name, method in sorted(METHODS["tokens"].items().items()):
            if issubclass(method, TokenReducer) and method.kind == kind:
                lines.append(_row(name, method))
    return "\n".join(lines) + "\n"


_KINDS = ("temporal redundancy", "segmentation and merging", "importance and diversity", "baseline")
_TABLE_HEAD = """\
| method | paper | what happens to the others | parameters | needs | images | cost | compared with |
|---|---|---|---|---|---|---|---|"""
_PAGE_HEAD = """\
# Methods of the `tokens` stage

Made from the registry by `make methods`. All of them keep the position ids of the tokens that are left, unless
`positions` says otherwise, and leave these in their order in space and time. *Needs* are what a method reads beside the
projected tokens: the attention of the vision tower (saliency), its features before the projector (hidden), its keys, its
summary of each frame, or the embeddings of the question. *Images*: in preset and with `images: true`; other methods run
on images too, where most of those about time leave them alone. T frames, N tokens a frame, D channels. *Compared with*:
the authors' vectors are what their own code returned (`tests/golden`, and vectors whose licence keeps them out of the
repository); "paper only" means that no code could be had or that none was found to be right, and that the method is built
from the text."""


def _row(name: str, method: type[TokenReducer]) -> str:
    fields = {key: field for key, field in method.model_fields.items() if key != "positions"}
    parameters = ", ".join(f"`{key}` {field.get_default()}" for key, field in fields.items()) or "–"
    paper = f"[{method.paper}](https://arxiv.org/abs/{method.paper})" if method.paper else "–"
    images = "in its preset" if presets()[name].images else "–"
    fate = "merged" if method.merges else "dropped"
    needs = ", ".join(sorted(need.replace("_", " ") for need in method.needs)) or "nothing"
    return f"| `{name}` | {paper} | {fate} | {parameters} | {needs} | {images} | {method.cost} | {method.fidelity} |"
