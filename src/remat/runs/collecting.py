"""Garbage collection of a store: artifacts that no run names any more, and crashed writers' rests.

See NOTE [ Collection ] in `objects.py` for why nothing is taken from under a run being written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from remat.errors import PlanFileError, RunError
from remat.runs.entries import RUN_FILE
from remat.runs.objects import OBJECTS_FOLDER, Objects
from remat.runs.records import Run

DAY_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What a collection did."""

    num_runs: int
    num_referenced: int
    removed: tuple[str, ...]
    freed_bytes: int


def collect_garbage(
    root: Path, *, older_than_seconds: float = DAY_SECONDS, now: float | None = None
) -> Collected:
    """Remove the artifacts of a store that no run references and that are older than a day.

    Arguments
    ---------
    older_than_seconds: least age of what is removed; younger artifacts may belong to a run that is
        about to name them.
    now: the time to count from, seconds since 1970; the clock's, unless given.

    Raises
    ------
    RunError: if a run is damaged, as what it references cannot be known; nothing is removed then.
    """
    referenced: set[str] = set()
    runs = sorted(root.glob(f"*/{RUN_FILE}"))
    for path in runs:
        try:
            run = Run.load(path)
        except PlanFileError as error:
            raise RunError(
                f"run {path.parent.name!r} is damaged, and what it references cannot be known: "
                f"nothing was removed. Repair its folder or remove it first. {error}"
            ) from error
        referenced.update(artifact.sha256 for artifact in run.artifacts)
    objects = Objects(root / OBJECTS_FOLDER)
    removed, freed = objects.collect(
        frozenset(referenced), older_than_seconds=older_than_seconds, now=now
    )
    return Collected(
        num_runs=len(runs),
        num_referenced=len(referenced),
        removed=tuple(removed),
        freed_bytes=freed,
    )
