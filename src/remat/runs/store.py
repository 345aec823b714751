"""The run store: one folder per run, listed and loaded by name, tolerant of damaged neighbours."""

from __future__ import annotations

import datetime as dt
import enum
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from remat.errors import PlanFileError, RunError
from remat.runs.records import Run, RunStatus

RUN_FILE = "run.json"
REPORT_FILE = "report.html"
METRICS_FILE = "metrics.csv"


class EntryStatus(str, enum.Enum):
    """What a folder of the store holds."""

    COMPLETE = "complete"
    UNFINISHED = "unfinished"
    DAMAGED = "damaged"


@dataclass(frozen=True, kw_only=True)
class RunEntry:
    """One line of the list of runs; `message` says what is wrong with a damaged one."""

    id: str
    path: Path
    status: EntryStatus
    name: str = ""
    created: str = ""
    passed: bool | None = None
    num_variants: int = 0
    message: str = ""


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


def list_runs(root: str | os.PathLike[str] | None = None) -> list[RunEntry]:
    """List the runs of a store, newest first; folders without a run are left out.

    A run that cannot be read is listed as damaged with the reason, and hides no other.
    """
    folder = store_root(root)
    if not folder.is_dir():
        return []
    found = [_read_entry(path) for path in folder.iterdir() if (path / RUN_FILE).is_file()]
    return sorted(found, key=lambda entry: (entry.created or entry.id, entry.id), reverse=True)


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


def _read_entry(path: Path) -> RunEntry:
    try:
        run = Run.load(path / RUN_FILE)
    except PlanFileError as error:
        return RunEntry(id=path.name, path=path, status=EntryStatus.DAMAGED, message=str(error))
    finished = run.status is RunStatus.COMPLETE
    return RunEntry(
        id=path.name,
        path=path,
        status=EntryStatus.COMPLETE if finished else EntryStatus.UNFINISHED,
        name=run.name,
        created=run.created,
        passed=run.passed if finished else None,
        num_variants=len(run.variants),
        message=run.summary,
    )
