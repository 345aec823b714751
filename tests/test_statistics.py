"""Intervals and tests against closed forms, SciPy's own and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from remat.evaluation.statistics import (
    bootstrap,
    equivalence_test,
    halves,
    holm,
    student,
    wilson,
)


@given(st.integers(1, 500), st.data())
def test_wilson_interval_is_that_of_scipy(count, data):
    """The score interval agrees with SciPy's to 1e-9, at both ends too."""
    successes = data.draw(st.integers(0, count))
    found = wilson(successes, count)
    expected = stats.binomtest(successes, count).proportion_ci(0.95, method="wilson")
    assert found.value == successes / count
    assert found.low == pytest.approx(expected.low, abs=1e-9)
    assert found.high == pytest.approx(expected.high, abs=1e-9)


@pytest.mark.parametrize(("successes", "count"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_of_no_share_is_refused(successes, count):
    """No example is no share."""
    with pytest.raises(ValueError, match="expected 0 <= successes <= count"):
        wilson(successes, count)


def test_student_interval_is_that_of_scipy():
    """Mean and interval agree with SciPy's to 1e-9."""
    values = np.random.default_rng(0).normal(3, 2, 17)
    found = student(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.value == pytest.approx(values.mean(), abs=1e-12)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    with pytest.raises(ValueError, match="at least two values, got 1"):
        student([1.0])


@given(
    st.lists(st.floats(-1, 1), min_size=2, max_size=12).filter(lambda d: np.ptp(d) > 1e-6),
    st.floats(0.01, 2),
)
def test_equivalence_test_is_two_t_tests_and_the_interval_within_the_margin(differences, margin):
    """The p-value is the larger one of SciPy's two t-tests; the 90 % interval says the same."""
    found = equivalence_test(differences, margin)
    low = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    high = stats.ttest_1samp(differences, margin, alternative="less").pvalue
    assert found.p_value == pytest.approx(max(low, high), abs=1e-9)
    assert found.difference.level == pytest.approx(0.9)
    is_within = -margin < found.difference.low and found.difference.high < margin
    if abs(found.p_value - 0.05) > 1e-9:
        assert found.is_equivalent == is_within


def test_equal_differences_need_no_spread():
    """Where all pairs differ alike, the margin alone decides, without a division by zero."""
    assert equivalence_test([0.0, 0.0], 0.01).is_equivalent
    assert equivalence_test([0.0, 0.0], 0.01).p_value == 0
    assert not equivalence_test([0.02, 0.02], 0.01).is_equivalent
    with pytest.raises(ValueError, match="margin must be positive"):
        equivalence_test([0.0, 0.0], 0.0)


def test_variants_at_the_margin_are_called_equivalent_in_one_of_twenty():
    """The error of the test is its 5 %: here 2,000 times three seeds, one margin apart."""
    generator = np.random.default_rng(1)
    hits = sum(
        equivalence_test(generator.normal(0.01, 0.004, 3), 0.01).is_equivalent for _ in range(2000)
    )
    assert 0.035 < hits / 2000 < 0.065


def test_bootstrap_interval_is_nearly_that_of_the_normal_theory():
    """For a mean of many values both intervals agree; the seed alone decides the rest."""
    values = np.random.default_rng(2).exponential(1, 800)
    sums = np.stack([values, np.ones(800)], axis=1)

    def mean(total):
        return total[..., 0] / total[..., 1]

    found = bootstrap(sums, mean, seed=4)
    half = 1.96 * values.std() / math.sqrt(800)
    assert found.value == pytest.approx(values.mean(), abs=1e-12)
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert bootstrap(sums, mean, seed=4) == found
    with pytest.raises(ValueError, match="at least one example"):
        bootstrap(sums[:0], mean)


def test_bootstrap_of_many_examples_draws_groups_to_the_same_end():
    """With 60,000 examples the interval is still that of the normal theory, within seconds."""
    generator = np.random.default_rng(5)
    values, sizes = generator.exponential(1, 60_000), generator.integers(1, 9, 60_000)
    sums = np.stack([values * sizes, sizes.astype(float)], axis=1)
    found = bootstrap(sums, lambda total: total[..., 0] / total[..., 1])
    mean = (values * sizes).sum() / sizes.sum()
    error = np.sqrt(np.square((values - mean) * sizes).sum()) / sizes.sum()  # delta method
    assert found.value == pytest.approx(mean, abs=1e-12)
    assert (found.low, found.high) == pytest.approx(
        (mean - 1.96 * error, mean + 1.96 * error), abs=0.3 * error
    )


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_stepping_down_rejects(p_values):
    """Adjusted values below a level are those that Holm's procedure rejects at that level."""
    adjusted = holm(p_values)
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
            if p_values[place] * (len(p_values) - rank) >= level:
                break
            rejected.add(place)
        assert {i for i, p in enumerate(adjusted) if p < level} == rejected


@given(st.integers(0, 99), st.integers(0, 2**40))
def test_halves_share_nothing_and_leave_nothing_out(count, seed):
    """Every example is in exactly one half, and the halves are of one size, or one apart."""
    first, second = halves(count, seed)
    assert (first ^ second).all()
    assert second.sum() - first.sum() == count % 2
