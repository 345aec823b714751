"""How far confidence is from accuracy: calibration errors, scores, one temperature."""

from __future__ import annotations

import math

import numpy as np

from remat.evaluation.predictions import Floats, Predictions
from remat.evaluation.statistics import halves
from remat.runs.evidence import Calibration, CalibrationEvidence, ReliabilityBin

BINS = 15
# Below so many examples on either side a temperature would be fitted to noise.
_LEAST_EXAMPLES = 20
# A class that was ruled out and came true gives a large likelihood, not an infinite one.
TINY = float(np.finfo(np.float32).tiny)
# A temperature beyond these is no scaling any more: all classes alike, or one of them certain.
_COLDEST, _HOTTEST = 1 / 50, 50.0


def calibrate(predictions: Predictions, *, seed: int = 0) -> CalibrationEvidence:
    """Measure calibration, and again after one temperature (Guo et al. 2017).

    The temperature divides the logarithms of the probabilities. It is fitted on a random half of
    the examples by maximum likelihood; before and after are measured on the other half. Without
    probabilities of all classes, or with few examples, all examples are measured as they are.
    """
    scores = predictions.probabilities
    if scores is None or predictions.num_examples < 2 * _LEAST_EXAMPLES:
        return CalibrationEvidence(before=calibration(predictions))
    fitted_on, judged_on = halves(predictions.num_examples, seed)
    fitting, judged = predictions.rows_of(fitted_on), predictions.rows_of(judged_on)
    assert fitting.probabilities is not None
    assert judged.probabilities is not None
    temperature = fit_temperature(fitting.probabilities, fitting.target.astype(np.int64))
    return CalibrationEvidence(
        before=calibration(judged),
        after=calibration(_scaled(judged, temperature)),
        temperature=temperature,
        num_fitted=fitting.num_examples,
    )


def calibration(predictions: Predictions, num_bins: int = BINS) -> Calibration:
    """Measure calibration over bins of equal width, each open below and closed above.

    `expected_error` is the mean over rows of |accuracy - confidence| of their bin, `maximum_error`
    the largest of a bin (Naeini et al. 2015); `brier` the mean squared distance of the
    probabilities from the truth, summed over classes (Brier 1950), from 0 to 2; `nll` the mean
    negative log-likelihood, natural logarithm.

    Raises
    ------
    ValueError: without a row.
    """
    count = len(predictions.target)
    if count == 0:
        raise ValueError("calibration needs at least one prediction.")
    bins = _reliability(predictions.confidence, predictions.is_right, num_bins)
    gaps = [
        (abs(one.accuracy - one.confidence), one.num_examples)
        for one in bins
        if one.accuracy is not None and one.confidence is not None
    ]
    # sum over classes of (p - y)^2 = sum p^2 - 2 p_true + 1
    brier = float(np.mean(predictions.square_sum - 2 * predictions.likelihood + 1))
    return Calibration(
        num_examples=count,
        expected_error=sum(gap * size for gap, size in gaps) / count,
        maximum_error=max(gap for gap, _ in gaps),
        brier=brier,
        nll=float(-np.log(np.maximum(predictions.likelihood, TINY)).mean()),
        bins=bins,
    )


def fit_temperature(probabilities: Floats, labels: np.ndarray) -> float:
    """Find the temperature with the least negative log-likelihood, between 1/50 and 50.

    The likelihood is convex in the inverse temperature, so its slope has at most one zero: the
    mean logit under the scaled probabilities equals that of the true classes.
    """
    from scipy.optimize import brentq

    logits = np.log(np.maximum(probabilities, TINY))
    logits -= logits.max(axis=1, keepdims=True)
    true_mean = float(logits[np.arange(len(labels)), labels].mean())

    def slope(inverse: float) -> float:
        weights = np.exp(inverse * logits)
        weights /= weights.sum(axis=1, keepdims=True)
        return float((weights * logits).sum(axis=1).mean()) - true_mean

    if slope(1 / _COLDEST) <= 0:
        return _COLDEST
    if slope(1 / _HOTTEST) >= 0:
        return _HOTTEST
    return 1 / float(brentq(slope, 1 / _HOTTEST, 1 / _COLDEST, xtol=1e-13, rtol=1e-12))


def scale(probabilities: Floats, temperature: float) -> Floats:
    """Divide the logarithms of probabilities (R, C) by the temperature, and normalize the rows."""
    logits = np.log(np.maximum(probabilities, TINY)) / temperature
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    scaled: Floats = weights / weights.sum(axis=1, keepdims=True)
    return scaled


def _scaled(predictions: Predictions, temperature: float) -> Predictions:
    assert predictions.probabilities is not None
    scaled = scale(predictions.probabilities, temperature)
    rows = np.arange(len(scaled))
    return Predictions(
        task=predictions.task,
        num_examples=predictions.num_examples,
        num_classes=predictions.num_classes,
        example=predictions.example,
        predicted=predictions.predicted,  # a temperature changes no order
        target=predictions.target,
        confidence=scaled.max(axis=1),
        likelihood=scaled[rows, predictions.target.astype(np.int64)],
        square_sum=np.square(scaled).sum(axis=1),
        probabilities=scaled,
    )


def _reliability(confidence: Floats, right: Floats, num_bins: int) -> tuple[ReliabilityBin, ...]:
    edges = np.linspace(0, 1, num_bins + 1)
    place = np.searchsorted(edges[1:-1], confidence)
    sizes = np.bincount(place, minlength=num_bins)
    confident = np.bincount(place, weights=confidence, minlength=num_bins)
    correct = np.bincount(place, weights=right, minlength=num_bins)
    return tuple(
        ReliabilityBin(
            low=float(edges[i]),
            high=float(edges[i + 1]),
            num_examples=int(sizes[i]),
            confidence=float(confident[i] / sizes[i]) if sizes[i] else None,
            accuracy=float(correct[i] / sizes[i]) if sizes[i] else None,
        )
        for i in range(num_bins)
    )


def is_temperature_at_an_end(temperature: float | None) -> bool:
    """Say whether the fit ended at a limit, where the likelihood has no least value inside."""
    return temperature is not None and any(
        math.isclose(temperature, end) for end in (_COLDEST, _HOTTEST)
    )
