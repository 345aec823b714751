"""A metric as sums over examples: any slice, its rest and every resample follow by adding up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from remat.evaluation.calibration import TINY
from remat.evaluation.predictions import Predictions, Task
from remat.evaluation.statistics import Figure, Floats, Mask, bootstrap, wilson
from remat.runs.evidence import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """One metric over N examples.

    sums: (N, K), what each example adds; `figure` makes the metric from their sum.
    error: (N,), mean error of each example, larger is worse; NaN where it has no row.
    is_share: each example is right or wrong, and the metric is the share of right ones.
    """

    metric: str
    sums: Floats
    figure: Figure
    error: Floats
    is_share: bool
    is_higher_better: bool

    def of(self, examples: Mask) -> float | None:
        """Give the metric on some examples; `None` where none of them has a row."""
        if not np.isfinite(self.error[examples]).any():
            return None
        return float(self.figure(self.sums[examples].sum(axis=0)))

    def interval(self, examples: Mask) -> Interval | None:
        """Give the metric with its interval: Wilson's for a share, else by bootstrap."""
        if self.of(examples) is None:
            return None
        chosen = self.sums[examples]
        if self.is_share:
            right, count = chosen.sum(axis=0)
            return wilson(round(right), round(count))
        return bootstrap(chosen, self.figure)


def tally(predictions: Predictions) -> Tally:
    """Take the metric that stands for the task: accuracy, perplexity, mean IoU or RMSE.

    accuracy: share of right classes. perplexity: exponential of the mean negative log-likelihood
    of the tokens. mean_iou: mean over the classes that occur of intersection over union, of all
    pixels together. rmse: root of the mean squared error of the values.
    """
    return {
        Task.CLASSES: _accuracy,
        Task.TOKENS: _perplexity,
        Task.PIXELS: _mean_iou,
        Task.VALUES: _rmse,
    }[predictions.task](predictions)


def _accuracy(predictions: Predictions) -> Tally:
    sums, error = _means(predictions, 1 - predictions.is_right)
    right = np.stack([sums[:, 1] - sums[:, 0], sums[:, 1]], axis=1)
    return Tally(
        metric="accuracy",
        sums=right,
        figure=_mean,
        error=error,
        is_share=True,
        is_higher_better=True,
    )


def _perplexity(predictions: Predictions) -> Tally:
    sums, error = _means(predictions, -np.log(np.maximum(predictions.likelihood, TINY)))
    return Tally(
        metric="perplexity",
        sums=sums,
        figure=lambda total: np.exp(_mean(total)),
        error=error,
        is_share=False,
        is_higher_better=False,
    )


def _rmse(predictions: Predictions) -> Tally:
    sums, error = _means(predictions, np.square(predictions.target - predictions.predicted))
    return Tally(
        metric="rmse",
        sums=sums,
        figure=lambda total: np.sqrt(_mean(total)),
        error=error,
        is_share=False,
        is_higher_better=False,
    )


def _mean_iou(predictions: Predictions) -> Tally:
    classes = predictions.num_classes

    def counts(column: Floats, weights: Floats | None = None) -> Floats:
        place = predictions.example * classes + column.astype(np.int64)
        found = np.bincount(place, weights=weights, minlength=predictions.num_examples * classes)
        return found.reshape(-1, classes).astype(np.float64)

    right = predictions.is_right
    both = counts(predictions.target, right)
    either = counts(predictions.target) + counts(predictions.predicted) - both
    _, error = _means(predictions, 1 - right)

    def figure(total: Floats) -> Floats:
        met, joined = total[..., :classes], total[..., classes:]
        occurs = joined > 0
        ratio = np.divide(met, joined, out=np.zeros_like(met), where=occurs)
        mean: Floats = ratio.sum(axis=-1) / np.maximum(occurs.sum(axis=-1), 1)
        return mean

    return Tally(
        metric="mean_iou",
        sums=np.concatenate([both, either], axis=1),
        figure=figure,
        error=error,
        is_share=False,
        is_higher_better=True,
    )


def _means(predictions: Predictions, error: Floats) -> tuple[Floats, Floats]:
    """Sum the rows' errors for each example: (N, 2) with their number, and (N,) means."""
    size = predictions.num_examples
    total = np.bincount(predictions.example, weights=error, minlength=size)
    count = np.bincount(predictions.example, minlength=size).astype(np.float64)
    mean = np.divide(total, count, out=np.full(size, np.nan), where=count > 0)
    return np.stack([total, count], axis=1), mean


def _mean(total: Floats) -> Floats:
    count = total[..., 1]
    mean: Floats = np.divide(total[..., 0], count, out=np.full_like(count, np.nan), where=count > 0)
    return mean
