"""The run store: one folder per run, listed and loaded by name, tolerant of damaged neighbours.

`run.json` in each folder is the truth; the index beside the folders only makes listing fast.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from remat.errors import PlanFileError, RunError
from remat.runs.entries import RUN_FILE, EntryStatus, RunEntry
from remat.runs.index import RunQuery, query_runs
from remat.runs.locking import locked
from remat.runs.records import Run

__all__ = [
    "METRICS_FILE",
    "REPORT_FILE",
    "RUN_FILE",
    "EntryStatus",
    "RunEntry",
    "RunQuery",
    "claim_run_dir",
    "find_run",
    "held",
    "list_runs",
    "load_run",
    "new_run_dir",
    "store_root",
]
REPORT_FILE = "report.html"
METRICS_FILE = "metrics.csv"


def store_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Folder that holds the runs: the argument, else `REMAT_RUNS`, else `remat-runs` here."""
    return Path(root or os.environ.get("REMAT_RUNS") or "remat-runs")


def new_run_dir(
    name: str, root: str | os.PathLike[str] | None = None, *, now: dt.datetime | None = None
) -> Path:
    """Make an empty folder for a run, named by date, time, workload and a short random suffix.

    Example
    -------
    `new_run_dir("digits-vit")` makes `remat-runs/20261105-143210-digits-vit-3fa2c1`.
    """
    moment = (now or dt.datetime.now(dt.timezone.utc)).strftime("%Y%m%d-%H%M%S")
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].rstrip("-") or "run"
    path = store_root(root) / f"{moment}-{slug}-{secrets.token_hex(3)}"
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise RunError(
            f"the folder {os.fspath(path)!r} for the run cannot be made: {error.strerror}. Name "
            "another with --out or the environment variable REMAT_RUNS."
        ) from error
    return path


def claim_run_dir(path: str | os.PathLike[str]) -> Path:
    """Make `path` the folder of a new run; an earlier run in it is never written over.

    Raises
    ------
    RunError: if it already holds a run, or cannot be made.
    """
    folder = Path(path)
    if (folder / RUN_FILE).exists():
        raise RunError(
            f"{os.fspath(folder)!r} already holds a run. Name another folder, or remove that one."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"the folder {os.fspath(folder)!r} for the run cannot be made: {error.strerror}."
        ) from error
    return folder


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Be the only process that writes the run in a folder, inside the block.

    What a killed writer left half written is removed first.

    Raises
    ------
    RunError: if another process is writing it now.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, wait=False))
        except BlockingIOError as error:
            raise RunError(
                f"another process is writing the run in {os.fspath(folder)!r}: wait for its end."
            ) from error
        for part in folder.glob(".*.part"):
            part.unlink(missing_ok=True)
        yield


def list_runs(
    root: str | os.PathLike[str] | None = None, query: RunQuery | None = None
) -> list[RunEntry]:
    """List the runs of a store, all of them and the newest first unless a query asks for less.

    Folders without a run are left out. A run that cannot be read is listed as damaged with the
    reason, and hides no other.
    """
    folder = store_root(root)
    if not folder.is_dir():
        return []
    return query_runs(folder, query or RunQuery())


def load_run(id_or_path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Run:
    """Load a run by its folder, its `run.json`, its id, or a beginning of the id that is unique.

    Raises
    ------
    RunError: if there is no such run, several begin so, or its file is damaged.
    """
    path = find_run(id_or_path, root)
    try:
        return Run.load(path / RUN_FILE)
    except PlanFileError as error:
        raise RunError(f"run {path.name!r} is damaged. {error}") from error


def find_run(
    id_or_path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None
) -> Path:
    """Folder of a run that is named as in `load_run`; the errors are the same."""
    given = Path(id_or_path)
    if given.name == RUN_FILE and given.is_file():
        return given.parent
    if (given / RUN_FILE).is_file():
        return given
    folder = store_root(root)
    name = os.fspath(id_or_path)
    runs = sorted(path.parent for path in folder.glob(f"*/{RUN_FILE}"))
    exact = [path for path in runs if path.name == name]
    matches = exact or [path for path in runs if name and path.name.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        listed = ", ".join(path.name for path in matches[:5])
        raise RunError(f"{name!r} names {len(matches)} runs: {listed}. Give more of the id.")
    known = ", ".join(path.name for path in runs[-3:]) or "none"
    raise RunError(
        f"there is no run {name!r}: neither a folder with a {RUN_FILE}, nor the beginning of an id "
        f"in {os.fspath(folder)!r} (latest runs there: {known}). `remat runs` lists them."
    )
