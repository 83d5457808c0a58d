"""Small video LLMs of released architectures, put together with their real tokenizers, processors and chat templates.

`transformers` is imported only when something is built.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin

Config = dict[str, Any]

# A chat template is this text with OPEN, CLOSE, IMAGE, VIDEO and GENERATION replaced by jinja expressions.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{- OPEN -}}"
    "{%- if message.content is string -%}{{- message.content -}}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- IMAGE -}}"
    "{%- elif part.type == 'video' -%}{{- VIDEO -}}"
    "{%- elif part.type == 'text' -%}{{- part.text -}}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}{{- CLOSE -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- GENERATION -}}{%- endif -%}"
)
CHATML = {
    "OPEN": r"'<|im_start|>' + message.role + '\n'",
    "CLOSE": r"'<|im_end|>\n'",
    "GENERATION": r"'<|im_start|>assistant\n'",
}
# How prompts of a family look: settings of an `Architecture`.
QWEN_PROMPT: Config = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "other_tokens": ("<|im_start|>", "<|vision_start|>", "<|vision_end|>"),
    "chat": {
        **CHATML,
        "IMAGE": "'<|vision_start|><|image_pad|><|vision_end|>'",
        "VIDEO": "'<|vision_start|><|video_pad|><|vision_end|>'",
    },
}
LLAVA_ONEVISION_PROMPT: Config = {
    "image_token": "<image>",
    "video_token": "<video>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "other_tokens": ("<|im_start|>",),
    "chat": {**CHATML, "IMAGE": r"'<image>\n'", "VIDEO": r"'<video>\n'"},
}
VICUNA = {"OPEN": "(message.role | upper) + ': '", "CLOSE": "' '", "GENERATION": "'ASSISTANT:'"}


@dataclass(frozen=True)
class Architecture:
    """What tells one model family from another; the settings that all share are in the functions below."""

    processor: str  # class names in `transformers`
    image_processor: str
    video_processor: str | None  # None, as the token, for families without videos
    image_token: str
    video_token: str | None
    eos_token: str
    pad_token: str
    chat: dict[str, str]  # the jinja expressions of CHAT_TEMPLATE
    text: Config
    vision: Config
    other_tokens: tuple[str, ...] = ()
    top: Config = field(default_factory=dict)  # top-level model settings
    image_kwargs: Config = field(default_factory=dict)
    video_kwargs: Config = field(default_factory=dict)
    processor_kwargs: Config = field(default_factory=dict)

    @property
    def special_tokens(self) -> list[str]:
        return [self.pad_token, self.eos_token, *self.other_tokens, *self.placeholders]

    @property
    def placeholders(self) -> list[str]:
        return [token for token in (self.image_token, self.video_token) if token is not None]


def build_tokenizer(family: Architecture, corpus: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab_size` tokens, special ones not counted, trained on the lines of a corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # All bytes are in the alphabet, so any text can be written, and nothing normalises it on the way.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    backend.add_special_tokens(family.special_tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=family.eos_token,
        pad_token=family.pad_token,
        additional_special_tokens=[*family.other_tokens, *family.placeholders],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor(family: Architecture, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    import transformers

    template = CHAT_TEMPLATE
    for name, expression in family.chat.items():
        template = template.replace(f"{{{{- {name} -}}}}", f"{{{{- {expression} -}}}}")
    parts = {"image_processor": getattr(transformers, family.image_processor)(**family.image_kwargs)}
    if family.video_processor is not None:
        parts["video_processor"] = getattr(transformers, family.video_processor)(**family.video_kwargs)
    return getattr(transformers, family.processor)(
        **parts, tokenizer=tokenizer, chat_template=template, **family.processor_kwargs
    )


def build_config(
    model_type: str, family: Architecture, tokenizer: PreTrainedTokenizerFast, text: Config
) -> PreTrainedConfig:
    """The model's config; `text` are the decoder's sizes, over which the family's own settings go."""
    from transformers import AutoConfig

    vocab = tokenizer.get_vocab()
    ids: dict[str, int] = {token: vocab[token] for token in family.special_tokens}
    image_key, video_key = "image_token_id", "video_token_id"
    if "<image>" in ids:  # the LLaVA configs' own names, which the names above are aliases of
        image_key, video_key = "image_token_index", "video_token_index"
    top = {**family.top, image_key: ids[family.image_token]}
    if family.video_token is not None:
        top[video_key] = ids[family.video_token]
    if "<|vision_start|>" in ids:
        top.update(vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"])
    text = {**text, "vocab_size": len(tokenizer), **end_tokens(tokenizer), **family.text}
    return AutoConfig.for_model(
        model_type,
        text_config=text,
        vision_config=dict(family.vision),
        tie_word_embeddings=text["tie_word_embeddings"],
        **top,
    )


def end_tokens(tokenizer: PreTrainedTokenizerFast) -> Config:
    """Settings of a model's config and of its generation config."""
    return {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
