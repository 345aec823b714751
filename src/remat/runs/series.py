"""The series of a run as a CSV table: one number per row, for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from remat.runs.records import Run, Variant

_COLUMNS = ("variant", "series", "index", "value")
_Row = tuple[str, str, int, str]


def metrics_csv(run: Run) -> str:
    """Write every series of the run as rows of variant, series, index and value.

    Series are `train_loss` (index: step), `step_seconds` (index: round) and
    `validation_<metric>` (index: epoch). Values are written so that they read back exactly.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for variant in run.variants:
        writer.writerows(_rows(variant))
    return text.getvalue()


def _rows(variant: Variant) -> Iterator[_Row]:
    for step, loss in enumerate(variant.losses):
        yield variant.label, "train_loss", step, repr(loss)
    if variant.step_times is not None:
        for turn, seconds in enumerate(variant.step_times.seconds):
            yield variant.label, "step_seconds", turn, repr(seconds)
    for point in variant.quality:
        for name, value in point.metrics.items():
            yield variant.label, f"validation_{name}", point.epoch, repr(value)
