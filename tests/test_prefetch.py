"""Copies that come back before they are read: the same bits, exact bytes, and what they cost."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

import remat
from remat.cost.devices import Device
from remat.cost.model import CostModel
from remat.fit import Fit
from remat.regions.apply import host_pool
from tests.models import Block, Recurrent, square_mean
from tests.test_offload import blocks, equal, gradients
from tests.test_solver import Residual, all_choices
from tests.zoo import ALL

CRUMBS = 1024
# Copies run beside the computation at a speed at which a block hides the copy of one activation.
BESIDE = CostModel(
    device=Device(
        name="mine", kind="cpu", memory_bytes=2**40, bandwidth_bytes_per_s=1e10,
        flops={"float32": 1e10}, host_bandwidth_bytes_per_s=2e8,
    ),
    copies_overlap=True,
)  # fmt: skip


def overlapping(model, batch, loss=square_mean, speed=2e8):
    """The traced step of a device that copies beside the computation."""
    cost = dataclasses.replace(BESIDE, host_bytes_per_s=speed)
    return Fit(model, batch, loss=loss, optimizer=None, host_budget="1GiB", cost=cost).plain


def prefetch_of(option):
    """What an option fetches before it is read."""
    offload = option.parts[0].region.offload
    return None if offload is None else offload.prefetch


def together(options, wanted, seed=0):
    """Pick wanted options that do not exclude each other, in a random order."""
    chosen = []
    for position in torch.randperm(len(options), generator=torch.Generator().manual_seed(seed)):
        option = options[int(position)]
        if wanted(option) and not any(option.excludes(options[p]) for p in chosen):
            chosen.append(int(position))
    return chosen


def planned(program, model, batch, chosen, loss=square_mean):
    """Return the choice as a plan whose budget is its own peak."""
    plan = remat.plan(model, batch, "1000%", loss=loss, optimizer=None, host_budget="1GiB")
    peak = program.simulate(chosen).peak_bytes
    regions = program.regions(chosen)
    return plan.model_copy(
        update={"regions": regions, "budget_bytes": peak, "predicted_peak_bytes": peak}
    )


def early(option):
    """Choose what is fetched before it is read."""
    return prefetch_of(option) is not None


@pytest.mark.parametrize(
    "name",
    [
        "dropout",
        "batch_norm",
        "views_in_place",
        "siamese",
        pytest.param("gpt2", marks=pytest.mark.slow),
    ],
)
def test_timeline_simulation_and_measurement_agree_whatever_is_fetched_early(name, monkeypatch):
    """Beside any other decisions, bytes count from the prefetch on, and bits are kept."""
    monkeypatch.setattr("remat.planner.offload.LEAST_BYTES", 256)  # the models are tiny
    case = ALL[name].build(dropout=0.1)
    program = overlapping(case.model, case.batch, case.loss)
    assert any(early(option) for option in program.options)
    for seed in range(3):
        first = together(program.options, early, seed)[seed:]
        rest = together(program.options, lambda o: not o.host_bytes, seed)
        chosen = first + [
            p for p in rest[:seed]
            if not any(program.options[p].excludes(program.options[q]) for q in first)
        ]  # fmt: skip
        curve, simulated = program.timeline.curve(chosen), program.simulate(chosen)
        assert abs(curve.peak_bytes - simulated.peak_bytes) <= CRUMBS
    plan = planned(program, case.model, case.batch, chosen, case.loss)
    proof = remat.verify(case.model, case.batch, plan, loss=case.loss, optimizer=None)
    assert proof.identical, proof.differences[:2]
    assert abs(proof.measured_peak_bytes - plan.predicted_peak_bytes) <= CRUMBS
    assert proof.measured_host_bytes == plan.host_bytes


def hidden_copy():
    """A step whose peak lies where the copy of a wide tensor comes early."""
    model = nn.Sequential(
        nn.Sequential(nn.Linear(64, 64), nn.Tanh()),
        nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 64), nn.Tanh(), nn.Linear(64, 64),
    )  # fmt: skip
    return model, torch.randn(512, 64)


def test_what_is_fetched_early_is_there_before_it_is_read():
    """The measured peak rises by the copy's bytes where the prefetch falls on the peak."""
    model, batch = hidden_copy()
    program = overlapping(model, batch)
    pairs = {}
    for position, option in enumerate(program.options):
        if option.module == "0.1" and option.host_bytes:
            pairs.setdefault(early(option), position)
    peaks = {}
    for is_early, position in pairs.items():
        region = program.options[position].regions()[0]
        offload = region.offload
        if is_early:  # from the wide part on
            found = offload.prefetch.model_copy(update={"module": "3"})
            offload = offload.model_copy(update={"prefetch": found})
        plan = planned(program, model, batch, [position])
        plan = plan.model_copy(
            update={"regions": (region.model_copy(update={"offload": offload}),)}
        )
        proof = remat.verify(model, batch, plan, loss=square_mean, optimizer=None)
        assert proof.identical
        peaks[is_early] = proof.measured_peak_bytes
    assert peaks[True] - peaks[False] == batch.numel() * 4


def test_cheapest_equals_the_best_of_all_plans_where_copies_overlap():
    """With late and early copies among the options, no plan at any budget costs less."""
    model = nn.Sequential(
        Residual(24, 32, norm=True, dropout=0.0),
        nn.Tanh(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 8),
    )  # fmt: skip
    program = overlapping(model, torch.randn(256, 24), speed=1e9)
    plans = [
        (program.timeline.curve(chosen).peak_bytes, program.solver.cost(chosen), chosen)
        for chosen in all_choices(program.options)
    ]
    assert len(plans) > 500
    kinds = set()
    for budget in sorted({peak for peak, _, _ in plans})[::8]:
        solution = program.solver.cheapest(budget)
        assert solution is not None
        assert solution.peak_bytes <= budget
        best = min(cost for peak, cost, _ in plans if peak <= budget)
        assert solution.seconds == pytest.approx(best, rel=1e-5)
        kinds |= {
            early(program.options[p]) for p in solution.chosen if program.options[p].host_bytes
        }
    assert kinds == {True, False}  # what the budget allows is fetched early, the rest late


