"""`remat runs`: what was recorded, and what people said about it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remat.cli.groups import DEFAULT, DefaultGroup
from remat.cli.options import JsonOption
from remat.runs.entries import EntryStatus
from remat.runs.index import RunQuery, Sort

if TYPE_CHECKING:
    from remat.runs.store import RunEntry

NAME = "runs"
SUMMARY = "List the recorded runs; show, tag, search, export and clean them up."
EXAMPLE = "Example: remat runs --name digits --tag baseline --sort peak"

RootOption = Annotated[
    Path | None,
    typer.Option(
        "--root",
        metavar="DIR",
        show_default=False,
        help="Folder of the runs; REMAT_RUNS or remat-runs here, unless given.",
    ),
]
RUN_HELP = "Folder of a run, its run.json, its id, or a beginning of the id."
RunArgument = Annotated[str, typer.Argument(metavar="RUN", show_default=False, help=RUN_HELP)]
TagOption = Annotated[
    list[str] | None,
    typer.Option("--tag", metavar="TAG", show_default=False, help="Only runs with this tag."),
]
LimitOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", show_default=False, help="At most N runs; all, unless given."),
]


def command(
    name: Annotated[
        str, typer.Option(metavar="TEXT", show_default=False, help="Only names that hold TEXT.")
    ] = "",
    tag: TagOption = None,
    text: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            show_default=False,
            help="Only runs that say TEXT anywhere: summary, notes, tags, variants, command, "
            "commit.",
        ),
    ] = "",
    status: Annotated[
        EntryStatus | None, typer.Option(show_default=False, help="Only runs of this status.")
    ] = None,
    sort: Annotated[Sort, typer.Option(help="What to sort by.")] = Sort.CREATED,
    limit: LimitOption = None,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> int:
    """List the recorded runs, the newest first. A damaged one is listed with the reason.

    More commands, each with --help: `remat runs show`, `tag`, `note`, `search`, `export` and `gc`.
    """
    query = RunQuery(
        tags=tuple(tag or ()), name=name, text=text, status=status, sort=sort, limit=limit
    )
    return _list(query, root, as_json=as_json)


def show(run: RunArgument, root: RootOption = None, as_json: JsonOption = False) -> int:
    """Show one run: its summary and variants, tags, notes, and artifacts."""
    from remat.cli.screen import out
    from remat.runs.marks import read_marks
    from remat.runs.store import find_run, load_run

    folder = find_run(run, root)
    record, marks = load_run(folder), read_marks(folder)
    if as_json:
        document = {
            "path": str(folder),
            "tags": list(marks.tags),
            "notes": [mark.model_dump(mode="json") for mark in marks.notes],
            "run": record.model_dump(mode="json"),
        }
        typer.echo(json.dumps(document, indent=1))
        return 0
    from remat.cli.tables import marks_view
    from remat.report.terminal import run_view

    out().print(run_view(record))
    out().print(marks_view(record, marks))
    return 0


def tag(
    run: RunArgument,
    tags: Annotated[
        list[str] | None,
        typer.Argument(metavar="TAG", show_default=False, help="Tags to put on it."),
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option("--remove", metavar="TAG", show_default=False, help="Take this tag off."),
    ] = None,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> int:
    """Put tags on a run, or take them off. Without any, its tags are printed."""
    from remat.runs.marks import set_tags
    from remat.runs.store import find_run

    marks = set_tags(find_run(run, root), tags or (), remove or ())
    typer.echo(json.dumps(list(marks.tags)) if as_json else " ".join(marks.tags))
    return 0


def note(
    run: RunArgument,
    text: Annotated[
        list[str], typer.Argument(metavar="TEXT", show_default=False, help="What to note.")
    ],
    root: RootOption = None,
    as_json: JsonOption = False,
) -> int:
    """Add a note to a run, with the time and your user name."""
    from remat.runs.marks import add_note
    from remat.runs.store import find_run

    marks = add_note(find_run(run, root), " ".join(text))
    if as_json:
        notes = [mark.model_dump(mode="json") for mark in marks.notes]
        typer.echo(json.dumps(notes, indent=1))
    else:
        typer.echo("1 note" if len(marks.notes) == 1 else f"{len(marks.notes)} notes")
    return 0


def search(
    text: Annotated[str, typer.Argument(metavar="TEXT", show_default=False, help="What to find.")],
    limit: LimitOption = None,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> int:
    """List the runs that say TEXT anywhere: summary, notes, tags, variants, command, commit."""
    return _list(RunQuery(text=text, limit=limit), root, as_json=as_json)


def export(
    run: Annotated[list[str], typer.Argument(metavar="RUN", show_default=False, help=RUN_HELP)],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            show_default=False,
            help="Write a file: .zip or .tar.gz for whole runs, .csv for a table of variants.",
        ),
    ] = None,
    mlflow: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Add them to MLflow's SQLite database; needs remat[track].",
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="Write their series for TensorBoard; needs remat[track].",
        ),
    ] = None,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> int:
    """Hand runs on: an archive with their artifacts, a table, MLflow, or TensorBoard."""
    if output is None and mlflow is None and tensorboard is None:
        raise typer.BadParameter("give --output, --mlflow or --tensorboard: where to write.")
    from remat.runs.export import export_runs
    from remat.runs.store import find_run, load_run
    from remat.runs.tracking import to_mlflow, to_tensorboard

    folders = [find_run(name, root) for name in run]
    records = [load_run(folder) for folder in folders]
    document: dict[str, object] = {"num_runs": len(run)}
    if output is not None:
        document["path"] = str(export_runs(folders, output))
    if mlflow is not None:
        document |= {"mlflow": str(mlflow), "num_new": to_mlflow(records, mlflow)}
    if tensorboard is not None:
        document["tensorboard"] = str(tensorboard)
        to_tensorboard(records, tensorboard)
    written = [str(place) for place in (output, mlflow, tensorboard) if place is not None]
    typer.echo(json.dumps(document) if as_json else "\n".join(written))
    return 0


def gc(
    days: Annotated[
        float,
        typer.Option(
            "--older-than-days",
            min=0.0,
            metavar="DAYS",
            help="Leave what is younger: a run being written may be about to name it.",
        ),
    ] = 1.0,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> int:
    """Remove artifacts that no run references. Runs are never removed: delete their folders."""
    from remat.runs.collecting import DAY_SECONDS, collect_garbage
    from remat.runs.store import store_root
    from remat.units import format_bytes

    found = collect_garbage(store_root(root), older_than_seconds=days * DAY_SECONDS)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1))
        return 0
    typer.echo(
        f"{len(found.removed)} artifacts removed, {format_bytes(found.freed_bytes)} freed; "
        f"{found.num_referenced} are referenced by {found.num_runs} runs"
    )
    return 0


def make_group() -> typer.Typer:
    """Build `remat runs` with the commands inside."""
    group = typer.Typer(cls=DefaultGroup, rich_markup_mode="markdown")
    group.command(DEFAULT, hidden=True, epilog=EXAMPLE)(command)
    for function, example in (
        (show, "remat runs show 20261105-143210-digits-vit-3fa2c1"),
        (tag, "remat runs tag 20261105-1432 baseline --remove draft"),
        (note, 'remat runs note 20261105-1432 "after the fix of the loader"'),
        (search, "remat runs search baseline"),
        (export, "remat runs export 20261105-1432 -o runs.zip"),
        (gc, "remat runs gc --older-than-days 7"),
    ):
        group.command(function.__name__, epilog=f"Example: {example}")(function)
    return group


def _list(query: RunQuery, root: Path | None, *, as_json: bool) -> int:
    from remat.runs.store import list_runs, store_root

    entries = list_runs(root, query)
    if as_json:
        typer.echo(json.dumps([_as_data(entry) for entry in entries], indent=1))
        return 0
    from remat.cli.screen import note, out
    from remat.cli.tables import MOST_TABLE_ROWS, runs_lines, runs_table

    if not entries:
        found = "no runs" if query == RunQuery() else "no such runs"
        made = "`remat evaluate` and `remat demo` make them."
        note(f"{found} in {str(store_root(root))!r}; {made}")
    elif len(entries) > MOST_TABLE_ROWS:
        typer.echo("\n".join(runs_lines(entries)))
    else:
        out().print(runs_table(entries))
    return 0


def _as_data(entry: RunEntry) -> dict[str, object]:
    return asdict(entry) | {"path": str(entry.path), "status": entry.status.value}
