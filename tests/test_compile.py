"""Under torch.compile a plan keeps its saving and its bits, put on before or after compiling."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from torch import nn

import remat
from remat.fit import Fit, plan_policy
from remat.planner.policies import AllBlocks
from remat.prove.allocator import record_peak, step_tensors
from remat.prove.measure import restored
from remat.regions.recall import gathered
from remat.rewriting.tokens import sliced_tokens
from tests.forced import forced, plan_of, slow_fit
from tests.models import Block, least_of, square_mean

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # torch.compile's own
]
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Compile anew in each test, and leave nothing behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Named(nn.Module):
    """Blocks in a loop."""

    def __init__(self, dropout, depth):
        super().__init__()
        self.blocks = nn.ModuleList(Block(32, dropout=dropout) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def made(dropout=0.0, depth=4):
    torch.manual_seed(0)
    model, batch = Named(dropout, depth), torch.randn(512, 32)
    plan = plan_policy(model, batch, AllBlocks(), loss=square_mean, optimizer=None)
    assert len(plan.regions) == depth
    return model, batch, plan


def outcome(model, batch, run):
    """Gradients, and the peak of a warm step."""

    def step():
        torch.manual_seed(1)
        square_mean(run, batch).backward()

    step()
    model.zero_grad(set_to_none=True)
    peak = record_peak(step, step_tensors(model, batch, None), torch.device("cpu")).peak_bytes
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    return gradients, peak


def close(one, other):
    """Whether gradients differ by rounding at most."""
    return all((a - b).abs().max() <= 1e-5 * a.abs().max() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("order", ["before compiling", "after compiling", "after a step"])
def test_saving_and_gradients_survive_compiling(order):
    """The compiled planned peak is at most the predicted one, well below the compiled plain one."""
    model, batch, plan = made()
    plain, plain_peak = outcome(model, batch, torch.compile(model, backend=BACKEND))
    eager, _ = outcome(model, batch, model)
    assert close(plain, eager)
    torch._dynamo.reset()
    if order == "before compiling":
        handle = remat.apply(model, plan)
        compiled = torch.compile(model, backend=BACKEND)
    else:
        compiled = torch.compile(model, backend=BACKEND)
        if order == "after a step":
            outcome(model, batch, compiled)
        handle = remat.apply(model, plan)
    gradients, peak = outcome(model, batch, compiled)
    assert close(gradients, plain)
    assert peak <= plan.predicted_peak_bytes
    assert peak < 0.8 * plain_peak
    handle.remove()
    again, peak = outcome(model, batch, compiled)
    assert close(again, plain)
    assert peak == plain_peak


def test_dropout_is_that_of_the_compiled_model():
    """With dropout the compiled planned step draws what the compiled plain step draws."""
    model, batch, plan = made(dropout=0.5)
    plain, plain_peak = outcome(model, batch, torch.compile(model, backend=BACKEND))
    torch._dynamo.reset()
    with remat.apply(model, plan):
        planned, peak = outcome(model, batch, torch.compile(model, backend=BACKEND))
    assert close(planned, plain)
    assert peak < 0.8 * plain_peak
    forgetful = [r.model_copy(update={"draws_random_numbers": False}) for r in plan.regions]
    broken = plan.model_copy(update={"regions": tuple(forgetful)})
    with remat.apply(model, broken), gathered():  # an error else
        other, _ = outcome(model, batch, model)
    assert not close(other, outcome(model, batch, model)[0])  # eager: the comparison can fail


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None,
    reason="inductor needs a C++ compiler (g++, or $CXX), and there is none",
)
def test_inductor_keeps_the_saving_and_the_dropout():
    """Through inductor, too, whichever comes first: the compiled plain gradients, less memory."""
    model, batch, plan = made(dropout=0.5, depth=3)
    compiled = torch.compile(model, backend="inductor")
    plain, plain_peak = outcome(model, batch, compiled)
    handle = remat.apply(model, plan)  # after compiling
    planned, peak = outcome(model, batch, compiled)
    torch._dynamo.reset()
    before, same_peak = outcome(model, batch, torch.compile(model, backend="inductor"))
    handle.remove()
    for gradients in (planned, before):
        assert close(gradients, plain)
    assert same_peak == peak <= plan.predicted_peak_bytes
    assert peak < 0.7 * plain_peak


def test_compiling_each_block_keeps_the_plan():
    """Blocks compiled one by one in place, as torchtitan does, under a plan put on before."""
    model, batch, plan = made()
    plain, plain_peak = outcome(model, batch, model)
    with remat.apply(model, plan):
        for block in model.blocks:
            block.compile(backend=BACKEND)
        planned, peak = outcome(model, batch, model)
    assert close(planned, plain)
    assert peak < 0.8 * plain_peak


def left_behind(model, batch):
    """Gradients, buffers and the random state after two compiled steps."""
    torch._dynamo.reset()
    run = torch.compile(model, backend=BACKEND)
    with restored(model, batch):
        torch.manual_seed(1)
        for _ in range(2):
            square_mean(run, batch).backward()
        found = [p.grad.clone() for p in model.parameters()]
        found += [b.clone().float() for b in model.buffers()]
    return [*found, torch.get_rng_state().float()]


def test_every_kind_of_decision_is_right_where_it_is_compiled():
    """Packed, dropped, offloaded, fetched early, a run: what the plain compiled model leaves."""
    torch.manual_seed(0)
    layers = (nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Dropout(0.5)) for _ in range(4))
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), *layers)
    batch = torch.randn(512, 32)
    fit = slow_fit(model, batch, host_budget="64MiB")
    kinds = forced(fit)
    kinds["run"] = [next(p for p, o in enumerate(fit.plain.options) if len(o.calls) > 1)]
    plain = left_behind(model, batch)
    for kind in ("packed inside", "dropped", "fetched early", "mixed", "run"):
        with remat.apply(model, plan_of(fit, kinds[kind])):
            assert close(left_behind(model, batch), plain)


def test_slices_of_tokens_are_right_where_they_are_compiled():
    """Compiled they run whole: the plain gradients."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 32))
    model, batch = nn.Sequential(mlp, nn.Tanh()), torch.randn(8, 64, 32)
    plain = left_behind(model, batch)
    fit = Fit(model, batch, loss=square_mean, optimizer=None)
    rewrites = sliced_tokens(fit.plain, model, ())
    assert [rewrite.module for rewrite in rewrites] == ["0"]
    plan = plan_of(fit, ()).model_copy(update={"rewrites": rewrites})
    with remat.apply(model, plan):
        assert close(left_behind(model, batch), plain)


def test_sliced_heads_compile_into_one_graph():
    """A head that a plan slices runs whole where it is compiled, and breaks no graph."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1000))
    batch, labels = torch.randn(512, 16), torch.randint(1000, (512,))

    def loss(run, batch):
        return nn.functional.cross_entropy(run(batch[0]), batch[1])

    least = least_of(Fit(model, (batch, labels), loss=loss, optimizer=None, chunks=True))
    plan = least.model_copy(update={"regions": ()})
    assert [rewrite.module for rewrite in plan.rewrites] == ["1"]
    expected = loss(model, (batch, labels))
    with remat.apply(model, plan):
        run = torch.compile(model, backend="eager", fullgraph=True)
        assert loss(run, (batch, labels)) == expected
