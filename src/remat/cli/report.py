"""`remat report`: the page of a run, written again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from remat.cli.options import JsonOption
from remat.cli.runs import RootOption

NAME = "report"
EXAMPLE = "Example: remat report 20261105-143210-digits-vit-3fa2c1"


def command(
    run: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            show_default=False,
            help="Folder of a run, its run.json, its id, or a beginning of the id.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            show_default=False,
            help="Write the page to this file; report.html beside the run, unless given.",
        ),
    ] = None,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> int:
    """Write the page of each run again: one file that opens without a network."""
    if output is not None and len(run) > 1:
        raise typer.BadParameter("--output names one file; give one RUN with it.")

    from remat.cli.screen import machine_output, out
    from remat.runs.store import REPORT_FILE, find_run, load_run

    with machine_output(as_json) as write:
        # all are read before the first page is written: a wrong name costs nothing
        loaded = [(find_run(name, root), load_run(name, root)) for name in run]

        from remat.report.html import write_report
        from remat.report.terminal import run_view

        pages = []
        for folder, record in loaded:
            page = output or folder / REPORT_FILE
            write_report(record, page)
            pages.append({"run": record.id, "report": str(page)})
            if not as_json:
                out().print(run_view(record))
                out().print(f"report  {page}", soft_wrap=True)
        if as_json:
            write(json.dumps(pages, indent=1))
    return 0
