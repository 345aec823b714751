"""The evidence on quality: every metric at the last and best epoch, and the time to a target."""

from __future__ import annotations

from remat.report.tables import (
    NOTHING,
    Section,
    Table,
    all_metrics,
    metric,
    said_once,
    seconds,
    table,
)
from remat.runs.findings import targets_told
from remat.runs.reading import best_quality, final_quality, metric_name
from remat.runs.records import EpochQuality, Run, Variant


def quality_section(run: Run) -> Section:
    """Tell how good the trained models are; without a table where none was measured."""
    counts = {v.quality[-1].num_examples for v in run.variants if v.quality}
    examples = f"Over {max(counts):,} validation examples. " if counts else ""
    has_epochs = any(len(v.quality) > 1 for v in run.variants)
    best = (
        "The best epoch is chosen by the metric named first, on the data that it is measured on, "
        "so its figures flatter the model."
    )
    every = None if run.settings is None else run.settings.check_every
    often = "ten times an epoch" if every is None else f"every {every:,} steps"
    looked = f"Until the target was reached it was looked {often}, while the clock rested."
    return Section(
        key="quality",
        title="How good is the model?",
        lead="Each metric on the data for validation, at the end of training"
        f"{' and at the best epoch' if has_epochs else ''}.",
        how=f"{examples}{best if has_epochs else ''} {looked if run.targets else ''}".strip(),
        tables=(*_metrics(run), *_targets(run)),
    )


def _metrics(run: Run) -> tuple[Table, ...]:
    trained = [v for v in run.variants if v.quality]
    names = all_metrics(name for v in trained for q in v.quality for name in q.metrics)
    blocks = {v.label: _rows(v, names) for v in trained}
    rows = [(label, *cells) for label, block in said_once(blocks).items() for cells in block]
    columns = ("Variant", "At", *(metric_name(name) for name in names))
    return table("Validation quality", columns, rows, words=(0, 1))


def _rows(variant: Variant, names: list[str]) -> list[tuple[str, ...]]:
    def cells(what: str, found: EpochQuality) -> tuple[str, ...]:
        at = f"{what}, epoch {found.epoch + 1} of {len(variant.quality)}"
        return (at, *(metric(name, found.metrics.get(name)) for name in names))

    rows = [cells("last", variant.quality[-1])]
    best, last = best_quality(variant), final_quality(variant)
    if len(variant.quality) > 1 and best is not None and last is not None:
        rows.append(cells(f"best by {metric_name(last[0])}", best))
    return rows


def _targets(run: Run) -> tuple[Table, ...]:
    """Say when each training reached the run's targets; none where nothing was aimed at."""
    if not run.targets:
        return ()
    rows = []
    for v in run.variants:
        trainings = [(run.seed, v.steps_to_target, v.seconds_to_target)] if v.losses else []
        if v.steps_to_target is not None or v.seconds_to_target is None:  # else of an old version
            trainings += [(r.seed, r.steps_to_target, r.seconds_to_target) for r in v.repeats]
        for seed, steps, spent in trainings:
            reached = NOTHING if steps is None else f"{steps:,} of {len(v.losses):,}"
            told = "not reached" if spent is None else seconds(spent)
            rows.append((v.label, str(seed), reached, told))
    title = f"Time in training until {targets_told(run.targets)}"
    return table(title, ("Variant", "Seed", "Steps", "Time"), rows)
