"""What only a CUDA device can tell: measured bytes against predicted ones, and equal gradients."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

if (_ROOT := str(Path(__file__).parent.parent.parent)) not in sys.path:
    sys.path.append(_ROOT)

import remat
from benchmarks.gpu import Subject, clean, device_row, run_steps
from benchmarks.zoo import ZOO
from remat.fit import Fit
from remat.planner.policies import KeepAll

pytestmark = pytest.mark.gpu

ALLOCATED, RESERVED = 0.02, 0.05


@pytest.fixture(autouse=True)
def empty_device():
    """Start each test from an empty cache, and leave none behind."""
    device = torch.device("cuda")
    clean(device)
    yield device
    clean(device)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_peaks_are_those_predicted_on_the_device(name, autocast, empty_device):
    """Allocated within 2 % and reserved within 5 % of the allocator's own statistics."""
    subject = Subject(ZOO[name], empty_device, autocast=autocast)
    fit = Fit(subject.model, subject.batch, loss=subject.loss, device=device_row(empty_device))
    keep = fit.policy(KeepAll())
    measured = run_steps(subject, 2)
    assert measured["allocated"] == pytest.approx(keep.predicted_peak_bytes, rel=ALLOCATED)
    assert measured["reserved"] == pytest.approx(keep.predicted_reserved_bytes, rel=RESERVED)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_peaks_are_those_predicted_without_the_device(name, empty_device):
    """The same from CPU fakes and the device table alone."""
    away = ZOO[name].build(device="meta")
    row = device_row(empty_device)
    keep = Fit(away.model, away.batch, loss=away.loss, device=row).policy(KeepAll())
    measured = run_steps(Subject(ZOO[name], empty_device, autocast=False), 2)
    assert measured["allocated"] == pytest.approx(keep.predicted_peak_bytes, rel=ALLOCATED)
    assert measured["reserved"] == pytest.approx(keep.predicted_reserved_bytes, rel=RESERVED)


@pytest.mark.parametrize("name", ["gpt2s", "llama", "vit"])
def test_planned_step_keeps_the_budget_and_the_gradients(name, empty_device):
    """Reserved memory and context within the budget; gradients equal bit for bit."""
    subject = Subject(ZOO[name], empty_device, autocast=True)
    fit = Fit(subject.model, subject.batch, loss=subject.loss, device=device_row(empty_device))
    plan = fit.plan("85%")
    proof = remat.verify(subject.model, subject.batch, plan, loss=subject.loss)
    assert proof.passed
    clean(empty_device)
    with remat.apply(subject.model, plan):
        measured = run_steps(subject, 2)
    assert measured["reserved"] + plan.outside_bytes <= plan.budget_bytes
