"""The command line. Torch and transformers are imported inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from spatiotoken import __version__, cli_attention, cli_evaluation, tables
from spatiotoken.cli_common import (
    DEFAULT_FRAMES,
    PROBE_MODEL,
    USAGE_ERROR,
    CandidateFps,
    ConfigName,
    Group,
    JsonFlag,
    KeyframesOnly,
    Settings,
    bad_input,
    load,
    quiet_libraries,
    read_video,
    resolve,
    status,
    stdout,
    video_errors,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spatiotoken.answer import Answer
    from spatiotoken.config import PatchConfig
    from spatiotoken.probe.dataset import Example
    from spatiotoken.video import Selection, Video

app = typer.Typer(
    cls=Group, help="Cheaper video LLMs, without training.", add_completion=False, pretty_exceptions_enable=False
)
app.command()(cli_attention.attn)
app.command()(cli_attention.calibrate)
app.command("eval")(cli_evaluation.evaluate)
app.command()(cli_evaluation.datasets)


def main() -> None:
    """Entry point of the ``spatiotoken`` command."""
    app(prog_name="spatiotoken")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"spatiotoken {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version and exit")
    ] = False,
) -> None: ...


@app.command("list")
def list_(as_json: JsonFlag = False) -> None:
    """List stages with their methods and parameters, presets and supported models."""
    from spatiotoken.catalog import available

    catalog = available()
    if as_json:
        print(json.dumps(catalog, indent=2))
        return
    console = stdout()
    for stage, methods in catalog["methods"].items():
        table = Table("method", "summary", "parameters", "arXiv", title=f"stage {stage}", title_justify="left")
        for method in methods:
            parameters = "\n".join(f"{entry['name']}={entry['default']}" for entry in method["parameters"])
            table.add_row(method["name"], method["summary"], parameters, method["paper"] or "")
        console.print(table)
    table = Table("preset", "description", title="presets", title_justify="left")
    for preset in catalog["configs"]:
        table.add_row(preset["name"], preset["description"])
    console.print(table)
    console.print("models: " + ", ".join(catalog["models"]))


@app.command()
def show(
    config: ConfigName,
    model: Annotated[
        str | None, typer.Option(help="model id or directory: also say between which of its layers tokens go")
    ] = None,
    settings: Settings = None,
    as_json: JsonFlag = False,
) -> None:
    """Print the resolved config, as YAML or JSON."""
    resolved = resolve(config, settings)
    shown = resolved.to_dict()
    if model is not None:
        from spatiotoken.answer import resolved_layers

        with bad_input(ValueError):
            shown["resolved"] = resolved_layers(model, resolved)
    if as_json:
        print(json.dumps(shown, indent=2))
        return
    from spatiotoken.config import dump_yaml

    print(dump_yaml(shown), end="")


@app.command()
def schema() -> None:
    """Print the JSON schema of config files, for editors."""
    from spatiotoken.config import config_schema

    print(json.dumps(config_schema(), indent=2))


@app.command()
def run(
    video: Annotated[
        str | None, typer.Option(help="video file; without it and --model one is made whose answer is known")
    ] = None,
    question: Annotated[str | None, typer.Option(help="what to ask about it")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="model id or directory; without it a small one that comes along and knows coloured shapes"),
    ] = None,
    config: Annotated[str, typer.Option(help="a preset's name or the path of a .yaml file")] = "balanced",
    settings: Settings = None,
    example: Annotated[int, typer.Option(min=0, help="number of the question, where a video is made")] = 0,
    num_frames: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="frames to read, at equal distances. By default those that the config's frames method chooses while "
            f"the file is decoded; without one {DEFAULT_FRAMES}, or all if the video has fewer",
        ),
    ] = None,
    candidate_fps: CandidateFps = 1.0,
    keyframes_only: KeyframesOnly = False,
    timestamps: Annotated[
        bool, typer.Option(help="tell each frame's time in words, for models that are not told it (LLaVA)")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="length of the answer at most")] = 64,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto (the first GPU, else the CPU), cpu, cuda or cuda:N")] = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Ask a question about a video. Without one: a made video, asked of the unpatched and of the patched model."""
    from spatiotoken.video import load_video

    resolved = resolve(config, settings)
    if video is None and (model is not None or question is not None):
        raise USAGE_ERROR("--video is missing: only without --model and --question is a video made")
    if video is not None and question is None:
        raise USAGE_ERROR("--question is missing")
    before = None
    # Libraries that print do it on stderr: stdout is for the result alone.
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as directory:
        quiet_libraries()
        made = None
        if video is None or question is None:
            video, made = _make_video(directory, example)
            question = made.question
        inside = resolved  # what is left for the model to do
        with bad_input(ValueError, *video_errors()), status("reading the video"):
            chosen_in_file = resolved.frames is not None and resolved.frames.selects_while_decoding
            if made is None and num_frames is None and chosen_in_file:
                frames = load_video(
                    video,
                    selector=resolved.frames,
                    question=question,
                    candidate_fps=candidate_fps,
                    keyframes_only=keyframes_only,
                )
                inside = resolved.model_copy(update={"frames": None})
            else:
                frames = read_video(video, num_frames)
        loaded, processor = load(model or PROBE_MODEL, dtype, device)
        if model is None and made is None:
            print("no --model given: using a small one that knows nothing but coloured shapes", file=sys.stderr)
        if made is not None:
            # First passes are slow, and these times are to be compared.
            for asked in (resolved, resolve("dense", None)):
                before = _answer(loaded, processor, asked, frames, question, max_new_tokens, timestamps)
            before = _answer(loaded, processor, resolve("dense", None), frames, question, max_new_tokens, timestamps)
        answer = _answer(loaded, processor, inside, frames, question, max_new_tokens, timestamps)
    if as_json:
        document = {"config": {"name": config} | resolved.to_dict(), "model_type": loaded.config.model_type}
        if made is not None and before is not None:
            document |= {"question": made.question, "expected": made.answer, "dense": _answer_json(before)}
        print(json.dumps(_answer_json(answer) | document, indent=2))
    elif made is not None and before is not None:
        print(f"{made.question}  (the right answer: {made.answer})")
        stdout().print(tables.comparison_table(before, answer, config))
    else:
        print(answer.text)
        stdout().print(tables.report_table(answer, config))


