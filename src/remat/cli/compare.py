"""`remat compare`: two runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from remat.cli.options import JsonOption
from remat.cli.runs import RUN_HELP, RootOption

NAME = "compare"
EXAMPLE = "Example: remat compare 20261105-1432 20261106-0910 --markdown difference.md"


def command(
    before: Annotated[str, typer.Argument(metavar="RUN", show_default=False, help=RUN_HELP)],
    after: Annotated[
        str, typer.Argument(metavar="RUN", show_default=False, help="The run to compare with it.")
    ],
    markdown: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, help="Write it as Markdown, too."),
    ] = None,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> int:
    """Show what differs between two runs: peaks, step times with their noise, quality, plans.

    Says what grew and where, by module. It gives no verdict: that is `remat gate`.
    """
    from remat.runs.comparison import compare
    from remat.runs.store import load_run

    found = compare(load_run(before, root), load_run(after, root))
    from remat.report.comparing import comparison_markdown, comparison_view

    if markdown is not None:
        from remat.files import write_atomically

        write_atomically(markdown, comparison_markdown(found))
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
        return 0
    from remat.cli.screen import out

    out().print(comparison_view(found))
    return 0
