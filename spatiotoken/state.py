"""The state of one forward pass of a patched model."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from spatiotoken.report import Recorder

if TYPE_CHECKING:
    from spatiotoken.revival import LooseRows
    from spatiotoken.sequence import Rows


@dataclass(frozen=True)
class RealRows:
    """What an attention mask says of ``length`` keys: the number of each sample that has any, and its real rows."""

    mask: Any
    length: int
    rows: list[tuple[int, slice]]


@dataclass
class Forward:
    """What the wrapped parts of a model tell each other during one pass.

    Attributes:
        owner: the patch of the model that runs; another patched model may run within its pass.
        recorder: collects the report.
        custom_mask: the caller brought a mask of its own making, which only the model's own attention understands.
        tail: how many of the last output rows the caller reads; None for all of them.
        visual: ``[B, K]`` True at visual tokens that may be dropped; None if the pass brings no new pictures.
        rows: what is left of the sequence at the layer at hand; None if nothing is tracked.
        since_entry: ``[B, K]`` which of the rows that entered the language model are left; None while all are.
        counts: visual tokens of each sample that are left, and ``initial`` when they entered the language model.
        texts: words of each sample; all of them stay.
        history: from which decoder layer on which rows were there.
        overrides: position arguments of decoder layers, cut like the sequence.
        masks: the mask of each decoder layer, where not all layers have the same.
        members: ``[members, 3, B, K]`` positions of the members of merged rows; None where rows have their own.
        coordinates: ``[B, L, 4]`` where each visual token lies; None unless a stage inside the model asks.
        memory: what the ``layers`` method wants to know of its earlier layers, by sample.
        absorbed: sample, tokens and survivors of each merge between layers, as rows of the original prompt.
        real_rows: which rows are no padding, as sparse prefill last read it off an attention mask.
        scored: input and position embeddings of the layer whose attention ranks the tokens.
        pictures: ``[B, L]`` True at all visual tokens of the prompt, droppable or not; None without new pictures.
        observed: by decoder layer ``[B, parts, K]`` what the ``layers`` method noted of each row.
        padding: ``[B, K]`` False at padding of new rows on a pruned cache; None if there is none.
        loose: rows that had been dropped and are back, at the layer at hand.
    """

    owner: object
    recorder: Recorder
    tail: int | None = None
    custom_mask: bool = False
    pictures: Tensor | None = None
    visual: Tensor | None = None
    rows: Rows | None = None
    since_entry: Tensor | None = None
    counts: list[int] = field(default_factory=list)
    initial: list[int] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)
    history: list[tuple[int, Rows]] = field(default_factory=list)
    overrides: dict[str, Any] = field(default_factory=dict)
    masks: dict[int, Any] = field(default_factory=dict)
    members: Tensor | None = None
    coordinates: Tensor | None = None
    memory: dict[int, Any] = field(default_factory=dict)
    absorbed: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    real_rows: RealRows | None = None
    scored: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
    observed: dict[int, Tensor] = field(default_factory=dict)
    padding: Tensor | None = None
    loose: LooseRows | None = None


ACTIVE: ContextVar[Forward | None] = ContextVar("spatiotoken_forward", default=None)
"""The pass that is running in this thread."""
