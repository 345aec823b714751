"""What a reader of a run should keep an eye on, worst first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from remat.report.evidence import sliced_plan
from remat.report.tables import percent
from remat.runs.evidence import SliceQuality
from remat.runs.reading import (
    best_planned,
    format_value,
    metric_name,
    reference_of,
)
from remat.runs.records import Run, RunStatus, Variant, VariantKind, VariantStatus
from remat.units import format_bytes

# Confidence that is off by more than this is worth a word; a usual bound in practice, no law.
CALIBRATION_NOTED = 0.05
# So far may a predicted peak be off before a reader should know.
PREDICTION_NOTED = 0.02


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to watch, as a clause without a full stop."""

    text: str
    is_bad: bool = False


def findings(run: Run) -> list[Finding]:
    """List what to watch, the worst first; empty where nothing stands out."""
    return [
        *_unfinished(run),
        *_unreachable(run),
        *_slices(run),
        *_missing_groups(run),
        *_calibration(run),
        *_predictions(run),
        *_gaps(run),
    ]


def worst_slice(variant: Variant) -> SliceQuality | None:
    """Return the slice that is worse than the rest, surest first; `None` where none is."""
    found = [s for s in variant.slices if s.is_worse and s.quality is not None]
    return min(found, key=lambda s: (s.adjusted_p_value or 0.0, s.name), default=None)


def _unfinished(run: Run) -> Iterator[Finding]:
    if run.status is RunStatus.UNFINISHED:
        done = sum(v.status is VariantStatus.FINISHED for v in run.variants)
        yield Finding(f"the evaluation ended early, with {done} of {len(run.variants)} ways tried")


def _unreachable(run: Run) -> Iterator[Finding]:
    for variant in run.variants:
        if variant.status is VariantStatus.INFEASIBLE:
            least = variant.minimum_bytes
            need = "" if least is None else f"; the least found is {format_bytes(least)}"
            yield Finding(f"a budget of {variant.asked_budget} cannot be reached{need}")


def _slices(run: Run) -> Iterator[Finding]:
    reference = reference_of(run.variants)
    shown = sliced_plan(run) or reference
    worst = worst_slice(shown) if shown is not None else None
    if worst is None or worst.quality is None:
        return
    figure = format_value(worst.metric, worst.quality.value)
    rest = "" if worst.rest is None else f" against {format_value(worst.metric, worst.rest)}"
    same = ""
    if shown is not reference and reference is not None:
        twin = next((s for s in reference.slices if s.name == worst.name), None)
        if twin is not None and twin.quality is not None:
            equal = twin.quality.value == worst.quality.value
            same = ", just as without a plan" if equal else ", which differs from no plan"
    yield Finding(
        f"the model is weaker on {worst.name} ({metric_name(worst.metric)} {figure}{rest}){same}",
        is_bad="differs" in same,
    )


def _missing_groups(run: Run) -> Iterator[Finding]:
    missing = [r for r in run.representation if r.is_missing]
    if missing:
        named = ", ".join(f"{r.feature} {r.group}" for r in missing[:2])
        more = f" and {len(missing) - 2} more" if len(missing) > 2 else ""
        yield Finding(f"the data for evaluation hold nothing of {named}{more}")


def _calibration(run: Run) -> Iterator[Finding]:
    for variant in (best_planned(run.variants), reference_of(run.variants)):
        if variant is None or variant.calibration is None:
            continue
        error = variant.calibration.before.expected_error
        if error > CALIBRATION_NOTED:
            after = variant.calibration.after
            fixed = "" if after is None else f", {percent(after.expected_error)} once corrected"
            yield Finding(
                f"the model's stated confidence is off by {percent(error)} on average{fixed}"
            )
        return


def _predictions(run: Run) -> Iterator[Finding]:
    errors = {
        v.label: v.predicted_peak_bytes / v.measured_peak_bytes - 1
        for v in run.variants
        if v.kind is VariantKind.PLANNED and v.predicted_peak_bytes and v.measured_peak_bytes
    }
    label = max(errors, key=lambda name: abs(errors[name]), default=None)
    if label is not None and abs(errors[label]) > PREDICTION_NOTED:
        yield Finding(f"memory under {label} was foretold {abs(errors[label]):.1%} off")


def _gaps(run: Run) -> Iterator[Finding]:
    if run.gaps:
        sections = list(dict.fromkeys(gap.section for gap in run.gaps))
        named = ", ".join(sections[:2]) + (" and more" if len(sections) > 2 else "")
        yield Finding(f"not everything could be evaluated ({named})")
