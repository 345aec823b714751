"""The book of an evaluation: the run as far as it has come, on disk after every change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from remat.files import write_atomically
from remat.runs.judge import judged
from remat.runs.records import Run, Variant
from remat.runs.series import metrics_csv
from remat.runs.store import METRICS_FILE, RUN_FILE

# Called with the stage, how much of it is done, and how much it has in all (None: not known).
ProgressFunction = Callable[[str, int, int | None], None]


class Book:
    """The run as far as it has come, on disk after every change."""

    serves = False  # whether the trained model is served at the end

    def __init__(self, folder: Path, run: Run, progress: ProgressFunction) -> None:
        self.folder = folder
        self.run = run
        self.progress = progress

    def note(self, **changes: object) -> None:
        """Change fields of the run, draw the verdicts again, and write it."""
        self.run = judged(self.run.model_copy(update=changes))
        self.run.save(self.folder / RUN_FILE)
        write_atomically(self.folder / METRICS_FILE, metrics_csv(self.run))

    def note_variant(self, variant: Variant) -> None:
        """Replace the variant of that label."""
        self.note(
            variants=tuple(
                variant if old.label == variant.label else old for old in self.run.variants
            )
        )

    def counting(self, stage: str, total: int | None) -> Callable[[int], None]:
        """Begin a stage, and return what is called with how much of it is done."""
        self.progress(stage, 0, total)
        return lambda done: self.progress(stage, done, total)

    def once(self, stage: str, work: Callable[[], None]) -> None:
        """Do a stage and note that it is done; one that was done before is left out."""
        if stage not in self.run.finished_stages:
            work()
            self.note(finished_stages=(*self.run.finished_stages, stage))

    def variant(self, label: str) -> Variant:
        """Return the variant of that label."""
        return next(variant for variant in self.run.variants if variant.label == label)
