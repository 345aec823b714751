"""Two runs side by side: peaks, times with their noise, quality and plans, variant by variant."""

from __future__ import annotations

from pydantic import Field

from remat.files import Record
from remat.runs.growth import Share, describe_growth, peak_shares, plan_differences, plan_id
from remat.runs.noise import compare_times
from remat.runs.records import Run, Variant

_RECORDED = ("processor", "num_threads", "device", "python", "git_commit")


class MetricChange(Record):
    """One validation metric at the end of training, before and after."""

    metric: str
    before: float
    after: float


class VariantComparison(Record):
    """One variant in both runs. Where it is in one of them only, it is `only_in` that run's id."""

    label: str
    only_in: str | None = None
    before_verdict: str | None = None
    after_verdict: str | None = None
    before_peak_bytes: int | None = None
    after_peak_bytes: int | None = None
    growth: str = Field(default="", description="What grew and where, in words.")
    shares: tuple[Share, ...] = Field(default=(), description="The change of the simulated peak.")
    before_seconds: float | None = None
    after_seconds: float | None = None
    time_growth: float | None = Field(
        default=None, description="Relative, less the machine's own change where it is known."
    )
    time_noise: float | None = Field(default=None, description="What chance alone may show.")
    is_time_clear: bool = Field(default=False, description="Slower or faster beyond the noise.")
    metrics: tuple[MetricChange, ...] = ()
    before_plan: str | None = Field(default=None, description="Content address of the decisions.")
    after_plan: str | None = None
    plan_changes: tuple[str, ...] = Field(
        default=(), description="What the plan before decided otherwise."
    )


class Setting(Record):
    """Something that was not the same when the runs were made."""

    name: str
    before: str
    after: str


class Comparison(Record):
    """Two runs, variant by variant; `settings` tells what else was not the same."""

    schema_version: int = 1
    before: str
    after: str
    settings: tuple[Setting, ...]
    variants: tuple[VariantComparison, ...]


def compare(before: Run, after: Run) -> Comparison:
    """Put two runs side by side; variants are matched by their labels."""
    old = {variant.label: variant for variant in before.variants}
    new = {variant.label: variant for variant in after.variants}
    return Comparison(
        before=before.id,
        after=after.id,
        settings=_settings(before, after),
        variants=tuple(
            _compared(before, after, old[label], new[label])
            if label in old and label in new
            else VariantComparison(label=label, only_in=before.id if label in old else after.id)
            for label in dict.fromkeys((*old, *new))
        ),
    )


def _compared(before: Run, after: Run, old: Variant, new: Variant) -> VariantComparison:
    has_peaks = old.measured_peak_bytes is not None and new.measured_peak_bytes is not None
    facts: dict[str, object] = {}
    if old.step_times is not None and new.step_times is not None:
        rulers = (before.yardstick, after.yardstick)
        slower = compare_times(old.step_times, new.step_times, tolerance=0.0, yardsticks=rulers)
        faster = compare_times(
            new.step_times, old.step_times, tolerance=0.0, yardsticks=rulers[::-1]
        )
        if slower is not None and faster is not None:
            facts = {
                "time_growth": slower.growth,
                "time_noise": slower.noise,
                "is_time_clear": slower.is_slower or faster.is_slower,
            }
    return VariantComparison(
        label=old.label,
        before_verdict=old.verdict.value,
        after_verdict=new.verdict.value,
        before_peak_bytes=old.measured_peak_bytes,
        after_peak_bytes=new.measured_peak_bytes,
        growth=describe_growth(old, new)
        if has_peaks and old.measured_peak_bytes != new.measured_peak_bytes
        else "",
        shares=peak_shares(old, new),
        before_seconds=old.step_times.median_seconds if old.step_times else None,
        after_seconds=new.step_times.median_seconds if new.step_times else None,
        metrics=_metrics(old, new),
        before_plan=plan_id(old.plan) if old.plan else None,
        after_plan=plan_id(new.plan) if new.plan else None,
        plan_changes=tuple(plan_differences(old.plan, new.plan)),
        **facts,  # type: ignore[arg-type]
    )


def _metrics(old: Variant, new: Variant) -> tuple[MetricChange, ...]:
    if not (old.quality and new.quality):
        return ()
    first, second = old.quality[-1].metrics, new.quality[-1].metrics
    return tuple(
        MetricChange(metric=name, before=first[name], after=second[name])
        for name in first
        if name in second
    )


def _settings(before: Run, after: Run) -> tuple[Setting, ...]:
    pairs: list[tuple[str, object, object]] = [
        (name, getattr(before, name), getattr(after, name))
        for name in ("name", "seed", "epochs", "batch_size", "batch_signature", "num_parameters")
    ]
    there, here = before.environment, after.environment
    pairs += [(name, getattr(there, name), getattr(here, name)) for name in _RECORDED]
    packages = dict.fromkeys((*there.versions, *here.versions))
    pairs += [(name, there.versions.get(name), here.versions.get(name)) for name in packages]
    return tuple(
        Setting(name=name, before=str(first), after=str(second))
        for name, first, second in pairs
        if first != second
    )
