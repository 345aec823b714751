"""What a report says, as plain text values: shared by the page, the Markdown and the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from remat.report.palette import variant_roles
from remat.runs.reading import (
    MINUS,
    best_planned,
    final_quality,
    format_value,
    is_time_difference_clear,
    metric_name,
    reference_of,
    relative_time,
)
from remat.runs.records import Run, RunStatus, Variant, VariantKind, VariantStatus, Verdict
from remat.units import format_bytes, format_seconds

_KIND_NAMES = {
    VariantKind.REFERENCE: "as written",
    VariantKind.POLICY: "fixed policy",
    VariantKind.PLANNED: "planned by remat",
}
_MARKS = {
    Verdict.REFERENCE: "reference",
    Verdict.PASSED: "passed",
    Verdict.FAILED: "FAILED",
    Verdict.NONE: "\N{EN DASH}",
}
NOTHING = "\N{EN DASH}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One figure of the report's head."""

    title: str
    value: str
    detail: str
    is_good: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the decision table."""

    label: str
    role: str
    kind: str
    asked: str
    budget: str
    predicted: str
    measured: str
    peak_error: str
    step_time: str
    step_spread: str
    extra_time: str
    recomputed: str
    quality: str
    metric: str
    verdict: str
    verdict_code: str
    message: str


def tiles(run: Run) -> list[Tile]:
    """Give the figures that a reader wants first: memory, time, sameness, error of prediction."""
    reference, best = reference_of(run.variants), best_planned(run.variants)
    found = []
    if best is not None and best.measured_peak_bytes:
        found.append(_memory_tile(best, reference))
        ratio = relative_time(best, reference)
        if ratio is not None and reference is not None:
            found.append(_time_tile(best, reference, ratio))
    found.append(_result_tile(run))
    errors = [abs(e) for v in run.variants if (e := peak_error(v)) is not None]
    if errors:
        found.append(
            Tile(
                title="Prediction",
                value=f"{max(errors):.2%} off",
                detail=f"largest difference of predicted and measured peak, {len(errors)} variants",
            )
        )
    return found


def rows(run: Run) -> list[Row]:
    """Give the decision table, one line per variant."""
    reference, roles = reference_of(run.variants), variant_roles(run.variants)
    return [_row(variant, reference, roles[variant.label]) for variant in run.variants]


def peak_error(variant: Variant) -> float | None:
    """Predicted over measured peak, minus one."""
    if not (variant.predicted_peak_bytes and variant.measured_peak_bytes):
        return None
    return variant.predicted_peak_bytes / variant.measured_peak_bytes - 1


def step_time(variant: Variant) -> str:
    """Write median and interquartile range of the step time."""
    times = variant.step_times
    if times is None:
        return NOTHING
    return f"{format_seconds(times.median_seconds)} ± {format_seconds(times.iqr_seconds / 2)}"


def signed_percent(ratio: float, digits: int = 0) -> str:
    """Write a ratio with its sign, with a true minus."""
    return f"{ratio:+.{digits}%}".replace("-", MINUS)


def how_measured(run: Run) -> list[tuple[str, str]]:
    """Give what a reader needs to judge the figures or to get them again."""
    env = run.environment
    threads = "1 thread" if env.num_threads == 1 else f"{env.num_threads} threads"
    memory = "" if env.memory_bytes is None else f", {format_bytes(env.memory_bytes)} memory"
    times = [v.step_times for v in run.variants if v.step_times is not None]
    rounds = (
        f"median and interquartile range of {len(times[0].seconds)} steps per variant, taken in "
        f"turn, after {times[0].warmup_rounds} of each that did not count"
        if times
        else "not measured"
    )
    commit = "not under version control"
    if env.git_commit:
        changed = ", with uncommitted changes" if env.git_dirty else ""
        commit = f"{env.git_commit[:12]}{changed}"
    return [
        ("Command", env.command),
        ("Date", run.created),
        ("Machine", f"{env.processor}, {threads}{memory} ({env.machine})"),
        ("Device", env.device),
        ("Versions", ", ".join(f"{name} {v}" for name, v in env.versions.items())),
        ("Python", env.python),
        ("Commit", commit),
        ("Seed", str(run.seed)),
        ("Model", f"{run.num_parameters:,} parameters"),
        ("Batch", ", ".join(run.batch_signature)),
        ("Training", _training_length(run)),
        ("Step time", rounds),
        ("Peak memory", "measured on a real step, over everything the step holds on the device"),
    ]


def _memory_tile(best: Variant, reference: Variant | None) -> Tile:
    after = best.measured_peak_bytes or 0
    if reference is None or not reference.measured_peak_bytes:
        return Tile(title="Peak memory", value=format_bytes(after), detail=f"under {best.label}")
    before = reference.measured_peak_bytes
    return Tile(
        title="Peak memory",
        value=signed_percent(after / before - 1),
        detail=f"{format_bytes(after)} under {best.label}, {format_bytes(before)} without",
        is_good=after < before,
    )


def _time_tile(best: Variant, reference: Variant, ratio: float) -> Tile:
    detail = f"{step_time(best)} under {best.label}, {step_time(reference)} without"
    if not is_time_difference_clear(best, reference):
        detail += "; within the noise of measurement"
    return Tile(title="Time per step", value=signed_percent(ratio), detail=detail)


def _result_tile(run: Run) -> Tile:
    if any(variant.verdict is Verdict.FAILED for variant in run.variants):
        failed = sum(variant.verdict is Verdict.FAILED for variant in run.variants)
        return Tile(
            title="Result of training",
            value="check failed",
            detail=f"{failed} of {len(run.variants)} variants; see the table",
            is_good=False,
        )
    if run.status is RunStatus.UNFINISHED:
        return Tile(
            title="Result of training", value="unfinished", detail="the run was ended early"
        )
    trained = [v for v in run.variants if v.losses_identical is not None]
    if trained and all(v.losses_identical and v.weights_identical for v in trained):
        return Tile(
            title="Result of training",
            value="identical",
            detail="every loss and the final weights, bit for bit",
            is_good=True,
        )
    return Tile(title="Result of training", value="passed", detail="within run-to-run noise")


def _row(variant: Variant, reference: Variant | None, role: str) -> Row:
    error, ratio = peak_error(variant), relative_time(variant, reference)
    quality = final_quality(variant)
    is_reference, times = variant.kind is VariantKind.REFERENCE, variant.step_times
    message = variant.message
    if not message and variant.status is not VariantStatus.FINISHED:
        message = variant.status.sentence
    verdict = _MARKS[variant.verdict]
    if variant.status is VariantStatus.INFEASIBLE:
        verdict = "infeasible"
        if variant.minimum_bytes is not None:
            message = f"the least peak found is {format_bytes(variant.minimum_bytes)}"
    return Row(
        label=variant.label,
        role=role,
        kind=_KIND_NAMES[variant.kind],
        asked=variant.asked_budget or NOTHING,
        budget=_bytes(variant.budget_bytes),
        predicted=_bytes(variant.predicted_peak_bytes),
        measured=_bytes(variant.measured_peak_bytes),
        peak_error=NOTHING
        if error is None
        else signed_percent(error, 2).replace("+0.00%", "0.00%"),
        step_time=NOTHING if times is None else format_seconds(times.median_seconds),
        step_spread="" if times is None else f"± {format_seconds(times.iqr_seconds / 2)}",
        extra_time=NOTHING if ratio is None or is_reference else signed_percent(ratio),
        recomputed=NOTHING if variant.plan is None else f"{variant.plan.recompute_fraction:.0%}",
        quality=NOTHING if quality is None else format_value(*quality),
        metric="" if quality is None else metric_name(quality[0]),
        verdict=verdict,
        verdict_code=variant.verdict.value,
        message=message,
    )


def _bytes(size: int | None) -> str:
    return NOTHING if size is None else format_bytes(size)


def _training_length(run: Run) -> str:
    steps = max((len(variant.losses) for variant in run.variants), default=0)
    epochs = "1 epoch" if run.epochs == 1 else f"at most {run.epochs} epochs"
    return f"{steps:,} steps in {epochs}, batches of {run.batch_size}"
