"""What a ``frames`` method is told of the frames that a patched model was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spatiotoken.frames import FrameSelector, ScoredSelector
from spatiotoken.frames.cache import FeatureCache
from spatiotoken.frames.encoders import Described, FrameEncoder, open_encoder
from spatiotoken.frames.keys import key, tensor_key
from spatiotoken.frames.relevance import question_similarity
from spatiotoken.patches.adapter import ModelAdapter
from spatiotoken.structures import Frames

_OWN_MODEL = ("dinov2", "clip", "siglip2")


class Candidates:
    """Describes the temporal units of videos for one selector.

    Args:
        processor: the model's, or its tokenizer.

    Raises:
        ValueError: the selector's model cannot be loaded, or it reads the question and there is no processor.
    """

    def __init__(self, adapter: ModelAdapter, core: Any, method: FrameSelector, processor: Any = None) -> None:
        self.adapter = adapter
        self.core = core
        self.method = method
        self.scorer = method.scorer if isinstance(method, ScoredSelector) else None
        self.encoder: FrameEncoder | None = None
        self.cache: FeatureCache | None = None
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self._template_end = ""
        if self.scorer is None or self.scorer.kind not in _OWN_MODEL:
            return
        if self.method.needs & {"relevance", "score"}:
            if processor is None:
                raise ValueError(
                    f"frames method {method.name!r} with the scorer {self.scorer.kind!r} reads the question: pass "
                    "patch_model(model, config, processor=processor)"
                )
            self._template_end = _template_end(processor)
        self.encoder = open_encoder(self.scorer, core.device)
        if self.scorer.cache is not None:
            self.cache = FeatureCache(self.scorer.cache)

    def of(
        self,
        encoding: dict[str, Any],
        encode: Callable[[dict[str, Any]], Any],
        questions: Sequence[Tensor | None],
        seconds: Tensor | Sequence[float] | None,
    ) -> list[Frames]:
        """One for each video.

        Args:
            encode: the vision tower and the projector.
            questions: ids of the text that follows each video; None where nobody asks for them.
            seconds: of each video the length of a temporal unit; frames are numbered where there are none.
        """
        counts = [item.segments[0].grid[0] for item in self.adapter.items(self.core, "video", encoding)]
        lengths = [1.0] * len(counts) if seconds is None else torch.as_tensor(seconds).tolist()
        times = [
            torch.arange(count, dtype=torch.float64) * float(length)
            for count, length in zip(counts, lengths, strict=True)
        ]
        needs = self.method.needs
        if not needs:
            return [Frames(own) for own in times]
        if self.encoder is not None:
            pictures = self.adapter.pictures(self.core, encoding)
            return [self._by_encoder(*video) for video in zip(times, pictures, questions, strict=True)]
        if self._by_tower:
            units = self._units(encoding, encode)
        else:
            units = self.adapter.frame_patches(self.core, encoding)
        found = []
        for own, patches, question in zip(times, units, questions, strict=True):
            features = patches.mean(dim=1) if self._by_tower else patches.flatten(1)
            relevance = None
            if question is not None:
                words = self.core.get_input_embeddings()(question).to(features.device)
                relevance = question_similarity(features, words.float())
            found.append(self._frames(own, Described(features, patches), relevance))
        return found

    @property
    def _by_tower(self) -> bool:
        return self.scorer is not None and self.scorer.kind == "tower"

    def _frames(self, times: Tensor, described: Described, relevance: Tensor | None) -> Frames:
        needs = self.method.needs
        return Frames(
            times,
            features=described.features if "features" in needs else None,
            patches=described.patches if "patches" in needs else None,
            relevance=relevance if "relevance" in needs else None,
            score=relevance.__getitem__ if "score" in needs and relevance is not None else None,
        )

    @torch.no_grad()
    def _units(self, encoding: dict[str, Any], encode: Callable[[dict[str, Any]], Any]) -> list[Tensor]:
        """``[T, N, D]`` projected tokens of each video."""
        items = self.adapter.items(self.core, "video", encoding)
        features = self.adapter.read(encode(encoding))[0].float()
        trailing = (features.shape[0] - sum(item.size for item in items)) // len(items)
        parts = features.split([item.size + trailing for item in items])
        return [
            rows[: item.size].unflatten(0, (item.segments[0].grid[0], -1))
            for rows, item in zip(parts, items, strict=True)
        ]

    def _by_encoder(self, times: Tensor, pictures: Tensor, question: Tensor | None) -> Frames:
        encoder = self.encoder
        assert encoder is not None
        text = "" if question is None else self._text(question)
        if "score" in self.method.needs:

            def score(numbers: Sequence[int]) -> Tensor:
                return encoder.relevance(encoder.describe(pictures[list(numbers)]).features, text)

            return Frames(times, score=score)
        patches = "patches" in self.method.needs

        def describe() -> Described:
            return encoder.describe(pictures, patches=patches)

        if self.cache is None:
            described = describe()
        else:
            described = self.cache.get_or_put(key(encoder.identity, str(patches), tensor_key(pictures)), describe)
        relevance = encoder.relevance(described.features, text) if "relevance" in self.method.needs else None
        return self._frames(times, described, relevance)

    def _text(self, question: Tensor) -> str:
        text = str(self.tokenizer.decode(question, skip_special_tokens=True))
        return text.removesuffix(self._template_end).strip()


def _template_end(processor: Any) -> str:
    """What the chat template puts behind a question, which is no part of it."""
    if not getattr(processor, "chat_template", None):
        return ""
    marker = "@"
    content = [{"type": "text", "text": marker}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = tokenizer(text.rpartition(marker)[2], add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids, skip_special_tokens=True))