@app.command()
def frames(
    video: Annotated[str, typer.Option(help="video file")],
    config: Annotated[str, typer.Option(help="a preset with a frames method, or the path of a .yaml file")] = "kmeans",
    settings: Settings = None,
    question: Annotated[str | None, typer.Option(help="what is asked, for methods that compare frames with it")] = None,
    candidate_fps: CandidateFps = 1.0,
    keyframes_only: KeyframesOnly = False,
    sheet: Annotated[Path | None, typer.Option(help="picture file for a contact sheet with a timeline")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Choose frames of a video file and say which: indices, seconds and scores."""
    from spatiotoken.video import select_frames

    resolved = resolve(config, settings)
    method = resolved.frames
    if method is None:
        raise USAGE_ERROR(f"config {config!r} has no frames method")
    with contextlib.redirect_stdout(sys.stderr), bad_input(ValueError, *video_errors()), status("choosing frames"):
        quiet_libraries()
        selection = select_frames(
            video, method, question=question, candidate_fps=candidate_fps, keyframes_only=keyframes_only
        )
        if sheet is not None:
            _save_sheet(selection, sheet)
    if as_json:
        document = {"config": {"name": config} | resolved.to_dict(), "video": asdict(selection.metadata)}
        print(json.dumps(document | _selection_json(selection), indent=2))
    else:
        stdout().print(tables.selection_table(selection, config))


def _selection_json(selection: Selection) -> dict[str, Any]:
    choice = selection.choice
    scales = choice.scales or (1.0,) * len(choice.indices)
    rows = []
    for at, scale in zip(choice.indices, scales, strict=True):
        score = None if choice.scores is None else float(choice.scores[at])
        rows.append(
            {"index": selection.candidates[at], "seconds": selection.seconds[at], "score": score, "scale": scale}
        )
    return {"candidates": len(selection.candidates), "frames": rows}


def _save_sheet(selection: Selection, path: Path) -> None:
    from spatiotoken.video import load_thumbnails
    from spatiotoken.viz.sheet import save_sheet

    thumbnails = load_thumbnails(selection.metadata.path, selection.indices, short_side=112)
    try:
        save_sheet(selection, thumbnails, path)
    except OSError as error:
        raise USAGE_ERROR(f"cannot write --sheet {str(path)!r}: {error}") from error


@app.command()
def probe(
    config: Annotated[str, typer.Option(help="a preset's name or the path of a .yaml file")] = "balanced",
    settings: Settings = None,
    model: Annotated[
        str, typer.Option(help="a probe model (qwen2_5_vl or llava_onevision), or any model's id or directory")
    ] = PROBE_MODEL,
    limit: Annotated[int, typer.Option(min=1, help="how many questions; the families take turns")] = 1176,
    num_frames: Annotated[int, typer.Option(min=8, help="frames of each video")] = 16,
    every: Annotated[
        bool, typer.Option("--all", help="every preset on both probe models, as a page and a picture in --output")
    ] = False,
    output: Annotated[Path, typer.Option(help="directory of probe.md and probe.png")] = Path("docs"),
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16")] = "float32",
    device: Annotated[str, typer.Option(help="auto (the first GPU, else the CPU), cpu, cuda or cuda:N")] = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Measure what a config costs in accuracy, on made videos whose answers are known."""
    if every:
        _probe_all(limit, num_frames, output)
        return
    from spatiotoken.patching import patched
    from spatiotoken.probe.evaluate import probe as measure

    resolved = resolve(config, settings)
    with contextlib.redirect_stdout(sys.stderr):
        quiet_libraries()
        loaded, processor = load(model, dtype, device)
        with bad_input(ValueError), patched(loaded, resolved, processor=processor):
            pass  # what does not fit the model is the caller's to mend; what goes wrong later is not
        with status("asking"):
            result = measure(loaded, processor, resolved, name=config, limit=limit, num_frames=num_frames)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        stdout().print(tables.probe_table(result))


def _probe_all(limit: int, num_frames: int, output: Path) -> None:
    import platform

    import torch
    import transformers

    from spatiotoken.probe.curves import curves, write_page

    if not output.is_dir():
        raise USAGE_ERROR(f"--output {str(output)!r} is not a directory")
    with contextlib.redirect_stdout(sys.stderr):
        quiet_libraries()
        with status("asking every preset"):
            runs = curves(limit=limit, num_frames=num_frames)
    command = f"spatiotoken probe --all --limit {limit} --num-frames {num_frames} --output {output}"
    machine = f"{torch.get_num_threads()} threads of {platform.machine()}, torch {torch.__version__}, "
    machine += f"transformers {transformers.__version__}"
    page = write_page(runs, output, limit=limit, num_frames=num_frames, command=command, machine=machine)
    print(page)


def _make_video(directory: str, number: int) -> tuple[str, Example]:
    """Write the video of question ``number`` of the probe's test split.

    Returns:
        The file's path, and the question.
    """
    from spatiotoken.probe.dataset import examples, write_video
    from spatiotoken.probe.scenes import FPS

    (made,) = examples("test", 1, first=number)
    path = f"{directory}/video.mp4"
    write_video(path, made.frames, FPS)
    return path, made


def _answer(
    model: PreTrainedModel,
    processor: Any,
    config: PatchConfig,
    video: Video,
    question: str,
    max_new_tokens: int,
    timestamps: bool,
) -> Answer:
    from spatiotoken.answer import PromptError, answer_video
    from spatiotoken.patching import patch_model

    with bad_input(ValueError):
        patch_model(model, config, processor=processor)
    with bad_input(PromptError), status("generating the answer"):
        return answer_video(model, processor, video, question, max_new_tokens=max_new_tokens, timestamps=timestamps)


def _answer_json(answer: Answer) -> dict[str, Any]:
    report = answer.report.to_dict()
    return {
        "answer": answer.text,
        "tokens": {
            "prompt": report["prompt_tokens"],
            "visual": report["visual_tokens"],
            "visual_kept": report["visual_kept"],
            "text": report["text_tokens"],
        },
        "stages": report["stages"],
        "prefill_ms": report["prefill_ms"],
        "decode_ms": report["decode_ms"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "frames": {"indices": list(answer.frame_indices), "seconds": list(answer.frame_seconds)},
    }


if __name__ == "__main__":
    main()
