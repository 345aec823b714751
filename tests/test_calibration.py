"""Calibration: curves against closed forms, error bars against their coverage, and its use."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression
from torch import nn

import remat
from remat.calibrating.curves import TimedOp, curves_of
from remat.calibrating.hardware import at_hand, row_of
from remat.calibrating.learning import learn, trials_of
from remat.cost.calibration import (
    AllocatorFacts,
    Calibration,
    Check,
    Curve,
    Experience,
    Trial,
    calibration_path,
    experience_path,
    load_experience,
)
from remat.cost.families import BY_FLOPS, family_of, work_of
from remat.trace.capture import capture
from remat.trace.records import Op, OpSignature, TensorMeta
from tests.models import square_mean
from tests.sample_runs import sample_run


def made_up(**changes) -> Calibration:
    """Make a calibration in which a matrix product takes 1 ns per FLOP, all else 1 ms."""
    rising = tuple((10.0**n, 10.0 ** (n - 9)) for n in range(3, 13))
    facts = {
        "device": "cpu",
        "hardware": "a processor",
        "num_threads": torch.get_num_threads(),
        "torch_version": torch.__version__,
        "created": "2026-11-25T00:00:00+00:00",
        "curves": (
            Curve(family="matmul", dtype="float32", points=rising),
            Curve(family="pointwise", dtype="float32", points=((1.0, 1e-3), (1e15, 1e-3))),
        ),
        "region_overhead_s": 0.25,
        "saved_tensor_overhead_s": 0.0,
        "host_bytes_per_s": 1e9,
        "allocator": AllocatorFacts(rounding_bytes=1),
        "checks": (
            Check(
                name="a step",
                calibrated_seconds=0.010,
                roofline_seconds=0.005,
                measured_seconds=0.011,
            ),
        ),
    }
    return Calibration(**facts | changes)


def keep(calibration: Calibration) -> None:
    calibration.save(calibration_path("cpu", torch.get_num_threads()))


@given(st.floats(0.2, 2.0), st.floats(1e3, 1e9))
def test_curve_is_exact_on_a_power_law(exponent, work):
    """Between its points a curve follows seconds = c * work ** exponent exactly."""
    points = tuple((10.0**n, 1e-9 * 10.0 ** (n * exponent)) for n in range(3, 10))
    curve = Curve(family="matmul", dtype="float32", points=points)
    assert curve.seconds(work) == pytest.approx(1e-9 * work**exponent, rel=1e-9)


def test_curve_is_flat_below_and_linear_above():
    """Less work than was measured takes its dispatch; more goes at the last rate."""
    curve = Curve(family="matmul", dtype="float32", points=((1e3, 1e-5), (1e6, 1e-3)))
    assert curve.seconds(0) == curve.seconds(1e3) == 1e-5
    assert curve.seconds(1e6) == pytest.approx(1e-3)
    assert curve.seconds(4e6) == pytest.approx(4e-3)


def timed(flops: float, seconds: float) -> TimedOp:
    signature = OpSignature("aten.mm.default", (), ())
    op = Op(0, signature.name, 0, -1, "forward", int(flops), 0, (), (), (), False, "float32")
    return TimedOp(op=op, signature=signature, seconds=seconds)


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=20))
def test_curves_are_the_isotonic_regression_of_the_times(seconds):
    """Where more work was timed as taking less, the curve is the monotone fit of its logs."""
    works = [2.0**n for n in range(10, 10 + len(seconds))]
    (curve,) = curves_of(timed(w, s) for w, s in zip(works, seconds, strict=True))
    fitted = IsotonicRegression().fit_transform(works, np.log(seconds))
    assert [w for w, _ in curve.points] == pytest.approx(works)
    assert [s for _, s in curve.points] == pytest.approx(np.exp(fitted))


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("aten.addmm.default", "matmul"),
        ("aten.convolution.default", "convolution"),
        ("aten.convolution_backward.default", "convolution backward"),
        ("aten._scaled_dot_product_flash_attention_for_cpu.default", "attention"),
        ("aten._scaled_dot_product_flash_attention_for_cpu_backward.default", "attention backward"),
        ("aten.native_layer_norm_backward.default", "normalization"),
        ("aten.native_dropout.default", "random"),
        ("aten.embedding.default", "gather"),
        ("aten.gelu.default", "transcendental"),
        ("aten.add.Tensor", "pointwise"),
        ("aten.threshold_backward.default", "pointwise"),
    ],
)
def test_families(name, family):
    """Each op goes by the curve of its own kind."""
    assert family_of(name) == family


def test_attention_without_a_formula_is_counted_as_two_products():
    """Queries (2, 3, 5, 8) against keys (2, 3, 7, 8) are 2 products of 2 * 2*3 * 5*7*8 FLOPs."""
    queries = TensorMeta((2, 3, 5, 8), (120, 40, 8, 1), "float32", "cpu")
    keys = TensorMeta((2, 3, 7, 8), (168, 56, 8, 1), "float32", "cpu")
    name = "aten._scaled_dot_product_flash_attention_for_cpu"
    forward = OpSignature(f"{name}.default", (queries, keys, keys), ())
    backward = OpSignature(f"{name}_backward.default", (queries, queries, keys, keys), ())
    product = 2 * 2 * 3 * 5 * 7 * 8
    assert work_of(forward, 0, 0) == 2 * product
    assert work_of(backward, 0, 0) == 5 * product


def test_error_bar_covers_as_often_as_it_says():
    """Over many draws of 30 trials, the next ratio lies inside as often as the level."""
    generator = np.random.default_rng(0)
    inside, level = [], 0.0
    for _ in range(2000):
        ratios = generator.lognormal(0.2, 0.3, size=31)
        bar = experience(ratios[:-1]).error_bar("step_seconds", "roofline")
        level = bar.level
        inside.append(bar.low_ratio <= ratios[-1] <= bar.high_ratio)
    assert level == pytest.approx(29 / 31)
    assert np.mean(inside) == pytest.approx(level, abs=3 * math.sqrt(level * (1 - level) / 2000))


def experience(ratios) -> Experience:
    trials = (
        Trial(run=str(n), variant="", quantity="step_seconds", source="roofline",
              predicted=2.0, measured=2.0 * ratio)
        for n, ratio in enumerate(ratios)
    )  # fmt: skip
    return Experience(device="cpu", trials=tuple(trials))


def test_too_few_trials_give_no_error_bar():
    """Two trials say nothing about a third, and trials of another source do not count."""
    assert experience([1.0, 2.0]).error_bar("step_seconds", "roofline") is None
    assert experience([1.0, 2.0, 3.0]).error_bar("step_seconds", "calibrated") is None
    bar = experience([1.0, 2.0, 3.0]).error_bar("step_seconds", "roofline")
    assert (bar.low_ratio, bar.high_ratio, bar.level) == (1.0, 3.0, 0.5)


@pytest.mark.parametrize(
    ("hardware", "row"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100-16GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA L4", "L4"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_a_gpu_is_found_in_the_device_table(hardware, row):
    """The names that drivers give are matched with the table's."""
    assert row_of(hardware).name == row


