"""How a run ends on the command line: what is printed, and the exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from remat.cli.errors import CHECK_FAILED, INFEASIBLE, PASSED
from remat.runs.records import Run, VariantStatus, Verdict
from remat.runs.store import REPORT_FILE, RUN_FILE


def exit_code_of(run: Run) -> int:
    """Give 1 where a check failed, else 3 where a budget was out of reach, else 0."""
    if any(variant.verdict is Verdict.FAILED for variant in run.variants):
        return CHECK_FAILED
    if any(variant.status is VariantStatus.INFEASIBLE for variant in run.variants):
        return INFEASIBLE
    return PASSED if run.passed else CHECK_FAILED


def show_run(run: Run, folder: Path, write: Callable[[str], None] | None) -> None:
    """Print a finished run for people, or as one JSON document through `write`."""
    page = folder / REPORT_FILE
    if write is not None:
        document = {
            "path": str(folder / RUN_FILE),
            "report": str(page) if page.exists() else None,
            "run": run.model_dump(mode="json"),
        }
        write(json.dumps(document, indent=1))
        return
    from remat.cli.screen import out
    from remat.report.terminal import run_view

    console = out()
    console.print(run_view(run))
    console.print(f"run     {folder / RUN_FILE}", soft_wrap=True)
    if page.exists():
        console.print(f"report  {page}", soft_wrap=True)
