"""An SQLite index beside the runs: what their list shows, read again only where a file changed.

The folders are the truth and the index is a copy of a part of it: where it is missing, damaged, of
another version or behind, it is made again from the folders, and where it cannot be written (a
store that only may be read) it is made in memory for one call.
"""

from __future__ import annotations

import contextlib
import enum
import os
import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from remat.runs.entries import RUN_FILE, EntryStatus, RunEntry, read_entry
from remat.runs.locking import locked

INDEX_FILE = "index.sqlite"
_MARKS_FILE = "marks.jsonl"
_VERSION = 1
_WAIT_SECONDS = 30
_ROWS_PER_COMMIT = 100
_COLUMNS = tuple(field.name for field in fields(RunEntry) if field.name != "path")
_TABLE = f"""
    CREATE TABLE runs (
        {", ".join(f"{name} PRIMARY KEY" if name == "id" else name for name in _COLUMNS)},
        stamp, text
    )
"""


class Sort(str, enum.Enum):
    """What the list of runs is ordered by."""

    CREATED = "created"
    NAME = "name"
    PEAK = "peak"
    TIME = "time"
    QUALITY = "quality"


# All but names and least figures read best from the largest; ties go by the id.
_ORDER = {
    Sort.CREATED: "CASE created WHEN '' THEN id ELSE created END DESC, id DESC",
    Sort.NAME: "name, id DESC",
    Sort.PEAK: "peak_bytes IS NULL, peak_bytes, id DESC",
    Sort.TIME: "step_seconds IS NULL, step_seconds, id DESC",
    Sort.QUALITY: "quality IS NULL, metric, quality DESC, id DESC",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunQuery:
    """Which runs to list, and how; by default all of them, the newest first.

    `tags` must all be there; `name` is a part of the workload's name and `text` of anything that
    was said about the run, in any case.
    """

    tags: tuple[str, ...] = ()
    name: str = ""
    text: str = ""
    status: EntryStatus | None = None
    sort: Sort = Sort.CREATED
    limit: int | None = None


def query_runs(root: Path, query: RunQuery) -> list[RunEntry]:
    """List the runs below `root` that a query asks for; the index is brought up to date first."""
    index = root / INDEX_FILE
    with locked(root):
        for place in (index, index):
            with contextlib.suppress(sqlite3.DatabaseError):
                return _answer(place, root, query)
            _discard(place)
        return _answer(None, root, query)


def _answer(place: Path | None, root: Path, query: RunQuery) -> list[RunEntry]:
    with _opened(place) as connection:
        _refresh(connection, root)
        return _select(connection, root, query)


@contextlib.contextmanager
def _opened(place: Path | None) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(place or ":memory:", timeout=_WAIT_SECONDS, isolation_level=None)
    try:
        if connection.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
            connection.executescript(
                f"BEGIN IMMEDIATE; DROP TABLE IF EXISTS runs; {_TABLE}; "
                f"PRAGMA user_version = {_VERSION}; COMMIT"
            )
        yield connection
    finally:
        connection.close()


def _discard(place: Path) -> None:
    """Remove a damaged index, with its journal: left alone, that would be played into the next."""
    for path in (place, place.with_name(f"{place.name}-journal")):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _refresh(connection: sqlite3.Connection, root: Path) -> None:
    """Read again the runs whose files are not those that the index saw, and forget those gone."""
    on_disk = dict(_stamps(root))
    known = dict(connection.execute("SELECT id, stamp FROM runs"))
    gone = [(run,) for run in known if run not in on_disk]
    stale = [run for run, stamp in on_disk.items() if known.get(run) != stamp]
    if gone:
        with _transaction(connection):
            connection.executemany("DELETE FROM runs WHERE id = ?", gone)
    places = ", ".join("?" * (len(_COLUMNS) + 2))
    for first in range(0, len(stale), _ROWS_PER_COMMIT):
        some = stale[first : first + _ROWS_PER_COMMIT]
        # the stamp is older than what is read: what changes meanwhile is read again next time
        rows = [(*_row(root / run), on_disk[run]) for run in some]
        with _transaction(connection):
            connection.executemany(
                f"INSERT OR REPLACE INTO runs ({', '.join(_COLUMNS)}, text, stamp) "  # noqa: S608
                f"VALUES ({places})",
                rows,
            )


def _stamps(root: Path) -> Iterator[tuple[str, str]]:
    """Yield every run's folder with what changes when its files are written: no file is opened."""
    with os.scandir(root) as folders:
        for folder in folders:
            try:
                facts = os.stat(f"{folder.path}/{RUN_FILE}")  # noqa: PTH116  ten thousand of them
            except OSError:
                continue
            if not stat.S_ISREG(facts.st_mode):
                continue
            stamp = f"{facts.st_mtime_ns}-{facts.st_size}-{facts.st_ino}"
            with contextlib.suppress(OSError):
                marks = os.stat(f"{folder.path}/{_MARKS_FILE}")  # noqa: PTH116
                stamp += f"-{marks.st_mtime_ns}-{marks.st_size}"
            yield folder.name, stamp


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _row(folder: Path) -> tuple[object, ...]:
    entry, text = read_entry(folder)
    values = dict(zip((field.name for field in fields(entry)), astuple(entry), strict=True))
    values["status"] = entry.status.value
    values["tags"] = " ".join(entry.tags)
    return (*(values[name] for name in _COLUMNS), text)


def _select(connection: sqlite3.Connection, root: Path, query: RunQuery) -> list[RunEntry]:
    conditions, values = ["TRUE"], []
    for tag in query.tags:
        conditions.append("(' ' || tags || ' ') LIKE ? ESCAPE '\\'")
        values.append(f"% {_literal(tag)} %")
    for column, part in (("name", query.name), ("text", query.text)):
        if part:
            conditions.append(f"{column} LIKE ? ESCAPE '\\'")
            values.append(f"%{_literal(part)}%")
    if query.status is not None:
        conditions.append("status = ?")
        values.append(query.status.value)
    limit = -1 if query.limit is None else query.limit
    found = connection.execute(
        f"SELECT {', '.join(_COLUMNS)} FROM runs WHERE {' AND '.join(conditions)} "  # noqa: S608
        f"ORDER BY {_ORDER[query.sort]} LIMIT {limit}",
        values,
    )
    return [_entry(root, row) for row in found]


def _entry(root: Path, row: tuple[object, ...]) -> RunEntry:
    values = dict(zip(_COLUMNS, row, strict=True))
    passed = values["passed"]
    values |= {
        "path": root / str(values["id"]),
        "status": EntryStatus(values["status"]),
        "passed": None if passed is None else bool(passed),
        "tags": tuple(str(values["tags"]).split()),
    }
    return RunEntry(**values)  # type: ignore[arg-type]


def _literal(text: str) -> str:
    """Write text for LIKE, so that its own wildcards stand for themselves."""
    return "".join(f"\\{letter}" if letter in "\\%_" else letter for letter in text)
