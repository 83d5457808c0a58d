"""By what frames are described: the settings. ``frames.encoders`` opens what they name."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

Kind = Literal["pixels", "dinov2", "clip", "siglip2", "tower"]

DEFAULT_MODELS: dict[str, str] = {
    "dinov2": "facebook/dinov2-small",
    "clip": "openai/clip-vit-base-patch32",
    "siglip2": "google/siglip2-base-patch16-224",
}


class Scorer(BaseModel):
    """What describes frames, and compares them with the question.

    ``pixels`` averages colours and needs no model; ``dinov2``, ``clip`` and ``siglip2`` are models of their own;
    ``tower`` is the vision tower of the model that answers. The question can be compared by ``clip``, ``siglip2`` and
    ``tower``.

    Raises:
        ValueError: a model or revision for a kind that is none of its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    kind: Kind = Field(default="pixels", description="pixels, dinov2, clip, siglip2 or tower")
    model: str | None = Field(
        default=None, min_length=1, description="hub id or directory; by default a small released one of its kind"
    )
    revision: str | None = Field(default=None, min_length=1, description="branch, tag or commit of that model")
    batch: int = Field(default=32, ge=1, description="frames that are described at once")
    cache: str | None = Field(
        default="~/.cache/spatiotoken",
        min_length=1,
        description="directory where what was found is kept for the next question; null for none",
    )

    @model_validator(mode="before")
    @classmethod
    def _by_kind(cls, value: Any) -> Any:
        """``clip`` is short for ``{kind: clip}``."""
        return {"kind": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"enum": list(get_args(Kind))}, handler(core_schema)]}

    @model_validator(mode="after")
    def _names_a_model(self) -> Scorer:
        if self.kind not in DEFAULT_MODELS and (self.model is not None or self.revision is not None):
            raise ValueError(f"scorer {self.kind!r} takes no model or revision; {', '.join(DEFAULT_MODELS)} do")
        return self

    @property
    def reads_text(self) -> bool:
        return self.kind in ("clip", "siglip2", "tower")

    @property
    def model_name(self) -> str:
        """The model that is opened.

        Raises:
            ValueError: this kind has none of its own.
        """
        name = self.model or DEFAULT_MODELS.get(self.kind)
        if name is None:
            raise ValueError(f"scorer {self.kind!r} has no model of its own")
        return name
