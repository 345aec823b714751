"""Verdicts and the summary: what the measurements of a run are said to mean."""

import pytest

from remat.prove.records import Difference
from remat.runs.evidence import Equivalence, Interval
from remat.runs.judge import has_passed, judge
from remat.runs.reading import is_time_difference_clear, relative_time
from remat.runs.records import RunStatus, StepTimes, VariantKind, VariantStatus, Verdict
from remat.units import MIB
from sample_runs import sample_run, sample_variant

REFERENCE = sample_variant("no plan", VariantKind.REFERENCE, peak_mib=200, ms=100)


def verified(variant, **changes):
    return variant.model_copy(
        update={"verification": variant.verification.model_copy(update=changes)}
    )


def test_variant_that_kept_all_promises_passes():
    """Within its budget and identical bit for bit: passed, and it says what was identical."""
    found = judge(sample_variant())
    assert found.verdict is Verdict.PASSED
    assert "final weights identical bit for bit" in found.message


def test_variant_above_its_budget_fails():
    """One byte above the budget is above the budget."""
    peak = sample_variant().measured_peak_bytes
    assert peak is not None
    assert judge(sample_variant(budget_bytes=peak)).verdict is Verdict.PASSED
    found = judge(sample_variant(budget_bytes=peak - 1))
    assert found.verdict is Verdict.FAILED
    assert "above the budget" in found.message


@pytest.mark.parametrize(
    ("field", "message"),
    [("losses_identical", "loss curve differs"), ("weights_identical", "final weights differ")],
)
def test_variant_whose_training_differs_fails(field, message):
    """Where a single step was reproducible, a training that was not is a failure."""
    found = judge(sample_variant(**{field: False}))
    assert found.verdict is Verdict.FAILED
    assert message in found.message


def noisy(**changes):
    variant = sample_variant(losses_identical=False, weights_identical=False, **changes)
    return verified(variant, identical=False, within_noise=True, passed=True)


def equivalence(difference, spread, num_pairs=3, margin=0.01):
    interval = Interval(
        value=difference,
        low=difference - spread,
        high=difference + spread,
        level=0.9,
        method="Student t on paired differences",
    )
    return Equivalence(
        variant="plan 60%",
        metric="accuracy",
        num_pairs=num_pairs,
        num_identical=0,
        difference=interval if num_pairs > 1 else None,
        margin=margin,
        margin_reason="one percentage point",
        p_value=0.01 if num_pairs > 1 else None,
        is_equivalent=num_pairs > 1 and abs(difference) + spread < margin,
    )


def test_variant_within_the_models_own_noise_is_within_noise_where_it_was_not_trained():
    """A peer that was only measured is judged by its step."""
    found = judge(noisy(status=VariantStatus.MEASURED))
    assert found.verdict is Verdict.PASSED
    assert "noise" in found.message


@pytest.mark.parametrize("found", [None, equivalence(0.0, 0.0, num_pairs=1)])
def test_one_seed_is_too_few_to_say_that_another_end_of_training_is_as_good(found):
    """A model that is not reproducible ends elsewhere: one seed tells neither good nor bad."""
    judgement = judge(noisy(), found)
    assert judgement.verdict is Verdict.NONE
    assert "one seed is too few to say" in judgement.message


@pytest.mark.parametrize(
    ("found", "verdict", "message"),
    [
        (equivalence(0.001, 0.004), Verdict.PASSED, "equivalent to training without a plan"),
        (equivalence(-0.02, 0.004), Verdict.FAILED, "accuracy differs by \N{MINUS SIGN}2 points"),
        (equivalence(-0.005, 0.03), Verdict.NONE, "too few seeds to say whether it is equivalent"),
    ],
)
def test_variant_that_may_differ_is_judged_by_equivalence(found, verdict, message):
    """Shown equivalent passes, beyond the margin fails, and in between nothing is said."""
    judgement = judge(noisy(), found)
    assert judgement.verdict is verdict
    assert message in judgement.message
    assert "over 3 seeds, with a margin of 1 points" in judgement.message


def test_equivalence_does_not_excuse_a_variant_that_should_be_identical():
    """Where the model is reproducible, another end of training is a failure, however good."""
    found = judge(sample_variant(weights_identical=False), equivalence(0.0, 0.0))
    assert found.verdict is Verdict.FAILED
    assert "final weights differ" in found.message


