"""`remat runs`: what was recorded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remat.cli.options import JsonOption

if TYPE_CHECKING:
    from remat.runs.store import RunEntry

NAME = "runs"
EXAMPLE = "Example: remat runs --root remat-runs"

RootOption = Annotated[
    Path | None,
    typer.Option(
        "--root",
        metavar="DIR",
        show_default=False,
        help="Folder of the runs; REMAT_RUNS or remat-runs here, unless given.",
    ),
]


def command(root: RootOption = None, as_json: JsonOption = False) -> int:
    """List the recorded runs, the newest first. A damaged one is listed with the reason."""
    from remat.runs.store import list_runs, store_root

    entries = list_runs(root)
    if as_json:
        import json

        typer.echo(json.dumps([_as_data(entry) for entry in entries], indent=1))
        return 0
    from remat.cli.screen import note, out
    from remat.cli.tables import runs_table

    if entries:
        out().print(runs_table(entries))
    else:
        note(f"no runs in {str(store_root(root))!r}; `remat evaluate` and `remat demo` make them.")
    return 0


def _as_data(entry: RunEntry) -> dict[str, object]:
    return {
        "id": entry.id,
        "path": str(entry.path),
        "status": entry.status.value,
        "name": entry.name,
        "created": entry.created,
        "passed": entry.passed,
        "num_variants": entry.num_variants,
        "message": entry.message,
    }
