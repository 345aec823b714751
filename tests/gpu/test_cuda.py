"""What only a CUDA device can tell: measured bytes against predicted ones, and equal gradients."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if (_ROOT := str(Path(__file__).parent.parent.parent)) not in sys.path:
    sys.path.append(_ROOT)

import remat
from benchmarks.gpu_rows import LIMITS, TWELVE, Bench, Subject, clean, halfway
from benchmarks.zoo import ZOO
from remat.calibrating.hardware import at_hand
from remat.calibrating.measuring import calibrate
from remat.cost.calibration import Calibration
from remat.cost.model import CostModel
from remat.fit import Fit
from remat.regions.apply import host_pool

pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])


@pytest.fixture(scope="session")
def prices() -> Calibration:
    """Prices of ops measured on this device, once for all tests."""
    return calibrate(seconds=40, save=False)


@pytest.fixture
def bench() -> Iterator[Bench]:
    """The device by its row of the table, with an empty cache before and after each test."""
    row, device, _ = at_hand()
    clean(device)
    entries = {name: ZOO[name] for name in (*TWELVE, "gpt2s")}
    yield Bench(device=device, cost=CostModel(device=row), entries=entries)
    clean(device)


def failed(row: dict[str, Any], *leaving_out: str) -> list[dict[str, Any]]:
    """Return the checks of a row that did not pass: bytes, seconds, budget, gradients."""
    assert row["outcome"] == "measured"
    return [c for c in row["checks"] if c["passed"] is False and c["what"] not in leaving_out]


@DTYPES
@pytest.mark.parametrize("name", TWELVE)
def test_peaks_are_those_predicted_on_the_device(name, autocast, bench):
    """Allocated within 2 % and reserved within 5 % of the allocator's own statistics."""
    assert not failed(bench.predicted_here(name, autocast=autocast), "seconds")


@DTYPES
@pytest.mark.parametrize("name", TWELVE)
def test_peaks_are_those_predicted_without_the_device(name, autocast, bench):
    """The same from CPU fakes and the device table alone."""
    assert not failed(bench.unplanned(name, autocast=autocast), "seconds")


@DTYPES
@pytest.mark.parametrize("name", TWELVE)
def test_step_times_are_those_predicted_once_calibrated(name, autocast, bench, prices):
    """A step as it is written takes what it was predicted to, within 15 %."""
    bench.cost = CostModel(device=bench.cost.device, calibration=prices)
    row = bench.unplanned(name, autocast=autocast)
    seconds = next(check for check in row["checks"] if check["what"] == "seconds")
    assert abs(seconds["error"]) <= LIMITS["seconds"]


@pytest.mark.parametrize("name", ["gpt2s", "llama", "vit"])
def test_planned_step_keeps_the_budget_and_the_gradients(name, bench):
    """A plan made elsewhere: bytes as predicted, within the budget; gradients bit for bit."""
    assert not failed(bench.planned(name, autocast=True), "seconds")


@pytest.mark.parametrize("name", ["gpt2s", "llama", "vit"])
def test_plan_made_on_the_device_keeps_the_budget_and_the_gradients(name, bench):
    """The same of a plan made here; `verify` says so."""
    subject = bench.subject(name, autocast=True)
    plan = halfway(bench.here(subject))
    assert remat.verify(subject.model, subject.batch, plan, loss=subject.loss).passed


@pytest.mark.parametrize("name", ["gpt2s", "vit"])
def test_offloads_that_are_fetched_early_keep_the_gradients_and_their_bytes(name, bench):
    """With all that can be fetched early on the host: equal bits, bytes as predicted, one pool."""
    subject = Subject(ZOO[name], bench.device, autocast=False)
    fit = Fit(subject.model, subject.batch, loss=subject.loss, cost=bench.cost, host_budget="16GiB")
    options, chosen = fit.plain.options, []
    for position, option in enumerate(options):
        offload = option.parts[0].region.offload
        is_early = offload is not None and offload.prefetch is not None
        if is_early and not any(option.excludes(options[p]) for p in chosen):
            chosen.append(position)
    assert chosen
    found = fit.plain.simulate(chosen)
    plan = fit.plan("1000%").model_copy(
        update={
            "regions": fit.plain.regions(chosen),
            "predicted_peak_bytes": found.peak_bytes,
            "predicted_reserved_bytes": found.reserved_bytes,
        }
    )
    proof = remat.verify(subject.model, subject.batch, plan, loss=subject.loss)
    assert proof.identical or proof.within_noise
    assert proof.measured_host_bytes == plan.host_bytes
    clean(bench.device)
    with remat.apply(subject.model, plan):
        measured = subject.steps(4)
        pool = host_pool(subject.model)
        assert pool is not None
        assert pool.held_bytes == pool.peak_bytes == plan.host_bytes
        assert all(buffer.is_pinned for idle in pool._idle.values() for buffer in idle)
    assert measured["allocated"] == pytest.approx(found.peak_bytes, rel=LIMITS["allocated"])
