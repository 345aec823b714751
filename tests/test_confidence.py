"""Calibration and coverage against scikit-learn, torchmetrics and known truth."""

import numpy as np
import pytest
import torch
from sklearn import metrics
from sklearn.calibration import calibration_curve
from torchmetrics.classification import MulticlassCalibrationError

from made_predictions import classified, collected
from remat.evaluation.calibration import calibrate, calibration, fit_temperature, scale
from remat.evaluation.coverage import cover
from remat.runs.evidence import Calibration


@pytest.fixture(params=[2, 3, 10])
def predictions(request):
    return classified(400, request.param, seed=request.param)


def test_scores_of_probabilities_are_those_of_scikit_learn(predictions):
    """Brier score and likelihood agree to 1e-9 on the same predictions."""
    found = calibration(predictions)
    labels, scores = predictions.target, predictions.probabilities
    classes = np.arange(scores.shape[1])
    assert found.nll == pytest.approx(metrics.log_loss(labels, scores, labels=classes), abs=1e-9)
    truth = np.eye(len(classes))[labels.astype(int)]
    assert found.brier == pytest.approx(np.square(scores - truth).sum(axis=1).mean(), abs=1e-9)
    if len(classes) == 2:  # of two classes, scikit-learn gives half the sum
        assert found.brier == pytest.approx(
            2 * metrics.brier_score_loss(labels, scores[:, 1]), abs=1e-9
        )


def test_calibration_errors_are_those_of_torchmetrics(predictions):
    """Expected and maximum error agree with an independent implementation (in float32)."""
    found = calibration(predictions)
    scores = torch.from_numpy(predictions.probabilities)
    labels = torch.from_numpy(predictions.target).long()
    for norm, value in (("l1", found.expected_error), ("max", found.maximum_error)):
        theirs = MulticlassCalibrationError(scores.shape[1], n_bins=15, norm=norm)
        assert value == pytest.approx(float(theirs(scores, labels)), abs=2e-6)


def test_reliability_diagram_is_that_of_scikit_learn(predictions):
    """Confidence and accuracy of every bin that is not empty agree to 1e-9."""
    found = calibration(predictions, num_bins=10)
    accuracy, confidence = calibration_curve(
        predictions.is_right, predictions.confidence, n_bins=10
    )
    filled = [one for one in found.bins if one.num_examples]
    assert [one.accuracy for one in filled] == pytest.approx(list(accuracy), abs=1e-9)
    assert [one.confidence for one in filled] == pytest.approx(list(confidence), abs=1e-9)
    assert sum(one.num_examples for one in found.bins) == found.num_examples == 400
    empty = [one for one in found.bins if not one.num_examples]
    assert all(one.accuracy is None and one.confidence is None for one in empty)


def by_hand(confidence, right, num_bins):
    """Expected error with nothing but loops."""
    total = 0.0
    for i in range(num_bins):
        inside = [
            (c, r)
            for c, r in zip(confidence, right, strict=True)
            if i / num_bins < c <= (i + 1) / num_bins
        ]
        if inside:
            total += abs(sum(r for _, r in inside) - sum(c for c, _ in inside))
    return total / len(confidence)


def test_expected_error_is_that_of_plain_loops(predictions):
    """The definition, spelled out, gives the same to 1e-9."""
    expected = by_hand(predictions.confidence, predictions.is_right, 15)
    assert calibration(predictions).expected_error == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_temperature_that_was_planted_is_found(temperature):
    """Probabilities heated by a known temperature are cooled by its inverse, and calibrated."""
    true = classified(6000, 5, seed=1)
    heated = scale(true.probabilities, temperature)
    predictions = collected((torch.from_numpy(heated), torch.from_numpy(true.target).long()))
    found = calibrate(predictions)
    assert found.temperature == pytest.approx(1 / temperature, rel=0.06)
    assert found.num_fitted == found.before.num_examples == found.after.num_examples == 3000
    assert isinstance(found.after, Calibration)
    assert found.after.expected_error < 0.03
    if temperature != 1.0:
        assert found.after.nll < found.before.nll
        assert found.before.expected_error > 2 * found.after.expected_error


def test_temperature_has_the_least_likelihood_of_a_fine_grid():
    """No temperature on a grid is better than the fitted one."""
    true = classified(300, 4, seed=2)
    labels = true.target.astype(int)

    def nll(temperature):
        scaled = scale(true.probabilities, temperature)
        return -np.log(scaled[np.arange(len(labels)), labels]).mean()

    found = fit_temperature(true.probabilities, labels)
    assert nll(found) <= min(nll(t) for t in np.geomspace(0.1, 10, 500)) + 1e-12


def test_temperature_of_scikit_learn_is_the_same():
    """scikit-learn's own temperature scaling, fitted on the same logits, agrees."""
    calibrators = pytest.importorskip("sklearn.calibration")
    if not hasattr(calibrators, "_TemperatureScaling"):
        pytest.skip("scikit-learn before 1.8 has no temperature scaling")
    true = classified(300, 4, seed=3)
    theirs = calibrators._TemperatureScaling().fit(
        np.log(true.probabilities), true.target.astype(int)
    )
    found = fit_temperature(true.probabilities, true.target.astype(int))
    assert found == pytest.approx(1 / theirs.beta_, rel=1e-4)


def test_few_examples_are_measured_without_a_temperature():
    """A handful is not split: all of it is measured, as it is."""
    found = calibrate(classified(30, 3, seed=4))
    assert (found.temperature, found.after, found.num_fitted) == (None, None, 0)
    assert found.before.num_examples == 30


def test_perfect_separation_ends_at_the_coldest_temperature():
    """Where every prediction is right, no temperature is best: the limit is given, not zero."""
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).repeat(40, 1)
    found = calibrate(collected((scores, scores.argmax(dim=-1))))
    assert found.temperature == pytest.approx(1 / 50)


@pytest.mark.parametrize("nominal", [0.8, 0.9, 0.95])
def test_intervals_cover_what_they_promise(nominal):
    """Over many data sets, the share of truths inside is the level, within its noise."""
    covered, widths = [], []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        values = generator.normal(0, 1, 400)
        targets = values + generator.standard_t(4, 400)
        predictions = collected((torch.from_numpy(values), torch.from_numpy(targets)))
        (found,) = cover(predictions, (nominal,), seed=seed)
        covered.append(found.covered.value)
        widths.append(found.mean_width)
        assert found.covered.low <= found.covered.value <= found.covered.high
    assert np.mean(covered) == pytest.approx(nominal + 1 / 402, abs=0.012)
    assert min(widths) > 0


def test_intervals_follow_from_the_residuals_of_the_fitted_half():
    """All residuals equal: the interval is twice that wide, and every truth lies on its edge."""
    values = torch.zeros(100)
    found = cover(collected((values, torch.ones(100))))
    assert [one.nominal for one in found] == [0.8, 0.9, 0.95]
    assert all(one.mean_width == 2.0 and one.covered.value == 1.0 for one in found)


def test_levels_that_few_residuals_cannot_reach_are_left_out():
    """With 9 residuals 90 % is the most that can be promised."""
    found = cover(collected((torch.zeros(18), torch.arange(18.0))))
    assert [one.nominal for one in found] == [0.8, 0.9]
    assert cover(collected((torch.zeros(2), torch.ones(2)))) == ()


def test_values_of_one_example_stay_on_one_side():
    """With several values each, examples are split and resampled whole."""
    values = torch.randn(60, 3)
    found = cover(collected((values, values + torch.randn(60, 1))))
    assert found[0].covered.method.startswith("bootstrap over examples")
