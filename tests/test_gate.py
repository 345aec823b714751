"""The gate: planted regressions are found with their place, equal code passes, gaps are said."""

import json
import random

import numpy as np
import pytest

import remat
from remat.evaluation.timing import summarize_times
from remat.operate.gate.records import Gate, Outcome
from remat.operate.gate.rules import load_rules
from remat.operate.gate.verdict import gate
from remat.runs.evidence import (
    Calibration,
    CalibrationEvidence,
    Interval,
    Latency,
    ServedForm,
    Serving,
    SliceOrigin,
    SliceQuality,
)
from remat.runs.records import EpochQuality, StepTimes, VariantKind, VariantStatus
from remat.units import MIB
from sample_runs import sample_run, sample_variant

RULES = {
    "peak",
    "step_time",
    "quality",
    "calibration",
    "slice",
    "latency",
    "prediction_error",
    "gradient_parity",
}


def calibrated(error):
    found = Calibration(
        num_examples=360, expected_error=error, maximum_error=0.2, brier=0.2, nll=0.4, bins=()
    )
    return CalibrationEvidence(before=found)


def sliced(value, name="bright"):
    width = 0.05
    return SliceQuality(
        name=name,
        origin=SliceOrigin.NAMED,
        metric="accuracy",
        num_examples=90,
        quality=Interval(value=value, low=value - width, high=value + width, method="Wilson"),
        rest=0.88,
        is_worse=False,
    )


def served(p50, p95):
    return Serving(
        variant="plan 60%",
        forms=(ServedForm(name="as trained"),),
        latencies=tuple(
            Latency(
                form="as trained",
                batch_size=size,
                num_requests=100,
                p50_seconds=p50 * size,
                p95_seconds=p95 * size,
                p99_seconds=p95 * size,
                examples_per_second=1 / p50,
            )
            for size in (1, 4, 16)
        ),
    )


def full_run(run_id="new", *, times_seed=0, slow=1.0, p95=0.003, **changes):
    """Make a run in which every rule has something to look at; `changes` are of the plan."""
    random_times = np.random.default_rng(times_seed)

    def times(seconds):
        return summarize_times(seconds * np.exp(random_times.normal(0, 0.02, 7)), 2)

    fields = {
        "peak_by_module": {"blocks.7.mlp": 20 * MIB, "(optimizer)": 98 * MIB},
        "step_times": times(0.134 * slow),
        "calibration": calibrated(0.03),
        "slices": (sliced(0.85), sliced(0.80, "dark")),
    }
    return sample_run(
        sample_variant("no plan", VariantKind.REFERENCE, peak_mib=197, step_times=times(0.120),
                       calibration=calibrated(0.03), slices=(sliced(0.85),)),
        sample_variant(**(fields | changes)),
        id=run_id,
        yardstick=times(0.01),
        serving=served(0.002, p95),
    )  # fmt: skip


@pytest.fixture
def baseline():
    return full_run("old", times_seed=1)


def failures(report):
    return [(check.rule, check.variant) for check in report.of(Outcome.FAILED)]


def quality(accuracy):
    metrics = {"loss": 0.8, "accuracy": accuracy}
    return (EpochQuality(epoch=0, num_examples=360, metrics=metrics),)


def test_equal_code_passes_every_rule(baseline):
    """With everything recorded, each rule is checked and none fails or is left out."""
    report = gate(full_run(), baseline)
    assert report.passed
    assert {check.rule for check in report.checks} == RULES
    assert report.of(Outcome.NOT_COMPARED) == ()


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("peak", {"measured_peak_bytes": int(118 * 1.05 * MIB),
                  "predicted_peak_bytes": int(118 * 1.05 * MIB)}),
        ("step_time", {"slow": 1.3}),
        ("quality", {"quality": quality(0.841)}),
        ("calibration", {"calibration": calibrated(0.06)}),
        ("slice", {"slices": (sliced(0.85), sliced(0.77, "dark"))}),
        ("prediction_error", {"predicted_peak_bytes": 116 * MIB}),
        ("gradient_parity", {"weights_identical": False}),
    ],
)  # fmt: skip
def test_planted_regression_is_found_and_nothing_else(baseline, rule, change):
    """Each fault is found by its own rule, on its own variant, and by no other."""
    assert failures(gate(full_run(**change), baseline)) == [(rule, "plan 60%")]
    assert not gate(full_run(**change), baseline).passed


def test_slower_answers_are_found_where_medians_and_tails_grew(baseline):
    """A tail alone, which one busy moment makes, is no regression; both together are."""
    assert gate(full_run(p95=0.012), baseline).passed
    slower = full_run().model_copy(update={"serving": served(0.004, 0.006)})
    assert failures(gate(slower, baseline)) == [("latency", "plan 60%")]


