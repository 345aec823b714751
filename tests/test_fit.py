"""Plans of real small models: within the budget, exact in prediction, and the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import remat
from remat.fit import Fit
from remat.trace.standin import random_states
from tests.models import least_of, rising
from tests.zoo import ALL, TINY

# Kernels allocate a few scalars below the dispatcher; see `remat.trace.records.CRUMBS_BYTES`.
CRUMBS = 4096


def state_of(model):
    """Everything that planning must leave alone, by identity and by value."""
    return (
        [dict(m.__dict__) for m in model.modules()],
        [(id(t), t.detach().clone()) for t in (*model.parameters(), *model.buffers())],
        [p.grad for p in model.parameters()],
        [m.training for m in model.modules()],
        [
            {k: list(v) for k, v in m.__dict__.items() if k.endswith("hooks")}
            for m in model.modules()
        ],
        random_states()["torch"],
        random_states()["python"],
    )


def assert_same_state(before, after):
    for one, two in zip(before[0], after[0], strict=True):
        assert one.keys() == two.keys()
        assert all(two[k] is v or two[k] == v for k, v in one.items() if not k.startswith("_"))
    for (id_a, a), (id_b, b) in zip(before[1], after[1], strict=True):
        assert id_a == id_b
        assert torch.equal(a, b) or torch.equal(a.isnan(), b.isnan())
    for a, b in zip(before[2], after[2], strict=True):
        assert a is b
    assert before[3:5] == after[3:5]
    assert torch.equal(before[5], after[5])
    assert before[6] == after[6]


@pytest.mark.parametrize("name", ALL)
def test_plans_keep_the_budget_and_the_bits(name):
    """At the least and a middle budget: peak within it, as predicted, every gradient the same."""
    case = ALL[name].build(dropout=0.1)
    before = state_of(case.model)
    fit = Fit(case.model, case.batch, loss=case.loss, chunks=False)
    low = least_of(fit)
    plans = [low, fit.plan((low.budget_bytes + low.keep_all_peak_bytes) // 2)]
    assert_same_state(before, state_of(case.model))
    for plan in plans:
        proof = remat.verify(case.model, case.batch, plan, loss=case.loss)
        assert proof.passed, proof.differences[:3]
        assert proof.identical or proof.within_noise
        assert proof.measured_peak_bytes <= plan.budget_bytes
        assert plan.predicted_peak_bytes <= plan.budget_bytes
        error = plan.predicted_peak_bytes - proof.measured_peak_bytes
        assert abs(error) <= max(CRUMBS, 0.001 * proof.measured_peak_bytes)
    assert_same_state(before, state_of(case.model))
    assert plans[1].recompute_seconds <= plans[0].recompute_seconds


@pytest.mark.parametrize("name", TINY)
def test_keep_all_peak_is_the_measured_one(name):
    """With nothing recomputed, the predicted peak is the allocator's."""
    case = TINY[name].build(dropout=0.1)
    plan = remat.plan(case.model, case.batch, "1000%", loss=case.loss)
    assert plan.regions == ()
    assert any("nothing is recomputed" in note for note in plan.notes)
    measured = remat.measure(case.model, case.batch, loss=case.loss, steps=1).peak_bytes
    assert abs(plan.predicted_peak_bytes - measured) <= max(CRUMBS, 0.001 * measured)
    assert plan.keep_all_peak_bytes == plan.predicted_peak_bytes


@pytest.mark.parametrize("name", ["gpt2", "resnet", "unet"])
def test_no_fixed_policy_is_cheaper(name):
    """At the peak of every fixed policy, our plan costs no more than the policy."""
    from remat.planner.policies import simple_policies

    case = TINY[name].build()
    fit = Fit(case.model, case.batch, loss=case.loss, optimizer=None)
    assert len(fit.plain.blocks) >= 2
    for policy in simple_policies(len(fit.plain.blocks)):
        fixed = fit.policy(policy)
        ours = fit.plan(fixed.budget_bytes)
        assert ours.recompute_seconds <= fixed.recompute_seconds * (1 + 1e-6), policy.label


