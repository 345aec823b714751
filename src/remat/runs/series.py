"""The series of a run as a CSV table: one number per row, for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from remat.runs.records import Run, Variant

_COLUMNS = ("variant", "series", "index", "value")


def metrics_csv(run: Run) -> str:
    """Write every series of the run as rows of variant, series, index and value.

    Series are `train_loss` (index: step), `step_seconds` (index: round) and
    `validation_<metric>` (index: epoch). Values are written so that they read back exactly.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for variant in run.variants:
        rows = series_of(variant)
        writer.writerows((variant.label, name, index, repr(value)) for name, index, value in rows)
    return text.getvalue()


def series_of(variant: Variant) -> Iterator[tuple[str, int, float]]:
    """Yield every number of every series: its name, its place, and the value."""
    for step, loss in enumerate(variant.losses):
        yield "train_loss", step, loss
    if variant.step_times is not None:
        for turn, seconds in enumerate(variant.step_times.seconds):
            yield "step_seconds", turn, seconds
    for point in variant.quality:
        for name, value in point.metrics.items():
            yield f"validation_{name}", point.epoch, value
