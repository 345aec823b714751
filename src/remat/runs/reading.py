"""Figures that several readers of a run need: against the run without a plan, and for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from remat.runs.evidence import Equivalence
from remat.runs.records import EpochQuality, Variant, VariantKind

_LOWER_IS_BETTER = frozenset(
    {"loss", "train_loss", "nll", "perplexity", "mae", "rmse", "calibration_error", "brier"}
)
MINUS = "\N{MINUS SIGN}"


def reference_of(variants: Sequence[Variant]) -> Variant | None:
    """Return the variant without a plan, which all others are compared with."""
    found = [variant for variant in variants if variant.kind is VariantKind.REFERENCE]
    return found[0] if found else None


def best_planned(variants: Sequence[Variant]) -> Variant | None:
    """Return the planned variant with the least measured peak."""
    found = [v for v in variants if v.kind is VariantKind.PLANNED and v.measured_peak_bytes]
    return min(found, key=lambda v: v.measured_peak_bytes or 0, default=None)


def relative_time(variant: Variant, reference: Variant | None) -> float | None:
    """Median step time over that of the run without a plan, minus one; `None` where not timed."""
    if reference is None or variant.step_times is None or reference.step_times is None:
        return None
    return variant.step_times.median_seconds / reference.step_times.median_seconds - 1


def is_time_difference_clear(variant: Variant, reference: Variant | None) -> bool:
    """Say whether the medians lie further apart than the larger interquartile range."""
    if reference is None or variant.step_times is None or reference.step_times is None:
        return False
    apart = abs(variant.step_times.median_seconds - reference.step_times.median_seconds)
    return apart > max(variant.step_times.iqr_seconds, reference.step_times.iqr_seconds)


def final_quality(variant: Variant) -> tuple[str, float] | None:
    """Return the one metric that stands for the variant's quality, at the end of training."""
    if not variant.quality:
        return None
    metrics = variant.quality[-1].metrics
    for name in ("perplexity", "mean_iou", "accuracy", "r2", "loss"):
        if name in metrics:
            return name, metrics[name]
    return None


def best_quality(variant: Variant) -> EpochQuality | None:
    """Return the epoch that was best by the metric of `final_quality`; the first of equal ones.

    It is chosen on the data that it is measured on, so its figure flatters the model.
    """
    final = final_quality(variant)
    if final is None:
        return None
    sign = 1 if is_higher_better(final[0]) else -1
    known = [one for one in variant.quality if math.isfinite(one.metrics.get(final[0], math.nan))]
    return max(known, key=lambda one: sign * one.metrics[final[0]], default=None)


def is_reached(quality: EpochQuality, targets: Mapping[str, float]) -> bool:
    """Say whether every target is reached; a metric that is missing or NaN reaches none."""
    return all(_reached(quality, name, value) for name, value in targets.items())


def _reached(quality: EpochQuality, name: str, target: float) -> bool:
    found = quality.metrics.get(name, math.nan)
    return found >= target if is_higher_better(name) else found <= target


def is_higher_better(metric: str) -> bool:
    """Say whether more of a metric is better: all but losses, errors and perplexity."""
    return metric not in _LOWER_IS_BETTER


def closing_loss(losses: Sequence[float]) -> float:
    """Mean of the last tenth of the training losses, at least one; NaN without any."""
    last = losses[-max(1, len(losses) // 10) :]
    return math.fsum(last) / len(last) if last else math.nan


def metric_name(name: str) -> str:
    """Write the name of a metric for people."""
    named = {
        "r2": "R²",
        "nll": "negative log-likelihood",
        "mean_iou": "mean IoU",
        "macro_f1": "macro F1",
        "auroc": "AUROC",
        "rmse": "RMSE",
        "mae": "mean absolute error",
    }
    return named.get(name, name.replace("_", " "))


def format_value(name: str, value: float) -> str:
    """Write a metric for people: a share of right answers in percent, anything else as a number."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite"
    return f"{value:.1%}" if name.endswith("accuracy") else f"{value:.4g}"


def write_difference(found: Equivalence) -> str:
    """Write the difference of an equivalence test for people, with interval and margin."""
    interval = found.difference
    if interval is None:
        return f"{metric_name(found.metric)} in one seed alone"
    scale, unit = (100, " points") if found.metric.endswith("accuracy") else (1, "")
    value, low, high = (
        f"{number * scale:+.2g}".replace("-", MINUS)
        for number in (interval.value, interval.low, interval.high)
    )
    return (
        f"{metric_name(found.metric)} differs by {value}{unit} ({interval.level:.0%} interval "
        f"{low} to {high}) over {found.num_pairs} seeds, with a margin of "
        f"{found.margin * scale:.2g}{unit}"
    )
