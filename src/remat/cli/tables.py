"""Plans, verifications and runs as rich tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from remat.planner.describe import (
    describe_subject,
    figures,
    group_regions,
    peak_shares,
    regions_title,
)
from remat.planner.records import Plan
from remat.prove.records import Difference, Verification
from remat.runs.entries import EntryStatus, RunEntry
from remat.runs.marks import Marks
from remat.runs.reading import format_value, metric_name
from remat.runs.records import Run
from remat.units import format_bytes, format_seconds

# Laying out a table of more rows takes longer than anybody waits: they get a line each.
MOST_TABLE_ROWS = 200
_BAR_WIDTH = 24
_MOST_DIFFERENCES = 10
_COLORS = {
    "parameters": "blue",
    "gradients": "magenta",
    "optimizer": "cyan",
    "activations": "green",
    "temporaries": "yellow",
}


def plan_view(name: str, plan: Plan) -> RenderableType:
    """Show a plan: the figures, what fills the peak, the decisions, and what to know."""
    parts: list[RenderableType] = [
        Text.assemble((name, "bold"), " · ", (describe_subject(plan.fingerprint), "dim")),
        Text(),
        _figures(figures(plan)),
        Text(),
        Text("At the peak", style="bold"),
        _breakdown(plan),
        Text(),
        Text(regions_title(plan), style="bold"),
    ]
    if plan.regions:
        parts.append(_regions(plan))
    remarks = [f"{hazard.code} at {hazard.where}: {hazard.message}" for hazard in plan.hazards]
    remarks += plan.notes
    if remarks:
        parts += [Text(), Text("To know", style="bold")]
        parts += [Padding(Text(f"- {remark}"), (0, 0, 0, 2)) for remark in remarks]
    parts.append(Text())
    return Group(*parts)


def verification_view(name: str, proof: Verification) -> RenderableType:
    """Show what was compared, how it came out, and the promised peak beside the measured one."""
    if proof.passed and proof.within_budget:
        verdict = Text("passed", style="bold green")
    else:
        verdict = Text("failed", style="bold red")
    rows = [
        ("compared", f"{proof.num_compared}", _comparison(proof)),
        ("budget", format_bytes(proof.budget_bytes), f"{proof.budget_bytes} bytes"),
        ("predicted peak", format_bytes(proof.predicted_peak_bytes), ""),
        (
            "measured peak",
            format_bytes(proof.measured_peak_bytes),
            f"{proof.peak_error:+.2%} of the prediction, "
            + ("within the budget" if proof.within_budget else "ABOVE THE BUDGET"),
        ),
    ]
    if proof.host_budget_bytes is not None:
        figure = format_bytes(proof.measured_host_bytes)
        predicted = format_bytes(proof.predicted_host_bytes)
        allowed = format_bytes(proof.host_budget_bytes)
        rows.append(("host memory", figure, f"{predicted} predicted, {allowed} allowed"))
    parts: list[RenderableType] = [
        Text.assemble((name, "bold"), " · verification ", verdict),
        Text(),
        _figures(rows),
    ]
    for title, found in (("Differences", proof.differences), ("Between two runs", proof.noise)):
        if found:
            parts += [Text(), Text(title, style="bold"), _differences(found)]
    parts += [Padding(Text(f"- {remark}"), (0, 0, 0, 2)) for remark in proof.notes]
    parts.append(Text())
    return Group(*parts)


def runs_table(entries: Sequence[RunEntry]) -> RenderableType:
    """List runs with their figures, under each its tags; then what is wrong with damaged ones."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    table.add_column("run", overflow="fold", ratio=1)
    table.add_column("verdict", no_wrap=True)
    for heading in ("peak", "step time", "quality"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in entries:
        tags = "".join(f"\n[{tag}]" for tag in entry.tags)
        seconds = "" if entry.step_seconds is None else format_seconds(entry.step_seconds)
        name = Text.assemble(entry.id, (tags, "cyan"))
        table.add_row(name, _verdict(entry), _peak(entry), seconds, _quality(entry))
    damaged = [entry for entry in entries if entry.status is EntryStatus.DAMAGED]
    remarks = [Padding(Text(f"- {entry.id}: {entry.message}"), (0, 0, 0, 2)) for entry in damaged]
    return Group(table, *remarks)


def runs_lines(entries: Sequence[RunEntry]) -> Iterator[str]:
    """List runs, one plain line each: what many of them are shown as."""
    width = max(len(entry.id) for entry in entries)
    for entry in entries:
        tags = "".join(f" [{tag}]" for tag in entry.tags)
        yield f"{entry.id:<{width}}  {_verdict_word(entry):<10}  {_peak(entry):>10}{tags}"


def marks_view(run: Run, marks: Marks) -> RenderableType:
    """Show what people said about a run, and the artifacts that it references."""
    rows = [("tags", " ".join(marks.tags) or "none", "")]
    rows += [("note", mark.at, f"{mark.who}: {mark.text}") for mark in marks.notes]
    if marks.num_damaged:
        rows.append(("damaged", str(marks.num_damaged), "lines of its marks cannot be read"))
    rows += [
        ("artifact", artifact.name, f"{format_bytes(artifact.size_bytes)}, {artifact.sha256}")
        for artifact in run.artifacts
    ]
    return _figures(rows)


def _peak(entry: RunEntry) -> str:
    return "" if entry.peak_bytes is None else format_bytes(entry.peak_bytes)


def _quality(entry: RunEntry) -> str:
    if entry.quality is None:
        return ""
    return f"{metric_name(entry.metric)} {format_value(entry.metric, entry.quality)}"


def _verdict_word(entry: RunEntry) -> str:
    if entry.status is not EntryStatus.COMPLETE:
        return str(entry.status.value)
    return "passed" if entry.passed else "failed"


def _verdict(entry: RunEntry) -> Text:
    styles = {"passed": "green", "failed": "bold red", "damaged": "red", "unfinished": "yellow"}
    word = _verdict_word(entry)
    return Text(word, style=styles[word])


def _comparison(proof: Verification) -> str:
    if proof.identical:
        return "loss, gradients, buffers and random state: identical, bit for bit"
    if proof.within_noise:
        return "they differ no more than two runs without a plan differ from each other"
    if proof.within_rounding:
        return (
            f"{len(proof.differences)} summed in another order, as planned, within "
            f"{proof.tolerance:.1e}; the rest identical, bit for bit"
        )
    return f"{len(proof.differences)} of them differ"


def _figures(rows: Iterable[tuple[str, str, str]]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True, style="bold")
    table.add_column()
    for label, figure, remark in rows:
        table.add_row(label, figure, Text(remark))
    return table


def _breakdown(plan: Plan) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True, style="bold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for kind, size, share in peak_shares(plan):
        bar = Text("█" * round(share * _BAR_WIDTH), style=_COLORS.get(kind, "white"))
        table.add_row(kind, format_bytes(size), f"{share:.0%}", bar)
    return table


def _regions(plan: Plan) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 1))
    table.add_column("module", overflow="fold", ratio=3)
    table.add_column("calls", justify="right", no_wrap=True)
    table.add_column("frees", justify="right", no_wrap=True)
    table.add_column("costs", justify="right", no_wrap=True)
    table.add_column("why", ratio=3, style="dim")
    for group in group_regions(plan):
        table.add_row(
            Text(group.label),
            str(group.count),
            format_bytes(group.freed_bytes),
            format_seconds(group.recompute_seconds),
            Text(group.reason),
        )
    return table


def _differences(found: Sequence[Difference]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 1))
    table.add_column("tensor", overflow="fold")
    table.add_column("max abs", justify="right", no_wrap=True)
    table.add_column("max rel", justify="right", no_wrap=True)
    table.add_column("")
    for difference in found[:_MOST_DIFFERENCES]:
        table.add_row(
            Text(difference.name),
            f"{difference.max_abs:.3g}",
            f"{difference.max_rel:.3g}",
            Text(difference.note),
        )
    if len(found) > _MOST_DIFFERENCES:
        table.add_row(f"and {len(found) - _MOST_DIFFERENCES} more; --json lists all", "", "", "")
    return table