def test_variant_with_other_gradients_fails_and_names_them():
    """A failed verification fails the variant, naming the tensors that differ."""
    difference = Difference(name="head.weight", max_abs=1.0, max_rel=1.0)
    found = judge(
        verified(
            sample_variant(),
            identical=False,
            within_noise=False,
            passed=False,
            differences=(difference,),
        )
    )
    assert found.verdict is Verdict.FAILED
    assert "head.weight" in found.message


def test_all_reasons_of_a_failure_are_told():
    """Several failures are all named, not only the first."""
    found = judge(sample_variant(budget_bytes=1, losses_identical=False))
    assert "above the budget" in found.message
    assert "loss curve" in found.message


def test_run_passes_only_where_something_passed_and_nothing_failed():
    """An infeasible budget neither passes nor fails a run; one that could not run fails it."""
    passed = judge(sample_variant())
    infeasible = judge(sample_variant("x", status=VariantStatus.INFEASIBLE))
    failed = judge(sample_variant("y", status=VariantStatus.FAILED))
    assert has_passed([passed, infeasible])
    assert not has_passed([infeasible])
    assert not has_passed([passed, failed])
    assert not sample_run(status=RunStatus.UNFINISHED).passed


def test_relative_time_is_that_of_the_medians():
    """134 ms against 100 ms is 34 % longer."""
    assert relative_time(sample_variant(ms=134), REFERENCE) == pytest.approx(0.34)
    assert relative_time(sample_variant(step_times=None), REFERENCE) is None
    assert relative_time(sample_variant(), None) is None


def test_time_difference_within_the_spread_is_not_called_one():
    """Medians closer than the larger interquartile range are not told apart."""

    def timed(median, iqr):
        times = StepTimes(
            seconds=(median,), median_seconds=median, iqr_seconds=iqr, warmup_rounds=0
        )
        return sample_variant(step_times=times)

    assert is_time_difference_clear(timed(1.2, 0.1), timed(1.0, 0.05))
    assert not is_time_difference_clear(timed(1.2, 0.3), timed(1.0, 0.05))
    assert not is_time_difference_clear(timed(1.2, 0.05), timed(1.0, 0.3))


def test_summary_tells_memory_time_and_sameness():
    """The paragraph has the figures a manager asks for."""
    run = sample_run(
        REFERENCE,
        sample_variant("all blocks", VariantKind.POLICY, peak_mib=90, ms=150),
        sample_variant("plan 60%", peak_mib=120, ms=112),
    )
    first = run.summary.partition(". ")[0]
    assert "needs 40% less memory (120.0 MiB instead of 200.0 MiB)" in first
    assert "steps 12% longer" in first
    assert "losses of all 60 steps and the final weights equal" in run.summary
    assert "validation accuracy is 87.1% in every run" in run.summary
    assert "recomputing all blocks peaks at 90.0 MiB, with training steps 50% longer" in run.summary


def test_summary_of_a_failure_does_not_claim_sameness():
    """A failed check is said aloud, and nothing is called unchanged."""
    run = sample_run(REFERENCE, sample_variant(losses_identical=False))
    assert "FAILED" in run.summary
    assert "unchanged" not in run.summary
    assert not run.passed


def test_summary_names_budgets_that_cannot_be_reached():
    """An infeasible budget comes with the least peak that was found."""
    assert "The budget 10% cannot be reached: the least peak found is 71.0 MiB." in (
        sample_run().summary
    )


def test_summary_without_a_reference_measured_says_so():
    """Where the model does not fit without a plan, that is the news."""
    lost = sample_variant(
        "no plan", VariantKind.REFERENCE, status=VariantStatus.FAILED, measured_peak_bytes=None
    )
    alone = sample_variant(losses_identical=None, weights_identical=None)
    assert "could not be run here" in sample_run(lost, alone).summary


def test_summary_of_an_unfinished_run_says_how_far_it_came():
    """A run that was ended early says so first."""
    pending = sample_variant("plan 60%", status=VariantStatus.PENDING, measured_peak_bytes=None)
    run = sample_run(REFERENCE, pending, status=RunStatus.UNFINISHED)
    assert run.summary.startswith("This run was not finished (1 of 2 variants were).")


def test_variant_over_budget_message_has_both_numbers():
    """The message says peak, budget and by how much."""
    found = judge(sample_variant(peak_mib=130, budget_bytes=120 * MIB))
    assert "130.0 MiB" in found.message
    assert "120.0 MiB" in found.message
    assert "10.0 MiB" in found.message
