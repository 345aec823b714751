"""Whom the evaluation data stand for: shares against SciPy, what is missing is said to be."""

import numpy as np
import pytest
from scipy import stats

import remat
from remat.evaluation.grouping import MISSING, OTHER
from remat.evaluation.representation import check_population, representation


def by_group(rows):
    return {row.group: row for row in rows}


def test_shares_against_a_population_are_tested_exactly():
    """Counts, shares and the adjusted p-value follow from SciPy's binomial test."""
    column = np.array(["north"] * 70 + ["south"] * 30)
    found = by_group(
        representation({"region": column}, {}, {"region": {"north": 0.5, "south": 0.5}})
    )
    p_value = stats.binomtest(70, 100, 0.5).pvalue
    assert found["north"].reference_share == 0.5
    assert found["north"].evaluated_share == 0.7
    assert found["north"].num_evaluated == 70
    assert found["north"].adjusted_p_value == pytest.approx(2 * p_value, abs=1e-12)
    assert found["north"].is_off
    assert found["south"].is_off
    assert not found["south"].is_missing


def test_missing_group_is_said_to_be_missing():
    """A stated group without any example is named, however small it is."""
    column = np.array(["a"] * 20)
    found = by_group(representation({"kind": column}, {}, {"kind": {"a": 0.95, "b": 0.05}}))
    assert found["b"].is_missing
    assert found["b"].num_evaluated == 0
    assert not found["b"].is_off  # twenty examples do not show it to be more than chance
    assert not found["a"].is_missing


def test_group_that_nobody_stated_is_off():
    """What does not occur in the population at all cannot be chance."""
    column = np.array(["a"] * 20 + ["c"])
    found = by_group(representation({"kind": column}, {}, {"kind": {"a": 1.0}}))
    assert (found[OTHER].num_evaluated, found[OTHER].reference_share) == (1, 0.0)
    assert found[OTHER].is_off


def test_training_data_are_a_sample_themselves():
    """Against training data Fisher's test counts the chance on both sides."""
    training, evaluated = np.array([0] * 900 + [1] * 100), np.array([0] * 70 + [1] * 30)
    found = by_group(representation({"k": evaluated}, {"k": training}, {}))
    p_value = stats.fisher_exact([[30, 70], [100, 900]]).pvalue
    assert found["1"].reference_share == 0.1
    assert found["1"].adjusted_p_value == pytest.approx(2 * p_value, abs=1e-12)
    assert found["1"].is_off
    assert found["0"].is_off  # 70 % instead of 90 %


def test_small_difference_is_not_off_however_certain():
    """Less than a fifth is not called off, whatever the p-value."""
    training, evaluated = np.array([0, 1] * 50_000), np.array([0] * 5_400 + [1] * 4_600)
    found = by_group(representation({"k": evaluated}, {"k": training}, {}))
    assert found["0"].adjusted_p_value < 1e-6
    assert not found["0"].is_off


def test_numbers_are_cut_by_the_training_data():
    """Bins are the quartiles of the reference; what is not a number is a group of its own."""
    training = np.arange(400.0)
    evaluated = np.array([1.0] * 50 + [np.nan] * 10)
    found = by_group(representation({"x": evaluated}, {"x": training}, {}))
    assert found["below 99.75"].reference_share == 0.25
    assert found["below 99.75"].num_evaluated == 50
    assert found["299.2 and above"].is_missing
    assert found[MISSING].num_evaluated == 10
    assert found[MISSING].is_off


def test_same_data_are_not_off_in_nineteen_of_twenty_draws():
    """Drawn from one population, hardly any evaluation has a group that is called off."""
    generator = np.random.default_rng(0)
    wrong = 0
    for _ in range(60):
        training = {"k": generator.integers(0, 8, 2000), "x": generator.normal(size=2000)}
        evaluated = {"k": generator.integers(0, 8, 400), "x": generator.normal(size=400)}
        wrong += any(row.is_off for row in representation(evaluated, training, {}))
    assert wrong <= 3


@pytest.mark.parametrize(
    ("population", "message"),
    [
        ({"age": {"old": 1.0}}, r"feature 'age'; the workload's features are 'kind'"),
        ({"kind": {"a": 0.5, "b": 0.2}}, r"population\['kind'\] must be positive.*sum to 0\.7"),
        ({"kind": {"a": 1.5, "b": -0.5}}, "must be positive"),
    ],
)
def test_population_that_makes_no_sense_is_refused(population, message):
    """Names and shares are checked before training."""
    with pytest.raises(remat.WorkloadError, match=message):
        check_population(population, {"kind": np.array(["a"])})
