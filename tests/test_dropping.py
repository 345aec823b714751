"""Dropped results: made again op by op, bit for bit, and at the moments that the planner says."""

from __future__ import annotations

import copy
import gc
import random
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import remat
from benchmarks.zoo import ZOO
from remat.fit import Fit
from remat.planner.bound import lower_bound_seconds
from tests.models import Block, square_mean
from tests.zoo import TINY

MODELS = ["gpt2", "vit", "unet", "blocks"]


def planned(name, dropout=0.1):
    """A small model with the options of its step."""
    case = TINY[name].build(dropout=dropout)
    return case, Fit(case.model, case.batch, loss=case.loss)


def drops(fit):
    """Positions of the options that drop single results."""
    return [p for p, option in enumerate(fit.plain.options) if option.dropped_ops]


def choices(fit, number):
    """Draw options that do not exclude each other, those that drop results first."""
    generator = random.Random(0)
    options = fit.plain.options
    for _ in range(number):
        found: list[int] = []
        order = generator.sample(drops(fit), len(drops(fit)))
        for p in [*order, *generator.sample(range(len(options)), 8)]:
            if not any(options[p].excludes(options[q]) for q in found):
                found.append(p)
        yield found


def with_regions(fit, chosen):
    """A plan of chosen options, whatever they take."""
    regions = tuple(r for p in chosen for r in fit.plain.options[p].regions())
    return fit.plan("1000%").model_copy(update={"regions": regions, "budget_bytes": 10**12})


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_dropped_results_verify_and_peak_as_predicted(name):
    """Dropout, batch norm and activations in place: same bits, and the predicted peak is real."""
    case, fit = planned(name)
    kinds = {op.name for p in drops(fit) for op in fit.plain.options[p].dropped_ops}
    if name == "unet":
        assert {"aten.native_batch_norm.default", "aten.relu_.default"} <= kinds
    else:
        assert any("bernoulli" in kind for kind in kinds)
    for chosen in choices(fit, 2):
        plan = with_regions(fit, chosen)
        simulated = fit.plain.simulate(chosen).peak_bytes
        plan = plan.model_copy(update={"predicted_peak_bytes": simulated})
        proof = remat.verify(case.model, case.batch, plan, loss=case.loss)
        assert proof.identical, (plan.regions, proof.differences[:2])
        assert abs(proof.peak_error) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_timeline_of_dropped_results_is_the_simulation(name):
    """The planner's peak and the simulated one agree to the byte, whatever is dropped together."""
    _, fit = planned(name)
    for chosen in choices(fit, 4):
        peak = fit.plain.timeline.curve(chosen).peak_bytes
        assert fit.plain.simulate(chosen).peak_bytes == peak


def test_only_the_dropped_ops_run_again():
    """What a step computes more are the FLOPs of the ops that the plan names."""
    case, fit = planned("gpt2", dropout=0.0)

    def flops():
        with FlopCounterMode(display=False) as counter:
            case.model(**case.batch).loss.backward()
        case.model.zero_grad(set_to_none=True)
        return counter.get_total_flops()

    before = flops()
    options = fit.plain.options
    counted = 0
    for p in drops(fit)[:: max(1, len(drops(fit)) // 6)]:
        call = fit.plain.trace.calls[options[p].call]
        seen: dict[str, int] = {}
        again = 0
        named = {(op.name, op.occurrence) for op in options[p].dropped_ops}
        for op in fit.plain.trace.ops[call.first_op : call.stop_op]:
            occurrence = seen.get(op.name, 0)
            seen[op.name] = occurrence + 1
            again += op.flops if (op.name, occurrence) in named else 0
        with remat.apply(case.model, with_regions(fit, [p])):
            assert flops() - before == again
        counted += again
    assert counted > 0


def small(dropout=0.0):
    """A chain of blocks, a batch, and a plan that drops results in every one of them."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(32, dropout=dropout) for _ in range(3)))
    batch = torch.randn(256, 32)
    fit = Fit(model, batch, loss=square_mean, optimizer=None)
    options = fit.plain.options
    chosen: list[int] = []
    for p in sorted(drops(fit), key=lambda p: -len(options[p].away)):
        is_model = options[p].parts[0].region.spans_blocks
        if not is_model and not any(options[p].excludes(options[q]) for q in chosen):
            chosen.append(p)
    assert len(chosen) == 3
    return model, batch, with_regions(fit, chosen)


def test_gradients_of_gradients_are_those_without_the_plan():
    """Backward may run twice over one graph, and be differentiated itself."""
    model, batch, plan = small()

    def outcome():
        batch_now = batch.clone().requires_grad_()
        loss = square_mean(model, batch_now)
        (first,) = torch.autograd.grad(loss, batch_now, create_graph=True)
        second = torch.autograd.grad(
            first.square().sum(), list(model.parameters()), retain_graph=True
        )
        again = torch.autograd.grad(loss, list(model.parameters()))
        return [first.detach(), *second, *again]

    plain = outcome()
    with remat.apply(model, plan):
        ours = outcome()
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def test_memory_is_freed_without_the_garbage_collector():
    """What a plan keeps of a step forms no cycles: a step leaves nothing, run through or not."""
    model, batch, plan = small(dropout=0.1)
    gc.collect()
    gc.disable()
    try:
        with remat.apply(model, plan):
            for is_complete in (True, False):
                seen = []
                hook = model[1].register_forward_hook(
                    lambda _m, _a, out, seen=seen: seen.append(weakref.ref(out.untyped_storage()))
                )
                loss = square_mean(model, batch)
                if is_complete:
                    loss.backward()
                hook.remove()
                del loss
                assert len(seen) == 1
                assert seen[0]() is None
    finally:
        gc.enable()


def test_argument_written_to_before_backward_is_refused():
    """A parameter that changes between forward and backward is no longer what the op was given."""
    model, batch, plan = small()
    with remat.apply(model, plan):
        loss = square_mean(model, batch)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        with pytest.raises((remat.ApplyError, RuntimeError), match=r"written to|modified by"):
            loss.backward()


def test_planned_model_is_copied_and_still_right_under_autocast():
    """A deep copy carries the plan, and autocast around forward and backward changes no bit."""
    model, batch, plan = small()
    twin = copy.deepcopy(model)

    def gradients(module):
        module.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            square_mean(module, batch).backward()
        return [parameter.grad.clone() for parameter in module.parameters()]

    plain = gradients(model)
    with remat.apply(model, plan):
        copied = copy.deepcopy(model)
        for planned_one in (model, copied):
            ours = gradients(planned_one)
            assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(twin), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2s", "moe"])
def test_mid_budgets_cost_little_more_than_the_bound(name):
    """At mid budgets a plan recomputes at most 0.05 of a forward more than any plan must."""
    case = ZOO[name].make(0.0)
    program = Fit(case.model, case.batch, loss=case.loss).plain
    least, most = program.solver.least_peak().peak_bytes, program.keep_all_peak_bytes
    for share in (0.4, 0.8):
        budget = int(least + share * (most - least))
        found = program.solver.cheapest(budget)
        assert found is not None
        seconds = sum(program.options[p].seconds for p in found.chosen)
        bound = lower_bound_seconds(program.timeline, program.cost, budget)
        assert bound <= seconds * (1 + 1e-9)
        assert seconds - bound <= 0.05 * program.cost.forward_seconds
