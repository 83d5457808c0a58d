"""What there is: methods with their parameters, presets and models, as plain data."""

from __future__ import annotations

from typing import Any

from spatiotoken.attention import SparsePrefill
from spatiotoken.config import presets
from spatiotoken.frames import FrameSelector
from spatiotoken.layers import LayerReducer
from spatiotoken.patches.adapter import ADAPTERS
from spatiotoken.registry import METHODS, STAGES, Method
from spatiotoken.tokens import TokenReducer
from spatiotoken.vision import TowerReducer


def available() -> dict[str, Any]:
    """Everything that is registered.

    Returns:
        ``{"methods": {stage: [{"name", "summary", "paper", "parameters"}]}, "configs": [{"name", "description"}],
        "models": [model_type]}``, each list sorted by name. Methods also tell their ``kind``, ``needs``, arithmetic
        (``cost``) and what they were compared with (``fidelity``), those of the stages ``tokens`` and ``layers`` also
        whether they merge (``merges``).
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
        {"name": name} | {key: value for key, value in schema.items() if key not in ("title", "$ref")}
        for name, schema in properties.items()
    ]
    described: dict[str, Any] = {
        "name": method.name,
        "summary": method.summary(),
        "paper": method.paper,
        "parameters": parameters,
    }
    if issubclass(method, FrameSelector | TowerReducer | TokenReducer | LayerReducer | SparsePrefill):
        described |= {
            "kind": method.kind,
            "needs": sorted(method.needs),
            "cost": method.complexity,
            "fidelity": method.fidelity,
        }
    if issubclass(method, TokenReducer | LayerReducer):
        described["merges"] = method.merges
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
    """``docs/methods.md``: what chooses frames, reduces patches and tokens, and computes attention sparsely."""
    lines = [_PAGE_HEAD]
    selectors = [method for _, method in sorted(METHODS["frames"].items().items()) if issubclass(method, FrameSelector)]
    for kind in _FRAME_KINDS:
        lines += [f"\n### {kind.capitalize()}\n", _FRAME_TABLE_HEAD]
        lines += [_frame_row(method) for method in selectors if method.kind == kind]
    lines.append(_TOWER_HEAD)
    towers = [method for _, method in sorted(METHODS["vision"].items().items()) if issubclass(method, TowerReducer)]
    for kind in _TOWER_KINDS:
        lines += [f"\n### {kind.capitalize()}\n", _TOWER_TABLE_HEAD]
        lines += [_tower_row(method) for method in towers if method.kind == kind]
    lines.append(_REDUCERS_HEAD)
    known = presets()
    reducers = [
        method
        for stage in ("tokens", "layers")
        for _, method in sorted(METHODS[stage].items().items())
        if issubclass(method, TokenReducer | LayerReducer)
    ]
    for kind in _KINDS:
        lines += [f"\n### {kind.capitalize()}\n", _TABLE_HEAD]
        lines += [_row(method, known[method.name].images is not False) for method in reducers if method.kind == kind]
    lines.append(_ATTENTION_HEAD)
    sparse = [method for _, method in sorted(METHODS["attention"].items().items()) if issubclass(method, SparsePrefill)]
    for kind in _ATTENTION_KINDS:
        lines += [f"\n### {kind.capitalize()}\n", _ATTENTION_TABLE_HEAD]
        lines += [_attention_row(method) for method in sparse if method.kind == kind]
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
_FRAME_KINDS = ("question-agnostic", "question-aware", "several sizes", "equal distances")
_FRAME_TABLE_HEAD = """\
| method | paper | parameters | needs | scorer | cost | compared with |
|---|---|---|---|---|---|---|"""
_PAGE_HEAD = """\
# Methods

Made from the registry by `make methods`. *Compared with*: "authors' vectors" are what the authors' own code returned on
made inputs (`tests/golden`; those whose licence keeps them out of the repository are used where they are at hand); "in
part" where released code is defective or runs where this stage does not, as [fidelity.md](fidelity.md) lists; "authors'
code, by an independent rewrite" where the tests have the released rule written out slowly, which gave what the authors'
code gave when both were run; "paper only" where there was no code to compare with.

## Which frames are seen: `frames`

