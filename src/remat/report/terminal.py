"""The report of a run for the terminal, as a rich renderable; printing it is the caller's."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from remat.report import view
from remat.runs.findings import evidence_lines
from remat.runs.records import Run
from remat.units import format_usd

_STYLES = {"passed": "green", "failed": "bold red", "reference": "dim", "none": "yellow"}
# Two lines to a cell, so that the table fits 80 columns without a break inside a figure.
_FIGURES = ("budget", "peak,\npredicted", "step time", "against\nno plan", "quality")


def run_view(run: Run) -> RenderableType:
    """Show a run: the summary, then one line per variant, then what a failed one failed in."""
    rows = view.rows(run)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    table.add_column("variant", no_wrap=True)
    for heading in _FIGURES:
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("verdict", overflow="fold")
    for row in rows:
        table.add_row(
            Text(row.label, style="bold"),
            row.asked if row.budget in (row.asked, view.NOTHING) else _two(row.asked, row.budget),
            _two(Text(row.measured, style="bold"), row.predicted),
            _two(row.step_time, row.step_spread),
            row.extra_time,
            _two(row.quality, row.metric),
            Text(row.verdict, style=_STYLES[row.verdict_code]),
        )
    remarks = [
        Padding(Text(f"- {row.label}: {row.message}"), (0, 0, 0, 2))
        for row in rows
        if row.verdict_code in ("failed", "none") and row.message
    ]
    title = Text.assemble((run.name, "bold"), (f" · {run.id}", "dim"))
    return Group(title, Text(), Text(run.summary), Text(), table, *remarks, *_aside(run), Text())


def _aside(run: Run) -> list[RenderableType]:
    """Lay out what the evidence, serving and prices say, each beside its heading."""
    lines = [*evidence_lines(run), *_offers(run)]
    if not lines:
        return []
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for heading, text in lines:
        grid.add_row(heading, Text(text))
    return [Text(), grid]


def _offers(run: Run) -> list[tuple[str, str]]:
    """Say how to serve the model, and where each variant is trained for the least money."""
    said = [] if run.serving is None else [("serve", run.serving.recommendation)]
    for row in run.expenses:
        if row.is_cheapest and row.run_usd is not None:
            where = f"on {row.device} ({row.offer}), the least of the devices that it fits"
            said.append(("cost", f"{row.variant}: {format_usd(row.run_usd)} a run {where}"))
    return said


def _two(first: str | Text, second: str) -> Text:
    """Put a figure over what belongs to it."""
    return Text.assemble(first, (f"\n{second}" if second else "", "dim"))
