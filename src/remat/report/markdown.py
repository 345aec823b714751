"""The report of a run as short Markdown, for a pull request or a ticket."""

from __future__ import annotations

from remat.report import view
from remat.runs.records import Run

_COLUMNS = (
    "Variant",
    "Budget",
    "Predicted peak",
    "Measured peak",
    "Step time",
    "Against no plan",
    "Quality",
    "Verdict",
)


def render_markdown(run: Run) -> str:
    """Write the summary, the table of variants and how they were measured."""
    lines = [f"# {_cell(run.name)}", "", run.summary, "", _line(_COLUMNS)]
    lines.append(_line(["---", *["---:"] * (len(_COLUMNS) - 2), "---"]))
    for row in view.rows(run):
        verdict = f"{row.verdict}: {row.message}" if row.message else row.verdict
        budget = row.asked if row.budget == row.asked else f"{row.asked} ({row.budget})"
        cells = (
            row.label,
            budget if row.asked != view.NOTHING else view.NOTHING,
            row.predicted,
            row.measured,
            f"{row.step_time} {row.step_spread}",
            row.extra_time,
            f"{row.quality} {row.metric}",
            verdict,
        )
        lines.append(_line(cells))
    lines += ["", "## How this was measured", ""]
    lines += [f"- {term}: {text}" for term, text in view.how_measured(run)]
    return "\n".join(lines) + "\n"


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    """Keep a text inside its cell: a bar or a line break would end it."""
    return " ".join(text.split()).replace("|", "\\|")
