"""The planner's own calibration over recorded runs, against figures that follow by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remat.calibrating.agreement import agreements
from remat.calibrating.learning import trials_of
from remat.cost.calibration import Trial
from sample_runs import sample_run


def trial(predicted, measured, run="a", quantity="peak_bytes", source="roofline"):
    return Trial(
        run=run, variant="v", quantity=quantity, source=source, predicted=predicted,
        measured=measured,
    )  # fmt: skip


@given(st.lists(st.tuples(st.floats(1, 1e9), st.floats(1, 1e9)), min_size=1, max_size=20))
def test_errors_are_those_of_numpy(pairs):
    """Median and largest error of all trials agree with NumPy's."""
    (found,) = agreements(trial(*pair) for pair in pairs)
    errors = np.array([predicted / measured - 1 for predicted, measured in pairs])
    assert found.median_error == pytest.approx(np.median(errors))
    assert found.median_absolute_error == pytest.approx(np.median(np.abs(errors)))
    assert found.largest_absolute_error == pytest.approx(np.abs(errors).max())
    assert found.num_below == (errors < -1e-3).sum()
    assert found.num_trials == len(pairs)


def test_seconds_are_summed_up_by_what_priced_them_and_bytes_together():
    """A roofline's errors are not those of a calibration; a peak depends on neither."""
    found = agreements(
        [
            trial(1, 1),
            trial(2, 1, run="b", source="calibrated"),
            trial(1, 1, quantity="step_seconds"),
            trial(3, 1, quantity="step_seconds", source="calibrated"),
        ]
    )
    assert [(one.quantity, one.source, one.num_trials, one.num_runs) for one in found] == [
        ("peak_bytes", "", 2, 2),
        ("step_seconds", "calibrated", 1, 1),
        ("step_seconds", "roofline", 1, 1),
    ]
    assert found[0].worst.run == "b"


def test_every_variant_that_was_predicted_and_measured_counts():
    """Of a run, each variant with both figures is one trial."""
    run = sample_run()
    peaks = [one for one in agreements(trials_of(run)) if one.quantity == "peak_bytes"]
    both = [v for v in run.variants if v.predicted_peak_bytes and v.measured_peak_bytes]
    assert peaks[0].num_trials == len([v for v in both if v.plan is not None])
    assert peaks[0].largest_absolute_error == pytest.approx(4e-4, rel=0.01)


def test_nothing_recorded_is_no_agreement():
    """Without a trial there is no figure, in place of a zero."""
    assert agreements([]) == ()
