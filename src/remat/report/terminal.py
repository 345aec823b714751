"""The report of a run for the terminal, as a rich renderable; printing it is the caller's."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from remat.report import view
from remat.runs.records import Run

_STYLES = {"passed": "green", "failed": "bold red", "reference": "dim", "none": "yellow"}


def run_view(run: Run) -> RenderableType:
    """Show a run: the summary, then one line per variant, then what a failed one failed in."""
    rows = view.rows(run)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    table.add_column("variant", no_wrap=True)
    table.add_column("budget", justify="right", overflow="fold")
    table.add_column("predicted", justify="right", overflow="fold")
    table.add_column("measured", justify="right", overflow="fold")
    table.add_column("step time", justify="right", overflow="fold")
    table.add_column("against\nno plan", justify="right", overflow="fold")
    table.add_column("quality", justify="right", overflow="fold")
    table.add_column("verdict", overflow="fold")
    for row in rows:
        table.add_row(
            Text(row.label, style="bold"),
            row.asked if row.budget in (row.asked, view.NOTHING) else f"{row.asked}\n{row.budget}",
            row.predicted,
            Text(row.measured, style="bold"),
            f"{row.step_time}\n{row.step_spread}".strip(),
            row.extra_time,
            f"{row.quality}\n{row.metric}".strip(),
            Text(row.verdict, style=_STYLES[row.verdict_code]),
        )
    remarks = [
        Padding(Text(f"- {row.label}: {row.message}"), (0, 0, 0, 2))
        for row in rows
        if row.verdict_code in ("failed", "none") and row.message
    ]
    title = Text.assemble((run.name, "bold"), (f" · {run.id}", "dim"))
    return Group(title, Text(), Text(run.summary), Text(), table, *remarks, Text())
