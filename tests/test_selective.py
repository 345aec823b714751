"""Selective checkpointing: what a plan file says is kept is not run again, and nothing changes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import remat
from remat.fit import Fit
from remat.planner.options import OptionBuilder
from remat.planner.spans import Facts
from tests.zoo import TINY


def flops_of_step(case):
    """Count the FLOPs of forward and backward by torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        case.loss(case.model, case.batch).backward() if case.loss else case.model(
            **case.batch
        ).loss.backward()
    case.model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def keeping(fit, every):
    """Yield each block's region with every so many of its dearer ops kept, and the ops again."""
    program = fit.plain
    builder = OptionBuilder(Facts(program.trace, program.cost))
    for position in program.blocks:
        option = program.options[position]
        call = program.trace.calls[option.call]
        positions = range(call.first_op, option.parts[0].stop_op)
        ops = {p: program.trace.ops[p] for p in positions}
        may_stay = [p for p, op in ops.items() if op.flops and op.fresh and not op.is_random]
        kept = frozenset(may_stay[::every])
        named = builder.named(call.first_op, call.stop_op, kept)
        region = option.parts[0].region.model_copy(update={"saved_ops": named})
        yield region, sum(op.flops for p, op in ops.items() if p not in kept)


@pytest.mark.parametrize("name", ["gpt2", "vit", "blocks"])
def test_recomputed_flops_are_those_of_the_plan(name):
    """What a planned step computes more is the recomputed ops' FLOPs, without the kept ones."""
    case = TINY[name].build(dropout=0.1)
    fit = Fit(case.model, case.batch, loss=case.loss)
    before = flops_of_step(case)
    base = fit.plan("1000%")
    found = list(keeping(fit, 2))
    assert len(found) >= 2
    for region, again in found:
        assert region.saved_ops
        plan = base.model_copy(update={"regions": (region,)})
        plan = remat.Plan.from_data(plan.model_dump(mode="json"), source="the test")
        with remat.apply(case.model, plan):
            assert flops_of_step(case) - before == again


def test_selective_regions_verify_with_dropout():
    """Regions that keep ops give the same bits, dropout on."""
    case = TINY["llama"].build(dropout=0.1)
    fit = Fit(case.model, case.batch, loss=case.loss)
    regions = tuple(region for region, _ in keeping(fit, 2))
    assert regions
    base = fit.plan("1000%")
    plan = base.model_copy(update={"regions": regions, "budget_bytes": fit.keep_all_peak_bytes})
    proof = remat.verify(case.model, case.batch, plan, loss=case.loss)
    assert proof.passed, proof.differences[:2]
    assert torch.is_grad_enabled()
