"""What the list of runs shows of each, read from its folder: `run.json` and the marks beside it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

RUN_FILE = "run.json"


class EntryStatus(str, enum.Enum):
    """What a folder of the store holds."""

    COMPLETE = "complete"
    UNFINISHED = "unfinished"
    DAMAGED = "damaged"


@dataclass(frozen=True, kw_only=True)
class RunEntry:
    """One line of the list of runs; `message` says what is wrong with a damaged one.

    `peak_bytes` and `step_seconds` are those of the plan with the least measured peak,
    `reference_peak_bytes` is the peak without a plan, `quality` the one `metric` that stands for
    the run without a plan at the end of training.
    """

    id: str
    path: Path
    status: EntryStatus
    name: str = ""
    created: str = ""
    passed: bool | None = None
    num_variants: int = 0
    message: str = ""
    tags: tuple[str, ...] = ()
    num_notes: int = 0
    peak_bytes: int | None = None
    reference_peak_bytes: int | None = None
    step_seconds: float | None = None
    metric: str = ""
    quality: float | None = None


def read_entry(folder: Path) -> tuple[RunEntry, str]:
    """Read one line of the list from a run's folder, and the text that a search looks through."""
    from remat.errors import PlanFileError
    from remat.runs.marks import read_marks
    from remat.runs.reading import best_planned, final_quality, reference_of
    from remat.runs.records import Run, RunStatus

    marks = read_marks(folder)
    said = [folder.name, *marks.tags, *(note.text for note in marks.notes)]
    try:
        run = Run.load(folder / RUN_FILE)
    except PlanFileError as error:
        entry = RunEntry(
            id=folder.name,
            path=folder,
            status=EntryStatus.DAMAGED,
            message=str(error),
            tags=marks.tags,
            num_notes=len(marks.notes),
        )
        return entry, "\n".join(said)
    is_finished = run.status is RunStatus.COMPLETE
    best, reference = best_planned(run.variants), reference_of(run.variants)
    quality = final_quality(reference) if reference is not None else None
    entry = RunEntry(
        id=folder.name,
        path=folder,
        status=EntryStatus.COMPLETE if is_finished else EntryStatus.UNFINISHED,
        name=run.name,
        created=run.created,
        passed=run.passed if is_finished else None,
        num_variants=len(run.variants),
        message=run.summary,
        tags=marks.tags,
        num_notes=len(marks.notes),
        peak_bytes=best.measured_peak_bytes if best else None,
        reference_peak_bytes=reference.measured_peak_bytes if reference else None,
        step_seconds=best.step_times.median_seconds if best and best.step_times else None,
        metric=quality[0] if quality else "",
        quality=quality[1] if quality else None,
    )
    place = run.environment
    said += [run.name, run.summary, place.command, place.device, place.processor]
    said += [place.git_commit or "", *run.notes]
    said += [part for variant in run.variants for part in (variant.label, variant.message)]
    return entry, "\n".join(said)
