"""Five sentences: each says what the run's figures say, for every way that a run can end."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remat.report.expense import cheaper_device
from remat.report.sentences import five_sentences
from remat.runs.evidence import Gap
from remat.runs.records import RunStatus, Variant, VariantKind, VariantStatus
from remat.units import MIB
from sample_evidence import (
    rich_run,
    rich_variant,
    sample_calibration,
    sample_equivalence,
    sample_expense,
    sample_slices,
)
from sample_runs import sample_run, sample_variant

JARGON = ("checkpoint", "recomput", "tensor", "gradient", "activation", "bit for bit", "TOST")


def said(run) -> dict[str, str]:
    return {sentence.key: sentence.text for sentence in five_sentences(run)}


def no_plan(**changes):
    return sample_variant("no plan", VariantKind.REFERENCE, peak_mib=200, ms=100, **changes)


def test_passed_run_says_what_it_saves_costs_and_that_it_is_right():
    """The figures are those of the smallest plan that passed, against no plan."""
    found = said(sample_run(no_plan(), sample_variant(peak_mib=100, ms=125)))
    assert found["saves"] == (
        "Training digits-vit needs 50% less memory: 100.0 MiB instead of 200.0 MiB."
    )
    assert found["costs"] == "Each training step takes 25% longer: 125.0 ms instead of 100.0 ms."
    assert found["right"].startswith("Yes: it ends as exactly the same model")
    assert "accuracy is 87.1%" in found["right"]
    assert found["watch"].startswith("Nothing stands out")
    assert found["do"].startswith("Train under plan 60% where memory is short")


def test_failed_check_is_told_first_and_never_recommended():
    """A plan that failed saves nothing, is wrong, and must not be trained with."""
    found = said(sample_run(no_plan(), sample_variant(peak_mib=100, weights_identical=False)))
    assert found["saves"] == "Nothing yet: no plan passed its checks."
    assert found["right"].startswith("No: plan 60% failed its checks, as its final weights differ")
    assert found["do"].startswith("Do not train with a plan that failed")
    for key in ("saves", "do"):
        assert "100.0 MiB" not in found[key]


def test_failed_plan_beside_a_passed_one_still_stops_the_decision():
    """One that passed gives the figures; the decision waits for the other's reason."""
    run = sample_run(
        no_plan(),
        sample_variant("plan 60%", peak_mib=100),
        sample_variant("plan 50%", status=VariantStatus.FAILED, message="out of memory"),
    )
    found = said(run)
    assert "50% less memory" in found["saves"]
    assert "plan 50% failed its checks, as out of memory" in found["right"]
    assert found["do"].startswith("Do not train")


def test_infeasible_budget_says_the_least_that_was_found():
    """Where no budget could be reached, the reader learns what could be asked for."""
    out_of_reach = Variant(
        label="plan 10%", kind=VariantKind.PLANNED, status=VariantStatus.INFEASIBLE,
        asked_budget="10%", budget_bytes=20 * MIB, minimum_bytes=71 * MIB,
    )  # fmt: skip
    found = said(sample_run(no_plan(), out_of_reach))
    assert found["saves"] == "Nothing yet: no plan was measured to the end."
    assert found["watch"].startswith("A budget of 10% cannot be reached; the least found is 71.0")
    assert found["do"].startswith("Ask for at least 71.0 MiB")


def test_unfinished_run_says_so_and_decides_nothing():
    """A run that was ended early asks to be run to its end."""
    pending = Variant(label="plan 40%", kind=VariantKind.PLANNED)
    run = sample_run(no_plan(), sample_variant(), pending, status=RunStatus.UNFINISHED)
    found = said(run)
    assert found["watch"].startswith("The evaluation ended early, with 2 of 3 ways tried")
    assert found["do"].startswith("Let the evaluation run to its end")


def test_time_within_noise_is_called_chance():
    """A difference smaller than the scatter of the timing is not given as a cost."""
    found = said(sample_run(no_plan(), sample_variant(peak_mib=100, ms=101)))
    assert found["costs"].startswith("No time that can be told from chance")
    assert "+1%" in found["costs"]


def test_faster_and_smaller_is_recommended_without_a_condition():
    """Where nothing is given up there is nothing to weigh."""
    found = said(sample_run(no_plan(), sample_variant(peak_mib=100, ms=80)))
    assert found["costs"] == "Each training step takes 20% less time: 80.0 ms instead of 100.0 ms."
    assert "both smaller and faster" in found["do"]


def test_model_that_cannot_run_without_a_plan_is_told_as_such():
    """Without a measured reference there is no percentage and no price."""
    reference = no_plan(measured_peak_bytes=None, step_times=None, losses=(), quality=())
    found = said(sample_run(reference, sample_variant(losses_identical=None, peak_mib=100)))
    assert "without a plan it did not run" in found["saves"]
    assert found["costs"].startswith("Unknown")
    assert found["right"].startswith("Not known yet")
    assert found["do"] == "Train under plan 60%, wherever 100.0 MiB are free."


def test_plan_that_saves_nothing_is_not_recommended():
    """A budget above what the model needs anyway ends in no plan."""
    found = said(sample_run(no_plan(), sample_variant(peak_mib=200, budget_bytes=300 * MIB)))
    assert "needs the same memory as before" in found["saves"]
    assert found["do"].startswith("Train without a plan")