def test_broken_gradients_are_found(baseline):
    """A verification that did not pass fails the gate, with the tensors that differ."""
    proof = baseline.variants[1].verification.model_copy(
        update={"passed": False, "identical": False, "within_noise": False}
    )
    assert failures(gate(full_run(verification=proof), baseline)) == [
        ("gradient_parity", "plan 60%")
    ]


def test_growth_is_told_with_its_place(baseline):
    """The message names how much grew, in which module, and since which plan."""
    grown = {"blocks.7.mlp": 210 * MIB, "(optimizer)": 120 * MIB}
    run = full_run(
        measured_peak_bytes=330 * MIB, predicted_peak_bytes=330 * MIB, peak_by_module=grown
    )
    [failed] = gate(run, baseline).of(Outcome.FAILED)
    assert failed.message.startswith(
        "peak +212.0 MiB, 190.0 MiB of it in `blocks.7.mlp` and 22.0 MiB in `(optimizer)`, since "
        "plan "
    )


@pytest.mark.parametrize("scale", [0.02, 0.3])
def test_two_hundred_gates_on_equal_code_fail_at_most_twice(scale):
    """Whatever the noise of the times, no more than 1 % of gates fail where nothing changed."""
    rng = np.random.default_rng(3)
    run = sample_run()
    labels = [v.label for v in run.variants if v.step_times is not None]

    def measured(run_id):
        seconds = {
            label: summarize_times(0.1 * np.exp(rng.normal(0, scale, 7)), 2) for label in labels
        }
        return run.model_copy(
            update={
                "id": run_id,
                "yardstick": summarize_times(0.01 * np.exp(rng.normal(0, scale, 7)), 2),
                "variants": tuple(
                    v.model_copy(update={"step_times": seconds.get(v.label)}) for v in run.variants
                ),
            }
        )

    failed = sum(not gate(measured("a"), measured("b")).passed for _ in range(200))
    assert failed <= 2


def test_gates_on_resampled_real_times_do_not_fail(real_times):
    """Of 200 gates on rounds of one real training, drawn in stretches, at most two fail."""
    run, rounds = real_times
    rng = random.Random(0)

    def stretch():
        first = rng.randrange(rounds - 7)
        rows = range(first, first + 7)

        def cut(times: StepTimes) -> StepTimes:
            return summarize_times([times.seconds[row] for row in rows], 0)

        return run.model_copy(
            update={
                "yardstick": cut(run.yardstick),
                "variants": tuple(
                    v.model_copy(update={"step_times": cut(v.step_times)}) for v in run.variants
                ),
            }
        )

    assert sum(not gate(stretch(), stretch()).passed for _ in range(200)) <= 2


@pytest.fixture(scope="module")
def real_times(tmp_path_factory):
    """Time a tiny training for many rounds, and return the run and their number."""
    import torch

    data = [(torch.full((16,), float(i)), i % 4) for i in range(64)]
    workload = remat.Workload(
        name="tiny",
        model=lambda: torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(6)]),
        train_data=data,
        batch_size=32,
        loss=lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1]),
    )
    rounds = 80
    run = remat.evaluate(
        workload, budgets=["95%"], peers=[], front_points=0, timing_rounds=rounds, page=False,
        serving=None, expenses=None, out=tmp_path_factory.mktemp("runs") / "real",
    )  # fmt: skip
    return run, rounds


def test_slow_machine_fails_no_gate(baseline):
    """Where steps and yardstick took 1.6 times as long, the machine did, not the code."""
    run = full_run()

    def slowed(times):
        return summarize_times([1.6 * one for one in times.seconds], 2)

    slow = run.model_copy(
        update={
            "yardstick": slowed(run.yardstick),
            "variants": tuple(
                v.model_copy(update={"step_times": slowed(v.step_times)}) for v in run.variants
            ),
        }
    )
    assert gate(slow, baseline).passed
    assert not gate(slow.model_copy(update={"yardstick": None}), baseline).passed


def test_what_a_run_lacks_is_not_compared_and_never_passed(baseline):
    """Runs without slices, calibration or serving say so for each, and still pass the rest."""
    bare = sample_run(*(
        v.model_copy(update={"slices": (), "calibration": None}) for v in baseline.variants
    ), id="bare")  # fmt: skip
    report = gate(bare, baseline)
    assert report.passed
    missing = {(check.rule, check.variant) for check in report.of(Outcome.NOT_COMPARED)}
    assert {("slice", "plan 60%"), ("calibration", "plan 60%"), ("latency", "")} <= missing
    assert not {"slice", "calibration", "latency"} & {c.rule for c in report.of(Outcome.PASSED)}
    assert "not compared" in report.summary