def test_unknown_hardware_is_refused():
    """A GPU without a row, and a row without its GPU, are each one clear error."""
    with pytest.raises(remat.DeviceError, match="no row of the device table stands for 'Voodoo 2'"):
        row_of("Voodoo 2")
    if not torch.cuda.is_available():
        with pytest.raises(remat.DeviceError, match="'T4' is not at hand"):
            at_hand("T4")


def test_plan_uses_the_calibration():
    """A step is priced by the curves, op by op, and a region by its own overhead."""
    model = nn.Sequential(nn.Linear(512, 128, bias=False), nn.Linear(128, 512, bias=False))
    batch = torch.randn(256, 512)
    assert "not calibrated" in remat.plan(model, batch, "100%", loss=square_mean).cost_source
    keep(made_up())
    plan = remat.plan(model, batch, "100%", loss=square_mean)
    assert plan.cost_source == "calibrated on a processor, 2026-11-25"
    trace = capture(model, batch, loss=square_mean)
    expected = sum(op.flops * 1e-9 if family_of(op.name) in BY_FLOPS else 1e-3 for op in trace.ops)
    assert plan.step_seconds == pytest.approx(expected)


def test_plan_in_16_bits_goes_by_its_own_curves():
    """Under autocast products are priced by the curve of bfloat16, all else by that of its type."""
    slower = Curve(family="matmul", dtype="bfloat16", points=((1e3, 1e-3), (1e12, 1e6)))
    keep(made_up(curves=(*made_up().curves, slower)))

    def mixed(network, x):
        with torch.autocast("cpu", torch.bfloat16):
            return network(x).float().square().mean()

    step = {"model": nn.Linear(8, 8), "batch": torch.randn(4, 8), "loss": mixed}
    plan = remat.plan(**step, budget="100%")
    ops = capture(**step).ops
    products = [op for op in ops if family_of(op.name) in BY_FLOPS]
    assert {op.dtype for op in products} == {"bfloat16"}
    expected = sum(slower.seconds(op.flops) for op in products)
    assert plan.step_seconds == pytest.approx(expected + 1e-3 * (len(ops) - len(products)))


