"""Selective checkpointing: ops kept inside a region are not run again, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import remat
from remat.fit import Fit
from tests.zoo import TINY


def flops_of_step(case):
    """Count the FLOPs of forward and backward by torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        case.loss(case.model, case.batch).backward() if case.loss else case.model(
            **case.batch
        ).loss.backward()
    case.model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["gpt2", "vit", "blocks"])
def test_recomputed_flops_are_those_of_the_plan(name):
    """What a planned step computes more is the recomputed ops' FLOPs, without the kept ones."""
    case = TINY[name].build(dropout=0.1)
    fit = Fit(case.model, case.batch, loss=case.loss)
    kept = [o for o in fit.plain.options if o.saved_ops][::4]
    assert len(kept) >= 2
    before = flops_of_step(case)
    for option in kept:
        call = fit.plain.trace.calls[option.call]
        counts: dict[str, int] = {}
        again = 0
        saved = {(op.name, op.occurrence) for op in option.saved_ops}
        for op in fit.plain.trace.ops[call.first_op : option.parts[0].stop_op]:
            occurrence = counts.get(op.name, 0)
            counts[op.name] = occurrence + 1
            again += 0 if (op.name, occurrence) in saved else op.flops
        plan = fit.plan("1000%").model_copy(update={"regions": option.regions()})
        with remat.apply(case.model, plan):
            assert flops_of_step(case) - before == again


def test_kept_ops_make_plans_cheaper_than_whole_regions():
    """At a middle budget of a GPT-2 the plan keeps ops and costs less than without that choice."""
    case = TINY["gpt2"].build()
    fit = Fit(case.model, case.batch, loss=case.loss)
    whole = [p for p, o in enumerate(fit.plain.options) if not o.saved_ops]
    costs = {}
    for share in (0.85, 0.9):
        budget = int(share * fit.keep_all_peak_bytes)
        ours = fit.plain.solver.cheapest(budget)
        assert ours is not None
        best_whole = min(
            (
                fit.plain.solver.cost(chosen)
                for chosen in _choices(fit.plain.options, whole)
                if fit.plain.timeline.curve(chosen).peak_bytes <= budget
            ),
            default=float("inf"),
        )
        assert ours.seconds <= best_whole * (1 + 1e-6)
        costs[share] = ours.seconds
    assert costs[0.9] <= costs[0.85]


def _choices(options, positions, chosen=(), start=0):
    yield frozenset(chosen)
    if len(chosen) == 3:
        return
    for number in range(start, len(positions)):
        position = positions[number]
        if not any(options[position].excludes(options[other]) for other in chosen):
            yield from _choices(options, positions, (*chosen, position), number + 1)


def test_selective_regions_verify_with_dropout():
    """Every option that keeps ops gives the same bits, dropout on, one at a time."""
    case = TINY["llama"].build(dropout=0.1)
    fit = Fit(case.model, case.batch, loss=case.loss)
    base = fit.plan("1000%")
    tried = [o for o in fit.plain.options if o.saved_ops][::4]
    assert len(tried) >= 3
    for option in tried:
        peak = fit.plain.simulate([fit.plain.options.index(option)]).peak_bytes
        plan = base.model_copy(update={"regions": option.regions(), "budget_bytes": peak + 1024})
        proof = remat.verify(case.model, case.batch, plan, loss=case.loss)
        assert proof.passed, (option.module, proof.differences[:2])
        assert torch.is_grad_enabled()
