"""Tables of the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from spatiotoken.answer import Answer
    from spatiotoken.probe.evaluate import ProbeResult, ProbeRun
    from spatiotoken.report import ForwardReport
    from spatiotoken.video import Selection


def report_table(answer: Answer, config: str) -> Table:
    """What one answer cost, stage by stage."""
    report = answer.report
    table = Table("", "tokens in", "tokens out", "ms", title=f"config {config}", title_justify="left")
    for stage, entry in report.stages.items():
        row = (str(entry.tokens_in), str(entry.tokens_out), f"{entry.milliseconds:.1f}")
        table.add_row(f"{stage}: {entry.method}", *row)
    prompt, kept = report.prompt_tokens, report.text_tokens + report.visual_kept
    table.add_row("prompt, its visual tokens reduced", str(prompt), str(kept), f"{report.prefill_ms:.1f}")
    table.add_row("decoding", "", str(report.decode_steps), f"{report.decode_ms:.1f}")
    table.caption = f"{len(answer.frame_indices)} frames seen, peak memory {report.peak_memory_bytes / 2**20:.0f} MiB"
    if report.attention:
        table.caption += f"; attention pairs computed: {_computed(report)}"
    return table


def selection_table(selection: Selection, config: str) -> Table:
    """Frames chosen in a file."""
    choice, about = selection.choice, selection.metadata
    several = len(set(choice.scales or ())) > 1
    titles = ["frame", "seconds", *([] if choice.scores is None else ["score"]), *(["size"] if several else [])]
    table = Table(*titles, title=f"config {config}", title_justify="left")
    for row, at in enumerate(choice.indices):
        cells = [str(selection.candidates[at]), f"{selection.seconds[at]:.2f}"]
        cells += [] if choice.scores is None else [f"{float(choice.scores[at]):.4g}"]
        table.add_row(*cells, *([f"{choice.scales[row]:.0%}"] if several and choice.scales else []))
    seen = f"{len(choice.indices)} frames of {len(selection.candidates)} candidates"
    table.caption = f"{seen}, {about.num_frames} in the video ({about.duration:.1f} s)"
    return table


def _computed(report: ForwardReport) -> str:
    """Share of the causal pairs, the mean over layers, and what computed it."""
    density = sum(entry.density for entry in report.attention) / len(report.attention)
    kernels = ", ".join(sorted({name for entry in report.attention for name in entry.backends}))
    return f"{density:.0%} ({kernels})"


def comparison_table(before: Answer, after: Answer, config: str) -> Table:
    """The same question, unpatched and patched."""
    table = Table("", "unpatched", config)
    reports = before.report, after.report
    table.add_row("answer", before.text, after.text)
    if after.report.tower_rows:
        rows, whole = after.report.tower_rows, after.report.stages["vision"].tokens_in
        table.add_row("rows of a tower layer, mean", str(whole), f"{sum(rows) / len(rows):.0f}")
    table.add_row("visual tokens", *(str(report.visual_tokens) for report in reports))
    table.add_row("into the language model", *(str(report.visual_kept) for report in reports))
    last = [str(report.layer_tokens[-1] - report.text_tokens) for report in reports]
    table.add_row("in its last layer", *last)
    if after.report.attention:
        table.add_row("attention pairs computed", "100%", _computed(after.report))
    table.add_row("prefill, ms", *(f"{report.prefill_ms:.1f}" for report in reports))
    table.add_row("decoding, ms", *(f"{report.decode_ms:.1f}" for report in reports))
    return table


def probe_table(result: ProbeResult) -> Table:
    """Accuracy by family of questions, a config beside its baselines."""
    runs: dict[str, ProbeRun] = {**result.baselines, result.config: result}
    title = f"{result.model}, {sum(score.n for score in result.families.values())} questions, % right (95 % interval)"
    table = Table("", *runs, title=title, title_justify="left")

    def share(value: float, interval: tuple[float, float] | None = None) -> str:
        return f"{100 * value:.1f}" + (f" ({100 * interval[0]:.0f}-{100 * interval[1]:.0f})" if interval else "")

    for family, score in result.families.items():
        row = (share(run.families[family].accuracy, run.families[family].interval) for run in runs.values())
        table.add_row(f"{family}, chance {100 * score.chance:.0f}", *row)
    table.add_row("all", *(share(run.accuracy, run.interval) for run in runs.values()))
    differences = [
        share(other.difference, other.difference_interval) if (other := result.baselines.get(name)) else ""
        for name in runs
    ]
    table.add_row(f"{result.config} less this", *differences)
    table.add_row("evidence recall", *(share(run.evidence_recall) for run in runs.values()))
    if result.tower < 1:
        table.add_row("rows of a tower layer, mean", *(share(run.tower) for run in runs.values()))
    table.add_row("visual tokens kept", *(f"{run.visual_kept:.1f}" for run in runs.values()))
    table.add_row("retention, mean of layers", *(share(run.retention) for run in runs.values()))
    table.add_row("prefill, ms a question", *(f"{run.prefill_ms:.2f}" for run in runs.values()))
    return table