def test_variant_that_became_infeasible_fails_and_one_that_is_gone_is_said(baseline):
    """A budget that no plan reaches any more is a regression; another choice of budgets is none."""
    run = full_run(
        status=VariantStatus.INFEASIBLE, measured_peak_bytes=None, minimum_bytes=130 * MIB
    )
    report = gate(run, baseline)
    assert failures(report) == [("variant", "plan 60%")]
    assert "least peak 130.0 MiB" in report.of(Outcome.FAILED)[0].message
    other = sample_run(baseline.variants[0], sample_variant("plan 50%"), id="other")
    missing = {c.variant for c in gate(other, baseline).of(Outcome.NOT_COMPARED) if c.variant}
    assert {"plan 60%", "plan 50%"} <= missing


def test_runs_that_cannot_be_gated_are_one_error(baseline):
    """Another workload, an unfinished run, and runs with nothing in common are refused."""
    with pytest.raises(remat.GateError, match="one workload"):
        gate(full_run().model_copy(update={"name": "bytes"}), baseline)
    with pytest.raises(remat.GateError, match=r"was not finished.*--resume new"):
        gate(full_run().model_copy(update={"status": "unfinished"}), baseline)
    with pytest.raises(remat.GateError, match="nothing that the rules could"):
        gate(sample_run(sample_variant("plan 10%"), id="x"), baseline)
    with pytest.raises(remat.GateError, match=r"names? the variant 'plan 5%' at variants"):
        gate(full_run(), baseline, Gate(variants=("plan 5%",)))


def test_absolute_limits_and_switched_off_rules(tmp_path, baseline):
    """Limits hold without a baseline's figure, and a rule that is off is not looked at."""
    rules = tmp_path / "gate.toml"
    rules.write_text(
        """
        schema_version = 1
        variants = ["plan 60%"]
        [peak]
        max = "100MiB"
        [step_time]
        max_seconds = 0.1
        [quality]
        min = 0.9
        [calibration]
        max = 0.02
        [slice]
        min = 0.82
        [latency]
        max_p95_seconds = 0.001
        [gradient_parity]
        enabled = false
        """,
        encoding="utf-8",
    )
    report = gate(full_run(), baseline, rules)
    broken = {(check.rule, check.subject) for check in report.of(Outcome.FAILED)}
    assert broken == {
        ("peak", "limit"), ("step_time", "limit"), ("quality", "accuracy limit"),
        ("calibration", "limit"), ("slice", "dark limit"), ("latency", "as trained limit"),
    }  # fmt: skip
    assert {check.variant for check in report.checks} == {"plan 60%"}
    assert "gradient_parity" not in {check.rule for check in report.checks}
    assert load_rules(None) == Gate()


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("schema_version = 1\n[peak]\nmax_grwth = 0.1", "peak.max_grwth"),
        ("schema_version = 1\n[peak]\nmax_growth = -1", "peak.max_growth"),
        ("schema_version = 1\n[peak]\nmax = '8 cows'", "peak.max"),
        ("schema_version = 1\n[step_time]\nmax_seconds = 'fast'", "step_time.max_seconds"),
        ("schema_version = 1\n[quality]\nmin = 2026-01-01", "quality.min"),
        ("schema_version = 1\npeak = 3", "peak"),
        ("[peak]\nmax_growth = 0.1", "schema_version None"),
        ("schema_version = 2", "schema_version 2"),
        ("schema_version = ", "not TOML"),
    ],
)
def test_bad_rules_are_an_error_that_names_file_and_field(tmp_path, text, field):
    """Unknown fields, values out of range and broken TOML are told by file and field."""
    path = tmp_path / "gate.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(remat.GateError) as caught:
        load_rules(path)
    assert field in str(caught.value)
    assert "gate.toml" in str(caught.value)
    with pytest.raises(remat.GateError, match="cannot be read"):
        load_rules(tmp_path / "nowhere.toml")


def test_noise_of_seeds_widens_the_tolerance_where_training_is_not_reproducible(baseline):
    """Where variants of one run differ in their bits, a drop within the interval is no failure."""
    drop = {"quality": quality(0.841)}
    assert not gate(full_run(**drop), baseline).passed
    proof = baseline.variants[1].verification.model_copy(update={"identical": False})
    differ = {"losses_identical": False, "weights_identical": False, "verification": proof}
    noisy = full_run("old", times_seed=1, **differ)
    report = gate(full_run(**(drop | differ)), noisy)
    assert report.passed
    [check] = [c for c in report.checks if c.rule == "quality" and c.variant == "plan 60%"]
    assert check.noise == pytest.approx(2.576 * (0.871 * 0.129 * 2 / 360) ** 0.5)


def test_gate_report_reads_back(baseline):
    """The verdict is plain data."""
    report = gate(full_run(), baseline)
    assert type(report).model_validate_json(report.model_dump_json()) == report
    assert json.loads(report.model_dump_json())["passed"] is True
