"""Whether variants are as good as training without a plan, over several seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from remat.evaluation.statistics import equivalence_test
from remat.runs.evidence import Equivalence
from remat.runs.reading import closing_loss, final_quality, format_value, metric_name, reference_of
from remat.runs.records import Variant, VariantStatus

TRAIN_LOSS = "train_loss"
# Metrics from 0 to 1, where a difference is read in points; all others are read as ratios.
_SHARES = frozenset(
    {"accuracy", "balanced_accuracy", "macro_f1", "auroc", "mean_iou", "dice", "r2"}
)
_POINT = 0.01


def equivalences(
    variants: Sequence[Variant], margin: float | None = None
) -> tuple[Equivalence, ...]:
    """Compare every trained variant with the one without a plan, seed by seed.

    The metric is the one that stands for the quality of the reference, or the training loss where
    there is no evaluation data. The default margin is one point of a share such as accuracy, and
    1% of the reference's mean for anything else. Pairs whose weights are equal bit for bit are
    counted; where all are, the variant is equivalent without any statistics.
    """
    reference = reference_of(variants)
    if reference is None or reference.status is not VariantStatus.FINISHED:
        return ()
    metric = principal_metric(reference)
    expected = metric_by_seed(reference, metric)
    values = [value for value in expected.values() if math.isfinite(value)]
    if not values:
        return ()
    allowed, reason = (margin, "as asked for") if margin is not None else _margin(metric, values)
    reason += _spread(metric, values)
    return tuple(
        _compared(variant, metric, expected, allowed, reason)
        for variant in variants
        if variant is not reference and variant.status is VariantStatus.FINISHED
    )


def principal_metric(variant: Variant) -> str:
    """Name the metric that stands for the variant's quality."""
    found = final_quality(variant)
    return TRAIN_LOSS if found is None else found[0]


def metric_by_seed(variant: Variant, metric: str) -> dict[int | None, float]:
    """Give the metric at the end of every training; `None` stands for the seed of the run."""
    if metric == TRAIN_LOSS:
        first = closing_loss(variant.losses)
    else:
        first = variant.quality[-1].metrics.get(metric, math.nan) if variant.quality else math.nan
    return {None: first} | {one.seed: one.metrics.get(metric, math.nan) for one in variant.repeats}


def _compared(
    variant: Variant,
    metric: str,
    expected: dict[int | None, float],
    margin: float,
    reason: str,
) -> Equivalence:
    found = metric_by_seed(variant, metric)
    pairs = [seed for seed in found if seed in expected]
    differences = [found[seed] - expected[seed] for seed in pairs]
    known = [one for one in differences if math.isfinite(one)]
    same = [variant.weights_identical, *(one.weights_identical for one in variant.repeats)]
    num_identical = sum(one is True for one in same)
    test = equivalence_test(known, margin) if len(known) > 1 else None
    is_identical = num_identical == len(pairs)
    is_complete = len(known) == len(pairs)
    return Equivalence(
        variant=variant.label,
        metric=metric,
        num_pairs=len(pairs),
        num_identical=num_identical,
        difference=None if test is None else test.difference,
        margin=margin,
        margin_reason=reason,
        p_value=None if test is None else test.p_value,
        is_equivalent=is_identical or (test is not None and is_complete and test.is_equivalent),
    )


def _margin(metric: str, values: Sequence[float]) -> tuple[float, str]:
    if metric in _SHARES:
        unit = "0.01 of R²" if metric == "r2" else "one percentage point"
        return _POINT, f"{unit}: less than a reader of the figure would act on"
    mean = abs(float(np.mean(values)))
    return max(_POINT * mean, 1e-12), (
        f"1% of the {metric_name(metric)} without a plan, {format_value(metric, mean)}: less than "
        "a reader of the figure would act on"
    )


def _spread(metric: str, values: Sequence[float]) -> str:
    if len(values) < 2:
        return ""
    spread = float(np.std(values, ddof=1))
    written = f"{100 * spread:.2g} points" if metric in _SHARES else f"{spread:.3g}"
    return f"; without a plan, seeds alone spread it by {written} (standard deviation)"