def test_devices_of_ones_own_keep_their_figures():
    """A calibration of the table's row does not speak for a Device that the caller describes."""
    keep(made_up())
    own = remat.Device(
        name="cpu", memory_bytes=10**9, bandwidth_bytes_per_s=1e9, flops={"float32": 1e9}
    )
    model, batch = nn.Linear(8, 8), torch.randn(4, 8)
    plan = remat.plan(model, batch, "100%", loss=square_mean, device=own)
    assert plan.cost_source.startswith("roofline")


@pytest.mark.parametrize("change", [{"torch_version": "1.0"}, {}])
def test_a_calibration_of_other_conditions_is_not_used(change):
    """Another torch, or another number of threads, needs a calibration of its own."""
    made = made_up(**change)
    threads = torch.get_num_threads() + (not change)
    made.save(calibration_path("cpu", threads))
    model, batch = nn.Linear(8, 8), torch.randn(4, 8)
    plan = remat.plan(model, batch, "100%", loss=square_mean)
    assert plan.cost_source.startswith("roofline")


def test_a_damaged_calibration_is_one_clear_error():
    """The message names the file and how to make it again."""
    path = calibration_path("cpu", torch.get_num_threads())
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(remat.DeviceError, match=r"damaged.*make it again with `remat calibrate`"):
        remat.plan(nn.Linear(8, 8), torch.randn(4, 8), "100%", loss=square_mean)


def test_runs_teach_the_error_bar_that_plans_print():
    """Each plan of a run gives a trial; the same run twice counts once; later plans show it."""
    run = sample_run()
    trials = [trial for trial in trials_of(run) if trial.quantity == "step_seconds"]
    assert len(trials) >= 1
    for trial, variant in zip(
        trials, (v for v in run.variants if v.plan and v.step_times), strict=True
    ):
        assert trial.predicted == variant.plan.step_seconds + variant.plan.recompute_seconds
        assert trial.measured == variant.step_times.median_seconds
    learn(run)
    learn(run)
    threads = run.environment.num_threads
    assert len(load_experience(trials_device(run), threads).trials) == len(trials_of(run))
    experience([0.5, 1.0, 2.0]).save(experience_path("cpu", torch.get_num_threads()))
    plan = remat.plan(nn.Linear(8, 8), torch.randn(4, 8), "100%", loss=square_mean)
    assert plan.step_error_bar.high_ratio == 2.0
    assert "50% of measurements lie, by 3 earlier ones" in " ".join(str(plan).split())


def trials_device(run) -> str:
    return next(v.plan.device for v in run.variants if v.plan is not None)


@pytest.mark.slow
def test_calibrate_measures_keeps_and_shows(run_cli, tmp_path):
    """The command measures, plans then use it, and the page shows every check."""
    before = torch.get_rng_state()
    done = run_cli("calibrate", "--seconds", "5", "--root", tmp_path, "--json")
    assert done.code == 0, done.err
    assert torch.equal(torch.get_rng_state(), before)
    found = Calibration.from_data(json.loads(done.out)["calibration"], source="stdout")
    wanted = {"matmul", "convolution", "convolution backward", "attention", "pointwise"}
    for dtype in ("float32", "bfloat16"):
        assert wanted <= {curve.family for curve in found.curves if curve.dtype == dtype}
    for curve in found.curves:
        works, seconds = zip(*curve.points, strict=True)
        assert list(works) == sorted(works)
        assert list(seconds) == sorted(seconds)
    assert len(found.checks) == 7
    assert sum("autocast to bfloat16" in check.name for check in found.checks) == 2
    assert found.region_overhead_s > 0
    page = tmp_path / "page.html"
    shown = run_cli("calibrate", "--report", "-o", page, "--root", tmp_path)
    assert shown.code == 0, shown.err
    text = page.read_text(encoding="utf-8")
    assert all(check.name in text for check in found.checks)
    assert "http" not in text.replace("http://www.w3.org", "")
    plan = remat.plan(nn.Linear(8, 8), torch.randn(4, 8), "100%", loss=square_mean)
    assert plan.cost_source.startswith("calibrated on")


@pytest.mark.parametrize("seconds", [True, "a minute", 1, math.nan])
def test_calibrate_refuses_absurd_times(seconds):
    """A time to measure is a number of at least five seconds."""
    with pytest.raises(remat.WorkloadError, match="seconds must be"):
        remat.calibrate(seconds=seconds)
