"""Saved tensors in host memory: the same bits, whatever a step does, and buffers used again."""

from __future__ import annotations

import copy
import logging
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import remat
from remat.fit import Fit
from remat.planner.records import Offload, Region
from remat.regions.apply import host_pool
from tests.models import Block, Recurrent, square_mean
from tests.zoo import ALL

MIB = 2**20


def plan_with(model, batch, choose, loss=square_mean):
    """Return a plan of the offload options that `choose` picks, in order, where they fit."""
    fit = Fit(model, batch, loss=loss, host_budget="1GiB")
    chosen: list[int] = []
    for position, option in enumerate(fit.plain.options):
        fits = not any(option.excludes(fit.plain.options[p]) for p in chosen)
        if option.host_bytes and choose(option) and fits:
            chosen.append(position)
    assert chosen
    peak = fit.plain.simulate(chosen).peak_bytes
    return fit.plan("1000%").model_copy(
        update={"regions": fit.plain.regions(chosen), "budget_bytes": peak}
    )


def saved(option):
    """Choose calls whose saved tensors wait on the host."""
    return not option.is_recomputed and not option.dropped_ops


def inputs(option):
    """Choose regions whose inputs wait on the host."""
    return option.is_recomputed


def blocks(count=3, width=64, dropout=0.1):
    """A chain of blocks with a batch that makes storages of 64 KiB."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width, dropout=dropout) for _ in range(count))), torch.randn(
        256, width
    )


def gradients(model):
    """Copy the gradients, and set them to none."""
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found


def equal(one, other):
    """Whether all tensors are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("name", "choose"),
    [
        ("dropout", saved),
        ("dropout", inputs),
        ("batch_norm", saved),
        ("batch_norm", inputs),
        ("views_in_place", saved),
        ("views_in_place", inputs),
        ("tied_weights", inputs),
        ("in_place_on_input", saved),
    ],
)
def test_steps_are_identical_and_memory_is_as_planned(name, choose, monkeypatch):
    """With views, tied weights, writes in place, dropout or BatchNorm: equal bits, exact bytes."""
    monkeypatch.setattr("remat.planner.offload.LEAST_BYTES", 256)  # the models are tiny
    case = ALL[name].build(dropout=0.1)
    plan = plan_with(case.model, case.batch, choose, case.loss)
    proof = remat.verify(case.model, case.batch, plan, loss=case.loss)
    assert proof.identical, proof.differences[:2]
    assert proof.passed
    assert proof.measured_peak_bytes == pytest.approx(plan.budget_bytes, abs=1024)
    assert proof.measured_host_bytes == proof.predicted_host_bytes == plan.host_bytes


def test_deep_chain_runs_with_inputs_on_the_host():
    """Runs of blocks whose one input waits on the host leave almost nothing on the device."""
    model, batch = blocks(count=6, dropout=0.0)
    fit = Fit(model, batch, loss=square_mean, host_budget="1GiB").plain
    runs = [o for o in fit.options if len(o.calls) > 1 and o.host_bytes]
    assert runs
    plan = plan_with(model, batch, lambda option: option in runs)
    assert any(region.followers for region in plan.offloads)
    assert remat.verify(model, batch, plan, loss=square_mean).identical


def test_calls_of_one_module_are_told_apart():
    """One call is offloaded, another recomputed, and the third kept, in every step."""
    torch.manual_seed(0)
    model, batch = Recurrent(64, depth=3), torch.randn(128, 64)
    plan = plan_with(model, batch, lambda o: saved(o) and o.parts[0].region.call == 1)
    assert {r.call for r in plan.regions} == {1}
    assert remat.verify(model, batch, plan, loss=square_mean).identical
    name, calls = plan.regions[0].module, plan.regions[0].num_calls
    again = Region(module=name, call=2, num_calls=calls, draws_random_numbers=True)
    mixed = plan.model_copy(
        update={"regions": (*plan.regions, again), "budget_bytes": plan.keep_all_peak_bytes}
    )
    proof = remat.verify(model, batch, mixed, loss=square_mean)
    assert proof.identical
    assert proof.measured_host_bytes == plan.host_bytes


@pytest.mark.parametrize("choose", [saved, inputs])
def test_buffers_are_used_again_and_freed(choose):
    """Fifty steps take the memory of the first, all of it is given back, `remove` frees it."""
    model, batch = blocks()
    plan = plan_with(model, batch, choose)
    handle = remat.apply(model, plan)
    pool = host_pool(model)
    for _ in range(50):
        square_mean(model, batch).backward()
        assert pool.held_bytes == pool.peak_bytes == plan.host_bytes
    handle.remove()
    assert pool.held_bytes == 0
    assert host_pool(model) is None


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_removing_a_plan_returns_memory_to_the_system():
    """The pages of the process shrink by what the plan had on the host."""

    def resident():
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    model, batch = nn.Sequential(Block(512), Block(512)), torch.randn(4096, 512)
    plan = plan_with(model, batch, saved)
    assert plan.host_bytes > 60 * MIB
    with remat.apply(model, plan):
        square_mean(model, batch).backward()
        before = resident()
    assert before - resident() > 0.9 * plan.host_bytes


