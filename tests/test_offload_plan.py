"""Plans that offload: the solver against every possible plan, budgets of both memories, figures."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import remat
from remat.cost.devices import Device, load_devices
from remat.fit import Fit
from tests.models import Block, square_mean
from tests.test_solver import Residual, all_choices
from tests.zoo import ALL, TINY

KIB, MIB = 1024, 1024**2


def offloading(model, batch, host_budget="1GiB", **step):
    """The traced step, with everything in it that could be offloaded among the options."""
    return Fit(model, batch, loss=square_mean, host_budget=host_budget, **step).plain


def test_cheapest_equals_the_best_of_all_plans_under_both_budgets():
    """At every pair of budgets the solver's cost is the least among all plans, by brute force."""
    model = nn.Sequential(
        Residual(24, 32, norm=True, dropout=0.0),
        nn.Tanh(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 8),
    )  # fmt: skip
    batch = torch.randn(128, 24)
    options = offloading(model, batch).options
    assert {(o.is_recomputed, bool(o.host_bytes)) for o in options} == {
        (True, False), (True, True), (False, True), (False, False),
    }  # fmt: skip
    every = sorted({o.host_bytes for o in options if o.host_bytes})
    tried = 0
    for host_budget in (every[0], every[len(every) // 2], 2 * every[-1]):
        fit = offloading(model, batch, host_budget)
        plans = [
            (
                fit.timeline.curve(chosen).peak_bytes,
                fit.solver.cost(chosen),
                sum(fit.options[p].host_bytes for p in chosen),
            )
            for chosen in all_choices(fit.options)
        ]
        assert len(plans) > 500
        allowed = [(peak, cost) for peak, cost, host in plans if host <= host_budget]
        for budget in sorted({peak for peak, _ in allowed})[::6]:
            solution = fit.solver.cheapest(budget)
            assert solution is not None
            best = min(cost for peak, cost in allowed if peak <= budget)
            assert solution.peak_bytes <= budget
            assert sum(fit.options[p].host_bytes for p in solution.chosen) <= host_budget
            assert solution.seconds == pytest.approx(best, rel=1e-5)
            tried += 1
        least = min(peak for peak, _ in allowed)
        assert fit.solver.cheapest(least - 1) is None
        assert fit.solver.least_peak().peak_bytes <= least * (1 + 1e-3)
    assert tried > 15


@pytest.mark.parametrize("name", ["batch_norm", "views_in_place", "tied_weights", "siamese"])
def test_peak_and_host_bytes_equal_the_simulation(name, monkeypatch):
    """Whatever is offloaded together, both memories are those of a traced run with it applied."""
    monkeypatch.setattr("remat.planner.offload.LEAST_BYTES", 256)  # the models are tiny
    case = ALL[name].build(dropout=0.1)
    fit = Fit(case.model, case.batch, loss=case.loss, optimizer=None, host_budget="1GiB").plain
    host = [p for p, option in enumerate(fit.options) if option.host_bytes]
    assert host
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        chosen: set[int] = set()
        for number in torch.randperm(len(host), generator=generator).tolist():
            if not any(fit.options[host[number]].excludes(fit.options[p]) for p in chosen):
                chosen.add(host[number])
        simulated = fit.simulate(chosen)
        peak = fit.timeline.curve(chosen).peak_bytes
        assert peak == pytest.approx(simulated.peak_bytes, abs=512)
        assert simulated.host_bytes == sum(fit.options[p].host_bytes for p in chosen)


@pytest.mark.slow
def test_host_memory_reaches_peaks_that_recomputation_cannot():
    """The least peak with host memory is lower, is verified, and needs the bytes it says."""
    case = TINY["unet"].build(dropout=0.1)
    with pytest.raises(remat.BudgetError, match="least peak") as alone:
        remat.plan(case.model, case.batch, 1, loss=case.loss)
    with pytest.raises(remat.BudgetError) as both:
        remat.plan(case.model, case.batch, 1, loss=case.loss, host_budget="1GiB")
    budget = both.value.minimum_bytes
    assert budget < 0.96 * alone.value.minimum_bytes
    plan = remat.plan(case.model, case.batch, budget, loss=case.loss, host_budget="1GiB")
    proof = remat.verify(case.model, case.batch, plan, loss=case.loss)
    assert proof.identical
    assert proof.passed
    assert abs(proof.measured_peak_bytes - plan.predicted_peak_bytes) <= 1024
    assert proof.measured_host_bytes == plan.host_bytes > 0


def test_tighter_host_budgets_are_kept_and_cost_more():
    """With less host memory a plan recomputes more, and never takes more than it may."""
    model = nn.Sequential(*(Block(64, dropout=0.0) for _ in range(3)))
    batch = torch.randn(256, 64)
    costs, taken = [], []
    keep_all = Fit(model, batch, loss=square_mean).keep_all_peak_bytes
    for host_budget in (None, 64 * KIB, 400 * KIB):
        plan = remat.plan(
            model, batch, int(0.6 * keep_all), loss=square_mean, host_budget=host_budget
        )
        proof = remat.verify(model, batch, plan, loss=square_mean)
        assert proof.passed
        assert proof.measured_host_bytes == plan.host_bytes <= (host_budget or 0)
        costs.append(plan.recompute_seconds)
        taken.append(plan.host_bytes)
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]
    assert taken[0] == 0 < taken[-1]


def test_copies_cost_what_computation_does_not_hide():
    """A copy costs bytes / bandwidth each way on a CPU; beside a GPU's long ops, only the first."""
    model = nn.Sequential(Block(64, dropout=0.0), nn.Linear(64, 64))
    batch = torch.randn(256, 64)
    figures = {"memory_bytes": 2**30, "bandwidth_bytes_per_s": 1e9, "flops": {"float32": 1e9}}
    found = {}
    for kind in ("cpu", "cuda"):
        device = Device(name="mine", kind=kind, host_bandwidth_bytes_per_s=1e9, **figures)
        fit = offloading(model, batch, device=device)
        whole = next(
            o for o in fit.options if o.module == "0.body" and o.host_bytes and not o.is_recomputed
        )
        found[kind] = whole.parts[0].region.offload
    assert found["cpu"].host_bytes == found["cuda"].host_bytes
    assert found["cpu"].transfer_seconds == pytest.approx(2 * found["cpu"].host_bytes / 1e9)
    # Each matrix product takes 2 * 256 * 64 * 64 / 1e9 s = 2.1 ms, a storage 66 µs: what backward
    # reads first waits for its copy, the others for no more than elementwise ops leave over.
    assert 65e-6 < found["cuda"].transfer_seconds < found["cpu"].transfer_seconds / 2


def test_every_device_states_a_speed_to_the_host():
    """No device copies to the host faster than its own memory takes it."""
    for device in load_devices().values():
        assert 0 < device.host_bandwidth_bytes_per_s <= device.bandwidth_bytes_per_s / 2


def test_measured_costs_hold_the_measured_speed_of_copies():
    """`measure_cost` times copies, and plans are priced with what it found."""
    model, batch = nn.Sequential(Block(16)), torch.randn(64, 16)
    cost = remat.measure_cost(model, batch, loss=square_mean, time_limit_s=0.1)
    assert cost.host_bytes_per_s is not None
    assert 1e7 < cost.host_bytes_per_s < 1e12
    assert offloading(model, batch, cost=cost).cost.host_bytes_per_s == cost.host_bytes_per_s


@pytest.mark.parametrize("given", ["50%", "4 gigs", 0, -1, True, 1.5])
def test_unreadable_host_budget_is_refused(given):
    """What is no size, or a percentage, is refused and quoted before anything is traced."""
    with pytest.raises(remat.BudgetFormatError, match="host budget"):
        remat.plan(nn.Linear(2, 2), torch.randn(1, 2), "1MiB", host_budget=given)


def test_nothing_is_offloaded_unless_asked():
    """Without a host budget no option offloads, and a plan says nothing of the host."""
    model, batch = nn.Sequential(Block(64), Block(64)), torch.randn(128, 64)
    fit = Fit(model, batch, loss=square_mean)
    assert not any(o.host_bytes for o in fit.plain.options)
    plan = fit.plan("95%")
    assert plan.host_budget_bytes is None
    assert plan.host_bytes == plan.transfer_seconds == 0
    assert not plan.offloads
    assert "host" not in str(plan)


def test_plan_file_and_text_tell_of_the_host():
    """A plan that offloads is read back equal, and says bytes, copies and calls in words."""
    model, batch = nn.Sequential(*(Block(64, dropout=0.0) for _ in range(3))), torch.randn(256, 64)
    plan = remat.plan(model, batch, "75%", loss=square_mean, host_budget="4MiB")
    assert plan.offloads
    assert remat.Plan.model_validate_json(json.dumps(plan.model_dump(mode="json"))) == plan
    text = str(plan)
    assert "host memory" in text
    assert "of 4.0 MiB allowed" in text
    assert "offloaded" in text
    assert "wait on the host" in plan.summary()


def test_more_host_memory_is_advised_where_it_would_help():
    """A budget that cannot be reached names host memory, and how much was allowed."""
    model, batch = nn.Sequential(*(Block(16) for _ in range(3))), torch.randn(4096, 16)
    with pytest.raises(remat.BudgetError, match=r"host memory for activations \(host_budget\)"):
        remat.plan(model, batch, 1000, loss=square_mean, optimizer=None)
    with pytest.raises(remat.BudgetError, match=r"more host memory than 8\.0 KiB") as caught:
        remat.plan(model, batch, 1000, loss=square_mean, optimizer=None, host_budget="8KiB")
    assert caught.value.host_budget_bytes == 8 * KIB


def test_command_line_takes_a_host_budget(run_cli, write_workload):
    """`remat plan --host-budget` plans with it; what is no size is one line and exit code 2."""
    path = write_workload()
    done = run_cli("plan", path, "--budget", "100%", "--host-budget", "1MiB", "--json")
    assert done.code == 0
    assert json.loads(done.out)["host_budget_bytes"] == MIB
    assert "host memory" in run_cli("plan", path, "-b", "100%", "--host-budget", "1MiB").out
    refused = run_cli("plan", path, "--budget", "100%", "--host-budget", "50%")
    assert refused.code == 2
    assert "host budget '50%' is a percentage" in refused.err
