"""Plans, verifications and runs as rich tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
from remat.runs.store import EntryStatus, RunEntry
from remat.units import format_bytes, format_seconds

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
    """List runs, one per line, with the sentence that sums each up."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("run", overflow="fold")
    table.add_column("verdict")
    table.add_column("summary", ratio=1)
    for entry in entries:
        table.add_row(entry.id, _verdict(entry), Text(entry.message))
    return table


def _verdict(entry: RunEntry) -> Text:
    if entry.status is not EntryStatus.COMPLETE:
        style = "red" if entry.status is EntryStatus.DAMAGED else "yellow"
        return Text(entry.status.value, style=style)
    return Text("passed", style="green") if entry.passed else Text("failed", style="bold red")


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