def test_price_is_what_the_computation_before_does_not_hide():
    """Inputs that a block hides cost nothing on the way back; what is too large costs the rest."""
    model, batch = nn.Sequential(*(Block(64, dropout=0.0) for _ in range(4))), torch.randn(256, 64)
    for speed, is_hidden in ((2e8, True), (2e6, False)):
        program = overlapping(model, batch, speed=speed)
        moved = [o for o in program.options if o.module == "1" and o.is_recomputed and o.host_bytes]
        late, soon = sorted(moved, key=early)
        copy_s = batch.numel() * 4 / speed
        ops = program.trace.ops
        entered = next(
            c.entered for c in program.trace.calls if c.module == prefetch_of(soon).module
        )
        read = soon.parts[0].back_at
        computing = sum(
            s for op, s in zip(ops, program.cost.op_seconds, strict=True)
            if entered <= op.tick < read
        )  # fmt: skip
        paid = [o.parts[0].region.offload.transfer_seconds for o in (late, soon)]
        assert paid[0] - paid[1] == pytest.approx(min(copy_s, computing), rel=1e-6)
        assert (computing >= copy_s) == is_hidden


def test_nothing_is_fetched_early_where_copies_hide_behind_nothing():
    """On a CPU, where a copy takes the computation's time, no option prefetches."""
    model, batch = blocks(dropout=0.0)
    fit = Fit(model, batch, loss=square_mean, host_budget="1GiB").plain
    assert any(o.host_bytes for o in fit.options)
    assert not any(early(o) for o in fit.options)


def chain_plan(model, batch):
    """A plan of a chain of blocks that fetches all that it can early."""
    program = overlapping(model, batch)
    return planned(program, model, batch, together(program.options, early))


def test_backward_twice_double_backward_and_partial_backward():
    """Retained graphs, gradients of gradients and backwards that stop half way give equal bits."""
    model, batch = blocks(dropout=0.0)
    square_mean(model, batch).backward()
    square_mean(model, batch).backward()
    twice = gradients(model)

    def second_order():
        loss = square_mean(model, batch)
        first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        sum(g.square().sum() for g in first).backward()
        return gradients(model)

    expected = second_order()
    plan = chain_plan(model, batch)
    with remat.apply(model, plan):
        pool = host_pool(model)
        loss = square_mean(model, batch)
        loss.backward(retain_graph=True)
        loss.backward()
        assert equal(gradients(model), twice)
        assert equal(second_order(), expected)
        del loss
        for _ in range(3):
            torch.autograd.grad(square_mean(model, batch), [*model[-1].parameters()])
            square_mean(model, batch)
            with torch.no_grad():
                square_mean(model, batch)
        assert pool.held_bytes == sum(b.size_bytes for idle in pool._idle.values() for b in idle)


def test_forwards_before_one_backward_fetch_their_own():
    """Two forwards, then one backward: each gets its own tensors back, and buffers are reused."""
    model, batch = blocks(dropout=0.0)
    (square_mean(model, batch) + square_mean(model, 2 * batch)).backward()
    expected = gradients(model)
    with remat.apply(model, chain_plan(model, batch)):
        pool = host_pool(model)
        for _ in range(3):
            (square_mean(model, batch) + square_mean(model, 2 * batch)).backward()
            assert equal(gradients(model), expected)
        assert pool.held_bytes == pool.peak_bytes


def test_calls_of_one_module_are_told_apart():
    """One of a module's calls is offloaded and fetched at the next one, in every step."""
    torch.manual_seed(0)
    model, batch = Recurrent(64, depth=3), torch.randn(128, 64)
    program = overlapping(model, batch)
    chosen = together(program.options, lambda o: early(o) and o.parts[0].region.call == 1)
    assert {prefetch_of(program.options[p]).call for p in chosen} <= {1, 2}
    plan = planned(program, model, batch, chosen)
    assert remat.verify(model, batch, plan, loss=square_mean, optimizer=None).passed


def test_copies_pickles_and_removal_take_the_watching_along():
    """A copy or pickle prefetches for itself; `remove` leaves the model as it was."""
    model, batch = blocks(dropout=0.0)
    before = [dict(m.__dict__) for m in model.modules()]
    square_mean(model, batch).backward()
    expected = gradients(model)
    plan = chain_plan(model, batch)
    handle = remat.apply(model, plan)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        square_mean(twin, batch).backward()
        assert equal(gradients(twin), expected)
        assert host_pool(twin).peak_bytes == plan.host_bytes
    assert host_pool(model).peak_bytes == 0
    handle.remove()
    assert [dict(m.__dict__) for m in model.modules()] == before


def test_plan_file_and_text_tell_of_the_prefetch():
    """It is read back equal, says where copies begin, and names a module that is not there."""
    model, batch = blocks(dropout=0.0)
    plan = chain_plan(model, batch)
    assert remat.Plan.model_validate_json(plan.model_dump_json()) == plan
    assert "fetched from" in str(plan)
    region = next(r for r in plan.regions if r.offload is not None)
    elsewhere = region.offload.prefetch.model_copy(update={"module": "9"})
    offload = region.offload.model_copy(update={"prefetch": elsewhere})
    damaged = plan.model_copy(update={"regions": (region.model_copy(update={"offload": offload}),)})
    with pytest.raises(remat.PlanMismatchError, match="at module '9'"):
        remat.apply(model, damaged)
