"""Train a probe model: `python scripts/train_probe.py --model-type qwen2_5_vl --output out/`.

The same seed gives the same data everywhere. Interrupted, the same command goes on from its last saved state. Curves
are written to `OUTPUT/curves.jsonl`, the model and its card to `OUTPUT/model`, which belongs in
`spatiotoken/probe/checkpoints/MODEL_TYPE`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from spatiotoken.probe.card import model_card
from spatiotoken.probe.dataset import scene_seed
from spatiotoken.probe.evaluate import PROBE_MARK
from spatiotoken.probe.models import PROBE_MODEL_TYPES, build_untrained
from spatiotoken.probe.scenes import FAMILIES
from spatiotoken.probe.training import COURSES, NAMING_SHARE, Glimpses, Packer, Pupil, glimpses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-type", choices=PROBE_MODEL_TYPES, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--stop-at", type=int, metavar="STEP", help="stop there; the same command goes on")
    parser.add_argument("--questions", type=int, default=3528, help="of the test split, for the model's card")
    arguments = parser.parse_args()

    accelerator = Accelerator(mixed_precision="bf16", cpu=arguments.cpu)
    if accelerator.num_processes > 1:
        parser.error("the course is for one process: start without `accelerate launch`, or with --num_processes 1")
    set_seed(arguments.seed)
    course = COURSES[arguments.model_type]
    model, processor = build_untrained(arguments.model_type, arguments.seed)
    pupil = Pupil(model, processor, on_cpu=accelerator.device.type == "cpu")
    scenes = scene_seed(arguments.seed, "train")
    packer = Packer(processor, scenes)
    decoder = {id(weight) for weight in model.model.language_model.parameters()}
    groups = [
        {"params": [weight for weight in pupil.parameters() if (id(weight) in decoder) == wanted]}
        for wanted in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=course.rate, betas=(0.9, 0.98), weight_decay=0.01)
    pupil, optimizer = accelerator.prepare(pupil, optimizer)

    arguments.output.mkdir(parents=True, exist_ok=True)
    state, curves = arguments.output / "state", arguments.output / "curves.jsonl"
    progress = {"step": 0, "seconds": 0.0}
    if (state / "progress.json").exists():
        accelerator.load_state(str(state))
        progress = json.loads((state / "progress.json").read_text())
    end = min(course.steps, arguments.stop_at or course.steps)

    asked = right = torch.zeros(len(FAMILIES))
    clock = time.monotonic() - progress["seconds"]
    for step in range(progress["step"], end):
        for group, rate in zip(optimizer.param_groups, course.rates(step), strict=True):
            group["lr"] = rate
        lesson = course.lesson(step)
        # Numbers of a step are far from those of the next, whatever the batch: no scene is seen twice.
        samples = step * 1024 + torch.arange(lesson.batch, device=accelerator.device)
        if course.answers(step):
            with accelerator.autocast():
                output = pupil(_to(packer.batch(samples, lesson), accelerator.device))
                rehearsal = glimpses(
                    scenes, samples[-1] + 1 + torch.arange(course.rehearsed, device=samples.device), lesson
                )
                loss = output["loss"] + NAMING_SHARE * pupil(_to(rehearsal, accelerator.device))["loss"]
        else:
            with accelerator.autocast():
                output = pupil(_to(glimpses(scenes, samples, lesson), accelerator.device))
            loss = output["loss"]
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(pupil.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if "asked" in output:
            asked, right = asked + output["asked"].cpu(), right + output["right"].cpu()
        done = step + 1
        if done % 25 == 0 or done == end:
            line = {"step": done, "seconds": round(time.monotonic() - clock, 1)}
            line |= {name: round(output[name].item(), 4) for name in ("naming", "answering") if name in output}
            if asked.any():
                shares = (right / asked.clamp(min=1)).tolist()
                line |= {name: round(share, 3) for name, share in zip(FAMILIES, shares, strict=True)}
            asked, right = torch.zeros_like(asked), torch.zeros_like(right)
            with curves.open("a") as file:
                print(json.dumps(line), file=file)
            print(line, flush=True)
        if done % arguments.save_every == 0 or done == end:
            accelerator.save_state(str(state), safe_serialization=False)  # which keeps tied weights as they are
            progress = {"step": done, "seconds": time.monotonic() - clock}
            (state / "progress.json").write_text(json.dumps(progress))

    if end == course.steps:
        hardware = f"{torch.get_num_threads()} thread(s) of a {platform.machine()} CPU with {os.cpu_count()} cores"
        if accelerator.device.type == "cuda":
            hardware = torch.cuda.get_device_name()
        run = {"seed": arguments.seed, "steps": course.steps, "scenes": course.scenes, "hardware": hardware}
        run |= {"minutes": round(progress["seconds"] / 60), "torch": torch.__version__}
        _save(accelerator.unwrap_model(pupil).model, processor, arguments.output / "model", run)
        shutil.copy(curves, arguments.output / "model")
        card = model_card(arguments.output / "model", arguments.questions)
        (arguments.output / "model" / "README.md").write_text(card, encoding="utf-8")


def _to(batch: Glimpses, device: torch.device) -> Glimpses:
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in vars(batch).items()
    }
    return type(batch)(**moved)


def _save(model: Any, processor: Any, directory: Path, run: dict[str, Any]) -> None:
    """Weights as float16, which a config that says float32 makes load as that."""
    setattr(model.config, PROBE_MARK, run)
    half = {name: weight.half() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(directory, state_dict=half)
    processor.save_pretrained(directory)


if __name__ == "__main__":
    main()
