"""Intervals around predicted values: how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np

from remat.evaluation.predictions import Predictions
from remat.evaluation.statistics import Floats, bootstrap, halves, wilson
from remat.runs.evidence import Coverage

LEVELS = (0.8, 0.9, 0.95)


def cover(
    predictions: Predictions, levels: tuple[float, ...] = LEVELS, *, seed: int = 0
) -> tuple[Coverage, ...]:
    """Fit intervals on a random half of the examples, and count on the other how often they hold.

    Split conformal prediction (Vovk et al. 2005; Lei et al. 2018): the half width is the
    ceil((n + 1) x level)-th smallest absolute residual of the n fitted ones, with which the
    truth of an exchangeable example is covered with at least that probability. A level that n
    residuals cannot reach is left out, so that the result is empty for a handful of examples.
    """
    fitted_on, judged_on = halves(predictions.num_examples, seed)
    fitting, judged = predictions.rows_of(fitted_on), predictions.rows_of(judged_on)
    residuals = np.sort(np.abs(fitting.target - fitting.predicted))
    found = []
    for level in levels:
        # 1e-9: 0.95 x 20 is 19.000000000000004 in floats, and means 19
        rank = math.ceil((len(residuals) + 1) * level - 1e-9)
        if 0 < rank <= len(residuals) and len(judged.target):
            found.append(_coverage(judged, level, float(residuals[rank - 1])))
    return tuple(found)


def _coverage(judged: Predictions, level: float, half_width: float) -> Coverage:
    is_covered = np.abs(judged.target - judged.predicted) <= half_width
    if judged.has_one_row_each:
        share = wilson(int(is_covered.sum()), len(is_covered))
    else:  # values of one example depend on each other: examples are drawn whole
        size = judged.num_examples
        sums = np.stack(
            [
                np.bincount(judged.example, weights=is_covered, minlength=size),
                np.bincount(judged.example, minlength=size).astype(np.float64),
            ],
            axis=1,
        )
        share = bootstrap(sums, _share)
    return Coverage(nominal=level, covered=share, mean_width=2 * half_width)


def _share(sums: Floats) -> Floats:
    share: Floats = sums[..., 0] / sums[..., 1]
    return share
