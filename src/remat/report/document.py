"""The report of a run as plain data: the sentences and tables that every form of it shares."""

from __future__ import annotations

from typing import Any

from remat.report import view
from remat.report.evidence import evidence_sections
from remat.report.sentences import five_sentences
from remat.report.tables import Section, table
from remat.runs.records import Run

# Any: JSON.


def report_sections(run: Run) -> tuple[Section, ...]:
    """Give every section in reading order: what was decided and measured, then the evidence."""
    return (_decisions(run), *evidence_sections(run))


def report_data(run: Run) -> dict[str, Any]:
    """Write the report as JSON-able data, with the same words and figures as the page."""
    return {
        "run": run.id,
        "name": run.name,
        "passed": run.passed,
        "summary": run.summary,
        "sentences": {sentence.key: sentence.text for sentence in five_sentences(run)},
        "sections": [
            {
                "title": section.title,
                "how": section.how,
                "remarks": list(section.remarks),
                "working": list(section.working),
                "gaps": list(section.gaps),
                "tables": [
                    {
                        "title": one.title,
                        "columns": list(one.columns),
                        "rows": [list(row) for row in one.rows],
                    }
                    for one in section.tables
                ],
            }
            for section in report_sections(run)
        ],
        "how_measured": dict(view.how_measured(run)),
    }


def _decisions(run: Run) -> Section:
    rows = []
    for row in view.rows(run):
        verdict = f"{row.verdict}: {row.message}" if row.message else row.verdict
        budget = row.asked if row.budget == row.asked else f"{row.asked} ({row.budget})"
        rows.append(
            (
                row.label,
                budget if row.asked != view.NOTHING else view.NOTHING,
                row.predicted,
                row.measured,
                f"{row.step_time} {row.step_spread}".strip(),
                row.extra_time,
                f"{row.quality} {row.metric}".strip(),
                verdict,
            )
        )
    columns = (
        "Variant", "Budget", "Predicted peak", "Measured peak", "Step time", "Against no plan",
        "Quality", "Verdict",
    )  # fmt: skip
    return Section(
        key="decisions",
        title="Decisions and measurements",
        lead="Each way to train the model, as it was measured.",
        how="Step time: median ± half the interquartile range, variants timed in turn.",
        tables=table("Decisions and measurements", columns, rows, words=(0, 7)),
    )