While a file is decoded (`load_video(path, selector=...)`, `spatiotoken run`) or inside a patched model, before the
vision tower. *Needs*: features of each frame, or of its patches; its relevance to the question; or a score of only
those frames that the method wants to look at. *Scorer*: what makes these by default; any may be set that can:
`pixels` (colours, no model), `dinov2`, `clip`, `siglip2`, or `tower`, the vision tower of the model that answers. The
question is read by the last three. *Cost*: T candidates, K chosen ones, F features, without the scorer's."""
_TOWER_KINDS = ("before the tower", "merging in a frame", "merging over time", "pruning")
_TOWER_TABLE_HEAD = """\
| method | paper | parameters | needs | cost | compared with |
|---|---|---|---|---|---|"""
_TOWER_HEAD = """
## Which patches are computed: `vision`

Within the vision tower. Its output is whole again at the end, each patch with the value of whatever stands for it, so
the language model gets as many tokens as before unless a method of another stage leaves some out. *Needs*: the colours
of the patches, or attention of the layer at hand. *Cost*: T frames, N patches a frame, D channels."""
_REDUCERS_HEAD = """
## Which tokens are left: `tokens` and `layers`

Before the language model, and inside it. All of them keep the position ids of the tokens that are left (see `positions`
in README), and leave these in their order in space and time.

*Needs*: what a method reads beside the projected tokens: the attention of the vision tower (saliency), its features
before the projector (hidden), its keys, its summary of each frame, or the embeddings of the question. *Images*: whether
its preset reduces images too; any config does with `images: true`, though methods about time leave a still picture as
it is. *Cost*: T frames, N tokens a frame, D channels."""


_ATTENTION_KINDS = ("static", "estimated", "approximate")
_ATTENTION_TABLE_HEAD = """\
| method | paper | parameters | needs | cost of the estimate | compared with |
|---|---|---|---|---|---|"""
_ATTENTION_HEAD = """
## Which pairs are computed: `attention`

While a whole prompt is prefilled; decoding is dense. *Static* patterns depend on where tokens are, not on what they
are; *estimated* ones depend on queries and keys, and compute the chosen pairs exactly; *approximate* ones also leave
out queries, or let some keys stand for several. All take `backend`: `auto` picks a kernel for the device, and leaves a
layer to the model's own attention where less than 5 % would be gained. *Cost*: L tokens, d channels, b tokens a
block."""


def _attention_row(method: type[SparsePrefill]) -> str:
    cells = [
        f"`{method.name}`",
        _link(method.paper),
        _parameters(method, {"backend"}),
        ", ".join(sorted(method.needs)) or "nothing",
        method.complexity,
        method.fidelity,
    ]
    return f"| {' | '.join(cells)} |"


def _tower_row(method: type[TowerReducer]) -> str:
    cells = [
        f"`{method.name}`",
        _link(method.paper),
        _parameters(method, set()),
        ", ".join(sorted(method.needs)) or "nothing",
        method.complexity,
        method.fidelity,
    ]
    return f"| {' | '.join(cells)} |"


def _frame_row(method: type[FrameSelector]) -> str:
    scorer = method.model_fields.get("scorer")
    cells = [
        f"`{method.name}`",
        _link(method.paper),
        _parameters(method, {"positions", "scorer"}),
        ", ".join(sorted(method.needs)) or "nothing",
        scorer.get_default().kind if scorer and method.needs else "–",
        method.complexity,
        method.fidelity,
    ]
    return f"| {' | '.join(cells)} |"


def _parameters(method: type[Method], others: set[str]) -> str:
    fields = {key: field for key, field in method.model_fields.items() if key not in others}
    return ", ".join(f"`{key}` {field.get_default()}" for key, field in fields.items()) or "–"


def _row(method: type[TokenReducer] | type[LayerReducer], images: bool) -> str:
    cells = [
        f"`{method.name}`",
        _link(method.paper),
        "merged" if method.merges else "dropped",
        _parameters(method, {"positions"}),
        ", ".join(sorted(need.replace("_", " ") for need in method.needs)) or "nothing",
        "yes" if images else "–",
        method.complexity,
        method.fidelity,
    ]
    return f"| {' | '.join(cells)} |"
