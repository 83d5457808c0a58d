"""What lmms-eval asks a patched model: one class, and a name of it for each family."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages, ChatVideoContent
from loguru import logger
from tqdm import tqdm
from transformers.image_utils import load_image

from spatiotoken.answer import load_model, resolve_device, resolve_dtype
from spatiotoken.config import load_config
from spatiotoken.evaluation.base import Clip, Question
from spatiotoken.evaluation.clips import read_clip, select_clip
from spatiotoken.patching import last_report, patch_model
from spatiotoken.report import ForwardReport

MAX_NEW_TOKENS = 1024
"""Of tasks that do not say how long an answer may be."""
_FILLER = "\n\n"
"""lmms-eval's ``until`` of tasks that name none; it would cut descriptions after their first paragraph."""
_SAMPLING = ("temperature", "top_p", "top_k")
_KNOWN = frozenset({"until", "max_new_tokens", "do_sample", "num_beams", "repetition_penalty", *_SAMPLING})


class VideoModel(lmms):
    """A patched model behind lmms-eval's interface of chat models. It answers one question at a time.

    Its arguments are those of ``--model_args``, and ``--device`` and ``--batch_size``. Of several processes
    (``accelerate launch``) each has a model of its own.

    Args:
        pretrained: hub id or directory of a checkpoint.
        st_config: a preset's name or the path of a .yaml file; ``dense`` reduces nothing.
        max_num_frames: frames of a video, its first and last among them; all, if it has no more.
        candidate_fps: a ``frames`` method that can do so chooses among so many frames a second while the file is
            decoded; by default it chooses inside the model, among ``max_num_frames``.
        dtype: auto (the checkpoint's), float32, bfloat16 or float16.
        device: auto (the first GPU, else the CPU), cpu, cuda or cuda:N; several processes have one each.

    Raises:
        ValueError: an argument out of range, or a config or model that cannot be used.
    """

    is_simple = False
    model_type: ClassVar[str]

    def __init__(
        self,
        pretrained: str,
        st_config: str,
        max_num_frames: int = 32,
        candidate_fps: float | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
    ) -> None:
        super().__init__()
        if str(batch_size) != "1":
            raise ValueError(f"batch_size is {batch_size}, but must be 1: tokens are counted for each question")
        if max_num_frames < 1:
            raise ValueError(f"max_num_frames must be at least 1, not {max_num_frames}")
        config = load_config(st_config)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device if self._world_size > 1 else resolve_device(device or "auto")
        self._max_num_frames, self._candidate_fps = max_num_frames, candidate_fps
        in_files = candidate_fps is not None and config.frames is not None and config.frames.selects_while_decoding
        self._selector = config.frames if in_files else None
        self._model, self._processor = load_model(pretrained, dtype=resolve_dtype(dtype), device=self.device)
        if (found := self._model.config.model_type) != self.model_type:
            raise ValueError(f"{pretrained} is a {found} model, and --model says {self.model_type}")
        inside = config if self._selector is None else config.model_copy(update={"frames": None})
        patch_model(self._model, inside, processor=self._processor)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers in the order of the questions, with the tokens of each: those that entered the language model, and
        the new ones. Means of what the patch reports go to lmms-eval's ``throughput``.

        Raises:
            ValueError: a video cannot be read, the processor refuses a prompt, or something is asked for that patched
                models do not do here: beam search, or audio.
        """
        if not requests:
            return []  # there can be more processes than questions
        _warn_of_others(request.args[2] for request in requests)
        answers: list[GenerationResult] = []
        costs: list[dict[str, float]] = []
        for request in tqdm(requests, desc="Model Responding", disable=self._rank != 0):
            _, doc_to_messages, settings, document, task, split = request.args
            messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][document]))
            inputs = self._inputs(messages).to(self._model.device, self._model.dtype)
            start = time.perf_counter()
            output = self._model.generate(**inputs, **generation_arguments(settings))  # type: ignore[operator]
            new = output[0, inputs["input_ids"].shape[1] :].tolist()
            seconds = time.perf_counter() - start
            text = cut(self._processor.tokenizer.decode(new, skip_special_tokens=True), settings.get("until"))
            report = last_report(self._model)
            counts = TokenCounts(input_tokens=report.text_tokens + report.visual_kept, output_tokens=len(new))
            answers.append(GenerationResult(text, counts))
            costs.append({"seconds": seconds, "new_tokens": len(new), **_costs(report)})
        sums = {name: sum(cost[name] for cost in costs) for name in costs[0]}
        seconds, total = sums.pop("seconds"), int(sums.pop("new_tokens"))
        means = {name: value / len(costs) for name, value in sums.items()}
        log_metrics(seconds, total, total / seconds, {"num_requests": len(costs), **means})
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("tasks of loglikelihood are not supported; supported: generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("tasks of several rounds are not supported; supported: generate_until")

    def _inputs(self, messages: ChatMessages) -> Any:
        """The model's inputs for one conversation, in the words of its own chat template."""
        said = "\n".join(part.text for turn in messages.messages for part in turn.content if part.type == "text")
        turns: list[dict[str, Any]] = []
        images: list[Any] = []
        clips: list[Clip] = []
        for turn in messages.messages:
            content = []
            for part in turn.content:
                content.append({"type": part.type} | ({"text": part.text} if part.type == "text" else {}))
                if part.type == "image":
                    images.append(load_image(part.url))
                elif part.type == "video":
                    clips.append(self._clip(part, said))
                elif part.type != "text":
                    raise ValueError(f"{part.type} is not supported; supported: text, image, video")
            turns.append({"role": turn.role, "content": content})
        prompt = self._processor.apply_chat_template(turns, add_generation_prompt=True)
        pictures: dict[str, Any] = {"images": images} if images else {}
        if clips:
            pictures |= {"videos": [clip.frames for clip in clips], "do_sample_frames": False}
            pictures["video_metadata"] = [clip.metadata() for clip in clips]
        return self._processor(text=[prompt], return_tensors="pt", **pictures)

    def _clip(self, video: ChatVideoContent, said: str) -> Clip:
        path, span = place(video)
        question = Question(id=str(path), video=path, prompt=said, answer=None, span=span)
        if self._selector is None or self._candidate_fps is None:
            return read_clip(question, self._max_num_frames)
        return select_clip(question, self._selector, self._candidate_fps)


