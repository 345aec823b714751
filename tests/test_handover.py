"""The optimizer's part of a step in later traces: taken over where it follows, else traced."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import nn

import remat
from remat.fit import plan_policy
from remat.planner.policies import AllBlocks
from remat.trace.capture import capture
from remat.trace.records import OPTIMIZER
from tests.models import Block, Tower, square_mean
from tests.zoo import ALL


class Lion(torch.optim.Optimizer):
    """A user's own optimizer (Chen et al. 2023), whose state are copies of gradients."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-4})

    @torch.no_grad()
    def step(self):
        for parameter in (p for group in self.param_groups for p in group["params"]):
            held = self.state[parameter].setdefault("mean", parameter.grad.clone())
            update = (held * 0.9 + parameter.grad * 0.1).sign_()
            parameter.add_(update, alpha=-1e-4)
            held.lerp_(parameter.grad, 0.01)


class Forgetful(torch.optim.SGD):
    """Let go of each gradient as soon as it is used."""

    def step(self):
        super().step()
        self.zero_grad(set_to_none=True)


class Curious(torch.optim.SGD):
    """Read what the model left behind in its forward."""

    model: nn.Module

    def step(self):
        super().step()
        self.model.left.mul_(2)


class Leaving(Block):
    """A block that leaves its result behind."""

    def forward(self, x):
        self.left = super().forward(x).detach()
        return super().forward(x)


class Counting(torch.optim.SGD):
    """Count steps over all instances."""

    steps = 0

    def step(self):
        Counting.steps += 1
        super().step()


OPTIMIZERS = {
    "adamw": functools.partial(torch.optim.AdamW, foreach=False),
    "adamw-foreach": functools.partial(torch.optim.AdamW, foreach=True),
    "adamw-fused": functools.partial(torch.optim.AdamW, fused=True),
    "sgd": functools.partial(torch.optim.SGD, lr=0.1),
    "sgd-momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adafactor": torch.optim.Adafactor,
    "lion": Lion,
    "forgetful": functools.partial(Forgetful, lr=0.1),
    "none": None,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("drop_saved", [True, False])
def test_a_trace_like_another_is_the_one_that_runs_the_optimizer(name, drop_saved):
    """With the optimizer's part taken over, every record is equal to that of a full trace."""
    model, batch = nn.Sequential(Block(8), Block(8)), torch.randn(4, 8)
    step = {"loss": square_mean, "optimizer": OPTIMIZERS[name]}
    plan = plan_policy(model, batch, AllBlocks(), loss=square_mean, optimizer=None)
    like = capture(model, batch, **step)
    with remat.apply(model, plan):
        whole = capture(model, batch, drop_saved=drop_saved, **step)
        taken = capture(model, batch, drop_saved=drop_saved, like=like, **step)
    assert len(whole.ops) > len(like.ops)
    for field in dataclasses.fields(whole):
        assert getattr(taken, field.name) == getattr(whole, field.name), field.name


@pytest.mark.parametrize("name", ["batch_norm", "frozen", "siamese", "tied_weights"])
def test_a_trace_like_another_is_a_full_one_for_odd_models(name):
    """The same holds for models with ties, buffers and frozen parts."""
    case = ALL[name].build(dropout=0.1)
    like = capture(case.model, case.batch, loss=case.loss)
    whole = capture(case.model, case.batch, loss=case.loss, drop_saved=False)
    taken = capture(case.model, case.batch, loss=case.loss, drop_saved=False, like=like)
    assert taken == whole


def test_a_trace_like_another_runs_the_optimizer_no_more():
    """The optimizer steps twice in the first trace, and in none after it."""
    model, batch = Tower(64), torch.randn(64, 64)
    step = {"loss": square_mean, "optimizer": functools.partial(Counting, lr=0.1)}
    Counting.steps = 0
    like = capture(model, batch, **step)
    assert Counting.steps == 2
    capture(model, batch, like=like, **step)
    assert Counting.steps == 2


def test_an_optimizer_that_reads_activations_is_traced_again():
    """What lies in other memory under another plan cannot be read there: the optimizer runs."""
    model, batch = Leaving(64), torch.randn(64, 64)

    def optimizer(parameters):
        made = Curious(parameters, lr=0.1)
        made.model = model
        return made

    like = capture(model, batch, loss=square_mean, optimizer=optimizer)
    whole = capture(model, batch, loss=square_mean, optimizer=optimizer, drop_saved=False)
    taken = capture(
        model, batch, loss=square_mean, optimizer=optimizer, drop_saved=False, like=like
    )
    assert taken == whole


def test_other_gradients_are_traced_again():
    """A trace of a step with other gradients says nothing of this one's optimizer."""
    model = nn.Linear(8, 16)
    like = capture(model, torch.randn(4, 8), loss=square_mean)
    model.bias.requires_grad_(False)
    taken = capture(model, torch.randn(4, 8), loss=square_mean, like=like)
    assert taken == capture(model, torch.randn(4, 8), loss=square_mean)
    num = sum(op.phase == OPTIMIZER for op in taken.ops)
    assert 0 < num < sum(op.phase == OPTIMIZER for op in like.ops)


class Classifier(nn.Module):
    """Two blocks and a head whose loss may run in slices."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(256, dropout=0.0), Block(256, dropout=0.0))
        self.head = nn.Linear(256, 512)

    def forward(self, x, labels):
        return nn.functional.cross_entropy(self.head(self.blocks(x)), labels)


@pytest.mark.parametrize(
    ("optimizer", "is_floor"), [(torch.optim.AdamW, True), (None, False)], ids=["adamw", "none"]
)
def test_no_rewrite_is_traced_where_the_optimizer_fills_the_peak(optimizer, is_floor):
    """Slices free nothing below what the optimizer needs; the least is told without them."""
    model, batch = Classifier(), (torch.randn(128, 256), torch.randint(512, (128,)))
    said = []
    with pytest.raises(remat.BudgetError) as caught:
        remat.plan(
            model, batch, 1, optimizer=optimizer, progress=lambda what, _share: said.append(what)
        )
    assert (said.count("tracing one training step") == 1) == is_floor
    made = remat.plan(model, batch, caught.value.minimum_bytes, optimizer=optimizer)
    assert made.predicted_peak_bytes <= caught.value.minimum_bytes
    if is_floor:  # parameters, gradients and two moments, and what one update takes
        held = 4 * sum(p.nbytes for p in model.parameters())
        assert held < caught.value.minimum_bytes < held + 4 * model.head.weight.nbytes