def test_equivalence_within_the_margin_is_a_yes_and_outside_it_is_not():
    """Where weights differ, the answer is that of the test against the margin."""
    alike = sample_variant(losses_identical=False, weights_identical=False, verification=None)
    noisy = alike.model_copy(update={"verification": noisy_verification()})
    run = sample_run(no_plan(), noisy, equivalences=(sample_equivalence(),))
    assert said(run)["right"].startswith("Yes, as good within the stated margin: over 3 trainings")
    wide = sample_equivalence(is_equivalent=False, p_value=0.4)
    run = sample_run(no_plan(), noisy, equivalences=(wide,))
    assert said(run)["right"].startswith("Not shown: over 3 trainings, accuracy under plan 60%")


def noisy_verification():
    found = sample_variant().verification
    assert found is not None
    return found.model_copy(update={"identical": False})


def test_gap_is_something_to_watch():
    """What could not be evaluated is named, and never passed over."""
    gaps = (Gap(section="calibration", reason="no probabilities"),)
    found = said(sample_run(no_plan(), sample_variant(), gaps=gaps))
    assert found["watch"] == "Not everything could be evaluated (calibration)."


def test_weak_slice_says_whether_the_plan_moved_it():
    """The same figure with and without a plan is the model's own; another one is the plan's."""
    reference = rich_variant("no plan", VariantKind.REFERENCE, peak_mib=200, ms=100)
    same = rich_variant("plan 60%", VariantKind.PLANNED)
    moved = rich_variant("plan 60%", VariantKind.PLANNED, slices=sample_slices(worse=0.6))
    start = "The model is weaker on ink < 0.2 and width > 5 (accuracy 71.0% against 94.0%)"
    assert said(sample_run(reference, same))["watch"].startswith(f"{start}, just as without a plan")
    assert (
        "(accuracy 60.0% against 94.0%), which differs from no plan"
        in (said(sample_run(reference, moved))["watch"])
    )


@pytest.mark.parametrize(("shift", "is_noted"), [(0.02, False), (0.08, True)])
def test_confidence_that_is_off_is_noted(shift, is_noted):
    """An error of calibration above 5 % is worth a word, below it is not."""
    variant = sample_variant(calibration=sample_calibration(shift))
    found = said(sample_run(no_plan(), variant))
    assert ("stated confidence is off by 8.0%" in found["watch"]) is is_noted


def test_cheaper_device_is_the_ratio_of_the_two_prices():
    """The sentence gives both prices, their ratio and both devices."""
    run = rich_run()
    found = cheaper_device(run)
    assert found is not None
    assert "plan 60% on L4" in found
    assert "$12.00, 0.60 of the $20.00" in found
    assert "A100-80GB without a plan" in found
    assert said(run)["do"] == found


def test_price_of_the_time_is_told_on_one_device():
    """Both prices are of the device that is cheapest without a plan, so that only time differs."""
    run = sample_run(
        no_plan(), sample_variant(peak_mib=100, ms=125),
        expenses=(
            sample_expense("no plan", "A100-80GB"),
            sample_expense("plan 60%", "A100-80GB", run_usd=25.0),
            sample_expense("plan 60%", "L4", run_usd=30.0),
        ),
    )  # fmt: skip
    assert said(run)["costs"] == (
        "Each training step takes 25% longer: 125.0 ms instead of 100.0 ms, and on A100-80GB the "
        "whole training costs $25.00 instead of $20.00."
    )


def test_device_that_fits_nothing_without_a_plan_is_said_so():
    """Where only the plan fits a device with a price, there is no ratio."""
    run = sample_run(
        no_plan(), sample_variant(),
        expenses=(
            sample_expense("no plan", "L4", fits=False, run_usd=None),
            sample_expense("plan 60%", "L4", run_usd=12.0),
        ),
    )  # fmt: skip
    assert "none of the devices with a price is large enough" in (cheaper_device(run) or "")


def test_dearer_plan_changes_no_decision():
    """A plan that costs more money everywhere is not praised as cheaper."""
    run = sample_run(
        no_plan(), sample_variant(),
        expenses=(
            sample_expense("no plan", "L4", run_usd=10.0),
            sample_expense("plan 60%", "L4", run_usd=12.0),
        ),
    )  # fmt: skip
    assert cheaper_device(run) is None


variants = st.builds(
    lambda status, peak, ms, same, timed: sample_variant(
        status=status, peak_mib=peak, ms=ms, losses_identical=same, weights_identical=same,
        **({} if timed else {"step_times": None}),
        **({} if peak else {"measured_peak_bytes": None}),
    ),
    st.sampled_from(list(VariantStatus)),
    st.sampled_from([0, 50, 118, 200, 300]),
    st.sampled_from([50.0, 100.0, 101.0, 300.0]),
    st.sampled_from([None, True, False]),
    st.booleans(),
)  # fmt: skip


@given(st.lists(variants, max_size=2), st.booleans(), st.sampled_from(list(RunStatus)))
def test_any_run_gets_five_whole_sentences_without_jargon(plans, has_reference, status):
    """Whatever a run holds: five answers, each a sentence, none with a hole or a term of art."""
    listed = [v.model_copy(update={"label": f"plan {i}"}) for i, v in enumerate(plans)]
    run = sample_run(*([no_plan()] if has_reference else []), *listed, status=status)
    found = five_sentences(run)
    assert [sentence.key for sentence in found] == ["saves", "costs", "right", "watch", "do"]
    for sentence in found:
        assert re.fullmatch(r"[A-Z].*\.", sentence.text), sentence.text
        for hole in ("None", "nan", "inf ", "  ", "..", "{"):
            assert hole not in sentence.text
        if "failed its checks" not in sentence.text:  # there the reason is quoted
            assert not [word for word in JARGON if word in sentence.text]
