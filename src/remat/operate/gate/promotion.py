"""Baselines by decision: a file beside the runs that only grows says which, who, when and why."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from remat.errors import GateError
from remat.operate.gate.records import Promotion
from remat.runs.ledger import append, read
from remat.runs.marks import now_utc
from remat.runs.records import RunStatus
from remat.runs.store import RUN_FILE, find_run, load_run, store_root

BASELINES_FILE = "baselines.jsonl"


def promote(
    run: str | os.PathLike[str],
    *,
    who: str,
    why: str,
    root: str | os.PathLike[str] | None = None,
) -> Promotion:
    """Make a run the baseline of its workload, and record who decided it and why.

    Raises
    ------
    RunError: if there is no such run in the store, or it is damaged.
    GateError: if it was not finished or did not pass its own checks, or `who` or `why` is empty.
    """
    for name, text in (("--who", who), ("--why", why)):
        if not text.strip():
            raise GateError(f"a baseline is promoted by somebody for a reason: {name} is empty.")
    folder = find_run(run, root)
    record = load_run(folder)
    if record.status is not RunStatus.COMPLETE or not record.passed:
        state = (
            "did not pass its checks" if record.status is RunStatus.COMPLETE else "is unfinished"
        )
        raise GateError(f"run {record.id!r} {state}: it cannot be a baseline.")
    before = current(record.name, root)
    promotion = Promotion(
        at=now_utc(),
        who=who.strip(),
        why=why.strip(),
        workload=record.name,
        run=os.fspath(run) if folder.parent != store_root(root) else folder.name,
        run_sha256=_digest(folder),
        previous=before.run if before is not None else None,
    )
    store_root(root).mkdir(parents=True, exist_ok=True)
    append(store_root(root) / BASELINES_FILE, promotion)
    return promotion


def history(root: str | os.PathLike[str] | None = None) -> tuple[Promotion, ...]:
    """Return every promotion of a store, the oldest first.

    Raises
    ------
    GateError: if a line of the file cannot be read, as the baseline may be the one it named.
    """
    path = store_root(root) / BASELINES_FILE
    found, num_damaged = read(path, Promotion)
    if num_damaged:
        raise GateError(
            f"{num_damaged} lines of {os.fspath(path)!r} cannot be read: repair the file, or name "
            "the baseline with --baseline."
        )
    return tuple(found)


def current(workload: str, root: str | os.PathLike[str] | None = None) -> Promotion | None:
    """Return the promotion that holds for a workload now."""
    of_workload = [one for one in history(root) if one.workload == workload]
    return of_workload[-1] if of_workload else None


def promoted_run(workload: str, root: str | os.PathLike[str] | None = None) -> Path:
    """Folder of the run that is the baseline of a workload.

    Raises
    ------
    GateError: if none was promoted, or its file is not that which was promoted.
    RunError: if the run is gone.
    """
    promotion = current(workload, root)
    if promotion is None:
        raise GateError(
            f"no baseline of {workload!r} was promoted in {os.fspath(store_root(root))!r}: name "
            "one with --baseline RUN, or promote one with `remat gate promote RUN --who --why`."
        )
    folder = find_run(promotion.run, root)
    if _digest(folder) != promotion.run_sha256:
        raise GateError(
            f"the baseline {promotion.run!r} is not the file that {promotion.who} promoted on "
            f"{promotion.at}: restore its {RUN_FILE}, or promote it again."
        )
    return folder


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / RUN_FILE).read_bytes()).hexdigest()
