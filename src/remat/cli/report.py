"""`remat report`: a run as a page, as Markdown or as JSON; several runs compared on one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remat.cli.options import JsonOption
from remat.cli.runs import RootOption

if TYPE_CHECKING:
    from remat.runs.records import Run

NAME = "report"
EXAMPLE = "Example: remat report 20261105-143210-digits-vit-3fa2c1"
COMPARISON_FILE = "comparison.html"


def command(
    run: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            show_default=False,
            help="Folder of a run, its run.json, its id, or a beginning of the id; up to 50 of "
            "them are compared on one page.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            show_default=False,
            help="Write to this file; report.html beside the run, or comparison.html beside the "
            "folder of the first of several, unless given.",
        ),
    ] = None,
    as_markdown: Annotated[
        bool,
        typer.Option(
            "--markdown",
            help="Print the same words and tables as Markdown, or write them to --output; no page.",
        ),
    ] = False,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> int:
    """Write the page of a run again, or one page that compares several: summary and evidence.

    The page is one file that opens without a network. --json also gives its sentences and tables.
    """
    if as_markdown and as_json:
        raise typer.BadParameter("--markdown and --json both want stdout; give one of them.")

    from remat.cli.screen import machine_output, out
    from remat.runs.store import REPORT_FILE, find_run, load_run

    with machine_output(as_json) as write:
        # all are read before the first page is written: a wrong name costs nothing
        loaded = [(find_run(name, root), load_run(name, root)) for name in run]
        runs = [record for _, record in loaded]
        if as_markdown:
            _give_markdown(runs, output)
            return 0

        from remat.report.comparison import comparison_data, write_comparison
        from remat.report.html import write_report
        from remat.report.terminal import run_view

        if len(runs) == 1:
            page = output or loaded[0][0] / REPORT_FILE
            write_report(runs[0], page)
        else:
            page = output or loaded[0][0].parent / COMPARISON_FILE
            write_comparison(runs, page)
        if as_json:
            told = comparison_data(runs)
            write(json.dumps([one | {"report": str(page)} for one in told], indent=1))
        else:
            for record in runs:
                out().print(run_view(record))
            out().print(f"report  {page}", soft_wrap=True)
    return 0


def _give_markdown(runs: list[Run], output: Path | None) -> None:
    from remat.cli.screen import out
    from remat.files import write_atomically
    from remat.report.comparison import comparison_markdown
    from remat.report.markdown import render_markdown

    text = render_markdown(runs[0]) if len(runs) == 1 else comparison_markdown(runs)
    if output is None:
        out().print(text, soft_wrap=True, markup=False, highlight=False, end="")
    else:
        write_atomically(output, text)
