"""Figures that several readers of a run need: against the run without a plan, and for people."""

from __future__ import annotations

from collections.abc import Sequence

from remat.runs.records import Variant, VariantKind

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
    for name in ("perplexity", "accuracy", "r2", "loss"):
        if name in metrics:
            return name, metrics[name]
    return None


def metric_name(name: str) -> str:
    """Write the name of a metric for people."""
    return {"r2": "R²", "nll": "negative log-likelihood"}.get(name, name.replace("_", " "))


def format_value(name: str, value: float) -> str:
    """Write a metric for people: an accuracy in percent, anything else as a number."""
    return f"{value:.1%}" if name == "accuracy" else f"{value:.4g}"