@pytest.mark.parametrize("choose", [saved, inputs])
def test_backward_twice_and_double_backward(choose):
    """Retained graphs are read twice from the host; gradients of gradients are the same too."""
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
    with remat.apply(model, plan_with(model, batch, choose)):
        loss = square_mean(model, batch)
        loss.backward(retain_graph=True)
        loss.backward()
        assert equal(gradients(model), twice)
        assert equal(second_order(), expected)


@pytest.mark.parametrize("choose", [saved, inputs])
def test_partial_backward_leaves_nothing_behind(choose):
    """A backward that stops half way, and a forward without one, give every buffer back."""
    model, batch = blocks()
    plan = plan_with(model, batch, choose)
    with remat.apply(model, plan):
        pool = host_pool(model)
        for _ in range(3):
            last = [*model[-1].parameters()]
            torch.autograd.grad(square_mean(model, batch), last)
            square_mean(model, batch)
            with torch.no_grad():
                square_mean(model, batch)
            assert pool.held_bytes == sum(
                b.size_bytes for idle in pool._idle.values() for b in idle
            ) <= plan.host_bytes  # fmt: skip


class Fails(nn.Module):
    """Raises in its forward when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
        self.fails = False

    def forward(self, x):
        y = self.body(x).tanh()
        if self.fails:
            raise KeyError("on purpose")
        return y.square()


@pytest.mark.parametrize("choose", [saved, inputs])
def test_an_exception_in_forward_leaves_the_next_step_right(choose):
    """The user's own error comes through, hooks are gone, and later steps are as without a plan."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(64, 64), Fails(), nn.Tanh()), torch.randn(256, 64)
    square_mean(model, batch).backward()
    expected = gradients(model)
    with remat.apply(model, plan_with(model, batch, lambda o: choose(o) and o.module == "1")):
        model[1].fails = True
        with pytest.raises(KeyError, match="on purpose"):
            model(batch)
        model[1].fails = False
        square_mean(model, batch).backward()
        assert equal(gradients(model), expected)


@pytest.mark.parametrize("choose", [saved, inputs])
def test_copies_and_pickles_have_host_memory_of_their_own(choose):
    """A model that is copied or pickled with the plan on trains the same, from an empty pool."""
    model, batch = blocks(dropout=0.0)
    plan = plan_with(model, batch, choose)
    with remat.apply(model, plan):
        square_mean(model, batch).backward()
        expected = gradients(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            pool = host_pool(twin)
            assert pool is not host_pool(model)
            assert pool.held_bytes == 0
            square_mean(twin, batch).backward()
            assert equal(gradients(twin), expected)
            assert pool.peak_bytes == plan.host_bytes


def test_more_than_the_host_budget_stays_on_the_device(caplog):
    """Two forwards before a backward need twice the memory: it is said, and gradients are right."""
    model, batch = blocks(dropout=0.0)
    plan = plan_with(model, batch, saved)
    plan = plan.model_copy(update={"host_budget_bytes": plan.host_bytes})
    (square_mean(model, batch) + square_mean(model, 2 * batch)).backward()
    expected = gradients(model)
    with remat.apply(model, plan), caplog.at_level(logging.WARNING, logger="remat"):
        for _ in range(2):
            (square_mean(model, batch) + square_mean(model, 2 * batch)).backward()
            assert equal(gradients(model), expected)
        assert host_pool(model).peak_bytes <= plan.host_bytes
    assert caplog.text.count("host budget") == 1


def test_backward_after_remove_is_right():
    """A plan that is removed between forward and backward still gives its tensors back."""
    model, batch = blocks(dropout=0.0)
    square_mean(model, batch).backward()
    expected = gradients(model)
    handle = remat.apply(model, plan_with(model, batch, saved))
    pool = host_pool(model)
    loss = square_mean(model, batch)
    handle.remove()
    assert pool.held_bytes > 0
    loss.backward()
    assert equal(gradients(model), expected)
    del loss
    assert pool.held_bytes == 0


def test_a_kept_tensor_that_is_written_to_raises_as_without_a_plan():
    """Hooks switch torch's own check of versions off; inside an offloaded call it holds still."""

    class Writes(nn.Module):
        late = False

        def forward(self, x):
            y = x.exp()
            z = y.sum(1) * 2
            if self.late:
                with torch.no_grad():
                    y.mul_(2)
            return z

    model, batch = nn.Sequential(nn.Linear(64, 64), Writes()), torch.randn(256, 64)
    plan = plan_with(model, batch, saved, lambda m, b: m(b).sum())
    kept = Offload(tensors=(), host_bytes=0)
    region = Region(module="1", is_recomputed=False, offload=kept)
    for chosen in ((), (region,)):
        with remat.apply(model, plan.model_copy(update={"regions": chosen})):
            model[1].late = True
            loss = model(batch).sum()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
            model[1].late = False


def test_plan_that_does_nothing_with_a_module_is_refused():
    """A region that is neither recomputed nor offloaded is no plan of ours."""
    model, batch = blocks()
    plan = remat.plan(model, batch, "1000%", loss=square_mean)
    damaged = plan.model_copy(update={"regions": (Region(module="0", is_recomputed=False),)})
    with pytest.raises(remat.PlanMismatchError, match="neither recomputes nor offloads"):
        remat.apply(model, damaged)
