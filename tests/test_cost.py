"""Costs and workspaces: the roofline by hand, and measured figures against the real kernels."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import remat
from remat.cost.devices import find_device
from remat.cost.model import CostModel
from remat.cost.workspace import measure_workspace
from remat.fit import Fit
from remat.trace.capture import capture
from tests.models import Block, square_mean


def test_roofline_is_the_larger_of_arithmetic_and_traffic():
    """A product of 256 x 512 by 512 x 128 costs its FLOPs, a sum its bytes, plus the overhead."""
    model = nn.Linear(512, 128, bias=False)
    trace = capture(model, torch.randn(256, 512), loss=square_mean, optimizer=None)
    device = find_device("cpu")
    cost = CostModel(device=device)
    product = next(op for op in trace.ops if op.name == "aten.mm.default")
    assert product.flops == 2 * 256 * 512 * 128
    expected = product.flops / device.flops["float32"] + device.op_overhead_s
    assert cost.op_seconds(product, trace.signatures[product.signature]) == pytest.approx(expected)
    square = next(op for op in trace.ops if op.name == "aten.pow.Tensor_Scalar")
    expected = 2 * 256 * 128 * 4 / device.bandwidth_bytes_per_s + device.op_overhead_s
    assert cost.op_seconds(square, trace.signatures[square.signature]) == pytest.approx(expected)
    view = next(op for op in trace.ops if op.name == "aten.t.default")
    assert cost.op_seconds(view, trace.signatures[view.signature]) == device.op_overhead_s


def test_measured_cost_prices_the_plan():
    """Timed ops replace the roofline, say so, and rank a large product above a small one."""
    small, large = nn.Linear(64, 64, bias=False), nn.Linear(64, 4096, bias=False)
    model = nn.Sequential(small, nn.GELU(), large)
    batch = torch.randn(512, 64)
    before = torch.get_rng_state()
    cost = remat.measure_cost(model, batch, loss=square_mean)
    assert torch.equal(torch.get_rng_state(), before)
    products = sorted(
        (max(m.num_elements for m in s.arguments), seconds)
        for s, seconds in cost.seconds.items()
        if s.name == "aten.mm.default"
    )
    assert products[0][1] < products[-1][1]
    plan = remat.plan(model, batch, "100%", loss=square_mean, cost=cost)
    assert "measured" in plan.cost_source


def test_plan_without_a_price_on_bookkeeping_runs_the_least_again():
    """At no budget it recomputes more than the usual plan, and at some less; it says so."""
    model = nn.Sequential(*(Block(64) for _ in range(4)))
    batch = torch.randn(256, 64)
    usual = CostModel(device=find_device("cpu"))
    fits = [
        Fit(model, batch, loss=square_mean, cost=cost)
        for cost in (usual, dataclasses.replace(usual, counts_bookkeeping=False))
    ]
    least = max(fit.frontier(1)[0].budget_bytes for fit in fits)
    fractions = []
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        budget = int(least + share * (fits[0].keep_all_peak_bytes - least))
        plans = [fit.plan(budget) for fit in fits]
        assert plans[1].cost_source == f"{plans[0].cost_source}, without bookkeeping"
        fractions.append([plan.recompute_fraction for plan in plans])
    assert all(alone <= priced + 1e-9 for priced, alone in fractions)
    assert any(alone < 0.95 * priced for priced, alone in fractions)


@pytest.mark.parametrize(
    "build",
    [
        lambda: (nn.Conv2d(8, 16, 3, padding=1), torch.randn(4, 8, 32, 32)),
        lambda: (nn.ConvTranspose2d(8, 4, 2, 2), torch.randn(4, 8, 16, 16)),
        lambda: (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), torch.randn(4, 3, 24, 24)),
    ],
)
def test_workspace_makes_the_prediction_exact(build):
    """With kernels' own bytes counted, the predicted peak of convolutions is the allocator's."""
    model, batch = build()
    predicted = remat.simulate(model, batch, loss=square_mean).peak_bytes
    without = remat.simulate(model, batch, loss=square_mean, workspace={}).peak_bytes
    measured = remat.measure(model, batch, loss=square_mean, steps=1).peak_bytes
    assert abs(predicted - measured) <= 1024
    assert without <= predicted


def test_workspace_of_many_examples_is_extrapolated():
    """The workspace of a convolution too large to run whole is that of the whole, to 2 %."""
    from remat.cost import workspace

    model, batch = nn.Conv2d(4, 8, 3, padding=1), torch.randn(64, 4, 32, 32)
    trace = capture(model, batch, loss=square_mean, optimizer=None)
    convolutions = [s for s in trace.signatures if s.name == "aten.convolution.default"]
    whole = measure_workspace(convolutions)[convolutions[0]]
    limit = workspace.LARGEST_OPERANDS
    workspace.LARGEST_OPERANDS = 2**18
    try:
        extrapolated = workspace._measure(convolutions[0])
    finally:
        workspace.LARGEST_OPERANDS = limit
    assert whole > 0
    assert extrapolated == pytest.approx(whole, rel=0.02)


def test_reserve_of_long_recurrent_layers_is_extrapolated(monkeypatch):
    """What oneDNN's LSTM keeps for a sequence too long to run is that of the whole, to 1 %."""
    from remat.trace import recurrent

    layer, x = torch.nn.LSTM(64, 64), torch.randn(400, 4, 64)
    peaks = []
    for limit in (recurrent.LARGEST_RESERVE, 2**21):
        monkeypatch.setattr(recurrent, "LARGEST_RESERVE", limit)
        monkeypatch.setattr(recurrent, "_known", {})
        peaks.append(remat.simulate(layer, x, loss=lambda m, b: m(b)[0].square().mean()).peak_bytes)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)
    measured = remat.measure(layer, x, loss=lambda m, b: m(b)[0].square().mean(), steps=1)
    assert 0 <= peaks[0] - measured.peak_bytes <= 1024