def test_sweep_is_monotone_and_within_every_budget():
    """Over twenty budgets of a small GPT-2 more budget never costs more, simulated peaks fit."""
    case = TINY["gpt2"].build(dropout=0.1)
    fit = Fit(case.model, case.batch, loss=case.loss, optimizer=None, chunks=False)
    costs = []
    for budget in rising(least_of(fit).budget_bytes, fit.keep_all_peak_bytes, 20):
        plan = fit.plan(budget)
        assert plan.predicted_peak_bytes <= budget
        costs.append(plan.recompute_seconds)
    assert costs == sorted(costs, reverse=True)


def test_frontier_is_ordered():
    """The front's plans have rising peaks and falling costs, from least peak to keep-all."""
    case = TINY["vit"].build()
    plans = remat.frontier(case.model, case.batch, points=5, loss=case.loss)
    assert len(plans) >= 3
    assert plans[-1].regions == ()
    peaks = [p.predicted_peak_bytes for p in plans]
    costs = [p.recompute_seconds for p in plans]
    assert peaks == sorted(peaks)
    assert costs == sorted(costs, reverse=True)


def test_six_blocks_reproduce_the_reference_table():
    """Peaks of six pre-norm blocks, weights excluded, are the published ones to 1 %."""
    from benchmarks.zoo import ZOO
    from remat.planner.policies import AllBlocks, FirstK, KeepAll, LastK

    case = ZOO["six_blocks"].build()
    fit = Fit(case.model, case.batch, loss=case.loss, optimizer=None)
    weights = sum(p.numel() * 4 for p in case.model.parameters())
    batch = case.batch if isinstance(case.batch, torch.Tensor) else case.batch[0]
    published = {
        KeepAll(): 149.8, FirstK(1): 126.8, FirstK(2): 103.7, FirstK(3): 80.7, FirstK(4): 57.7,
        FirstK(5): 34.7, AllBlocks(): 34.7, LastK(3): 103.7,
    }  # fmt: skip
    for policy, mib in published.items():
        plan = fit.policy(policy)
        activations = plan.predicted_peak_bytes - weights
        candidates = (activations / 2**20, (activations - batch.nbytes) / 2**20)
        assert any(c == pytest.approx(mib, rel=0.01) for c in candidates), (policy, candidates)


def test_meta_model_can_be_planned_without_memory():
    """A model on the meta device gets the plan that the real one gets."""
    real = TINY["llama"].build()
    meta = TINY["llama"].build(device="meta")
    for budget in ("90%", "75%"):
        one = remat.plan(real.model, real.batch, budget, loss=real.loss)
        two = remat.plan(meta.model, meta.batch, budget, loss=meta.loss)
        assert [r.module for r in one.regions] == [r.module for r in two.regions]
        assert abs(one.predicted_peak_bytes - two.predicted_peak_bytes) <= 65536


def test_planning_allocates_no_activation():
    """Planning a step with activations of a gigabyte allocates a few MiB at most."""
    from remat.cost.allocations import most_allocated

    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(8)))
    batch = torch.randn(262_144, 64)
    plan = None

    def run():
        nonlocal plan
        plan = remat.plan(model, batch, "80%", loss=lambda m, x: m(x).mean(), optimizer=None)

    allocated = most_allocated(run)
    assert plan.keep_all_peak_bytes > 2**30
    assert allocated < 100 * 2**20  # one op at a time on fewer rows, to learn its workspace


def test_optimizers_are_in_the_peak():
    """None, stateless, stateful and an instance: each peak is the measured one."""
    model = nn.Sequential(*(nn.Linear(96, 96) for _ in range(4)))
    batch = torch.randn(8, 96)

    def loss(m, x):
        return m(x).square().mean()

    peaks = {}
    instance = torch.optim.Adam(model.parameters(), lr=1e-3, amsgrad=True)
    for label, optimizer in {
        "none": None,
        "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
        "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
        "foreach": lambda ps: torch.optim.AdamW(ps, foreach=True),
        "instance": instance,
    }.items():
        plan = remat.plan(model, batch, "100%", loss=loss, optimizer=optimizer)
        measured = remat.measure(model, batch, loss=loss, optimizer=optimizer, steps=1)
        assert abs(plan.predicted_peak_bytes - measured.peak_bytes) <= CRUMBS, label
        peaks[label] = plan.predicted_peak_bytes
    assert peaks["none"] <= peaks["sgd"] < peaks["momentum"] < peaks["instance"]
    assert not instance.state