class Qwen2VL(VideoModel):
    model_type = "qwen2_vl"


class Qwen2_5VL(VideoModel):
    model_type = "qwen2_5_vl"


class Qwen3VL(VideoModel):
    model_type = "qwen3_vl"


class LlavaOneVision(VideoModel):
    model_type = "llava_onevision"


class LlavaNextVideo(VideoModel):
    model_type = "llava_next_video"


def place(video: ChatVideoContent) -> tuple[Path, tuple[float, float] | None]:
    """File of a video, and the seconds of its part that is shown.

    Raises:
        ValueError: one end of the part is not told.
    """
    # Tasks without messages of their own hand over their dictionary where others have a path.
    source = video.url if isinstance(video.url, Mapping) else {"path": video.url}
    ends = (source.get("video_start", video.start_time), source.get("video_end", video.end_time))
    path = Path(source["path"])
    if ends == (None, None):
        return path, None
    if None in ends:
        raise ValueError(f"{path}: both ends of a part must be told, not {ends[0]} to {ends[1]}")
    return path, (float(ends[0]), float(ends[1]))


def generation_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate`` for a task's ``generation_kwargs``. As in lmms-eval's own wrappers, it is a temperature
    above 0 that makes answers random, whatever ``do_sample`` says.

    Raises:
        ValueError: the task wants beam search.
    """
    if (settings.get("num_beams") or 1) > 1:
        raise ValueError(f"num_beams is {settings['num_beams']}, but must be 1: tokens are counted for each question")
    samples = (settings.get("temperature") or 0) > 0
    names = ("max_new_tokens", "repetition_penalty", *(_SAMPLING if samples else ()))
    given = {name: settings[name] for name in names if settings.get(name) is not None}
    return {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": samples, **given}


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """``text`` before the first of the words that end an answer."""
    for stop in [until] if isinstance(until, str) else until or ():
        if stop and stop != _FILLER:
            text = text.split(stop)[0]
    return text


def _costs(report: ForwardReport) -> dict[str, float]:
    layers = report.layer_tokens
    densities = [entry.density for entry in report.attention] or [1.0]
    return {
        "visual_tokens": report.visual_tokens,
        "visual_kept": report.visual_kept,
        "visual_kept_per_layer": sum(layers) / len(layers) - report.text_tokens,
        "attention_density": sum(densities) / len(densities),
        "prefill_ms": report.prefill_ms,
    }


def _warn_of_others(settings: Iterable[Mapping[str, Any]]) -> None:
    """Tasks have settings that only some models of lmms-eval know."""
    if others := {name for given in settings for name in given} - _KNOWN:
        logger.warning(f"generation_kwargs that are not used: {', '.join(sorted(others))}")
