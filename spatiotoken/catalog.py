"""What there is: methods with their parameters, presets and models, as plain data."""

from __future__ import annotations

from typing import Any

from spatiotoken.config import presets
from spatiotoken.layers import LayerReducer
from spatiotoken.patches.adapter import ADAPTERS
from spatiotoken.registry import METHODS, STAGES, Method
from spatiotoken.tokens import TokenReducer


def available() -> dict[str, Any]:
    """Everything that is registered.

    Returns:
        ``{"methods": {stage: [{"name", "summary", "paper", "parameters"}]}, "configs": [{"name", "description"}],
        "models": [model_type]}``, each list sorted by name. Methods of the ``tokens`` stage also tell their ``kind``,
        ``needs``, whether they merge (``merges``), arithmetic (``complexity``) and what they were compared with
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
    described: dict[str, Any] = {
        "name": method.name,
        "summary": method.summary(),
        "paper": method.paper,
        "parameters": parameters,
    }
    if issubclass(method, TokenReducer | LayerReducer):
        described |= {
            "kind": method.kind,
            "needs": sorted(method.needs),
            "merges": method.merges,
            "cost": method.complexity,
            "fidelity": method.fidelity,
        }
    return described


def readme_methods() -> list[str]:
    """Lines of README's table of methods."""
    rows = ["| method | stage | what it does | paper |", "|---|---|---|---|"]
    for stage, methods in available()["methods"].items():
        for method in methods:
            summary = method["summary"].replace("``", "`")
            rows.append(f"| `{method['name']}` | {stage} | {summary} | {_link(method['paper'])} |")
    return rows


def readme_presets() -> list[str]:
    """Lines of README's table of presets."""
    rows = ["| preset | what it does |", "|---|---|"]
    return rows + [f"| `{config['name']}` | {config['description']} |" for config in available()["configs"]]


def _link(paper: str | None) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper})" if paper else "–"


def methods_page() -> str:
    """``docs/methods.md``: what reduces tokens, before and inside the language model."""
    lines = [_PAGE_HEAD]
    reducers = [
        method
        for stage in ("tokens", "layers")
        for _, method in sorted(METHODS[stage].items().items())
        if issubclass(method, TokenReducer | LayerReducer)
    ]
    for kind in _KINDS:
        lines += [f"\n## {kind.capitalize()}\n", _TABLE_HEAD]
        lines += [_row(method) for method in reducers if method.kind == kind]
    return "\n".join(lines) + "\n"


_KINDS = (
    "temporal redundancy",
    "segmentation and merging",
    "importance and diversity",
    "between decoder layers",
    "baseline",
)
_TABLE_HEAD = """\
| method | paper | what happens to the others | parameters | needs | images | cost | compared with |
|---|---|---|---|---|---|---|---|"""
_PAGE_HEAD = """\
# Methods that reduce visual tokens

Of the stages `tokens` (before the language model) and `layers` (inside it); made from the registry by `make methods`.
All of them keep the position ids of the tokens that are left (see
`positions` in README), and leave these in their order in space and time.

*Needs*: what a method reads beside the projected tokens: the attention of the vision tower (saliency), its features
before the projector (hidden), its keys, its summary of each frame, or the embeddings of the question. *Images*: whether
its preset reduces images too; any config does with `images: true`, though methods about time leave a still picture as
it is. *Cost*: T frames, N tokens a frame, D channels. *Compared with*: "authors' vectors" are what the authors' own
code returned on made inputs (`tests/golden`; those whose licence keeps them out of the repository are used where they
are at hand); "in part" where released code is defective or runs where this stage does not, as
[fidelity.md](fidelity.md) lists; "paper
only" where there was no code to compare with."""


def _row(method: type[TokenReducer] | type[LayerReducer]) -> str:
    fields = {key: field for key, field in method.model_fields.items() if key != "positions"}
    cells = [
        f"`{method.name}`",
        _link(method.paper),
        "merged" if method.merges else "dropped",
        ", ".join(f"`{key}` {field.get_default()}" for key, field in fields.items()) or "–",
        ", ".join(sorted(need.replace("_", " ") for need in method.needs)) or "nothing",
        "yes" if presets()[method.name].images else "–",
        method.complexity,
        method.fidelity,
    ]
    return f"| {' | '.join(cells)} |"
