"""Measured peaks against sizes that are known beforehand, and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import remat
from tests.models import Block, square_mean, tightest

CRUMBS = 4096
MIB = 2**20


def test_peak_of_known_allocations():
    """A step that allocates 1, 2 and 4 MiB at once has a peak of 7 MiB above its base."""
    x = torch.zeros(())
    weight = nn.Parameter(torch.ones(()))

    class Allocates(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            held = [torch.empty(size * MIB, dtype=torch.uint8) for size in (1, 2)]
            torch.empty(4 * MIB, dtype=torch.uint8)
            held.clear()
            torch.empty(6 * MIB, dtype=torch.uint8)
            return x * self.weight

    found = remat.measure(Allocates(), x, optimizer=None, steps=1)
    assert found.base_bytes == 8
    assert 0 <= found.peak_bytes - found.base_bytes - 7 * MIB <= CRUMBS


def test_base_counts_each_storage_once():
    """Parameters, tied ones once, buffers, the batch, views of it, and AdamW's state: the base."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.BatchNorm1d(64))
    model[1].weight = model[0].weight
    batch = torch.randn(32, 64)
    pair = {"whole": batch, "half": batch[:16]}

    def loss(m, b):
        return m(b["whole"]).square().mean() + b["half"].mean()

    parameters = 4 * (64 * 64 + 2 * 64 + 2 * 64)
    buffers = 4 * 2 * 64 + 8
    steps = 4 * len(list(model.parameters()))
    found = remat.measure(model, pair, loss=loss, steps=1)
    assert found.base_bytes == 3 * parameters + steps + buffers + batch.nbytes
    bare = remat.measure(model, pair, loss=loss, optimizer=None, steps=1)
    assert bare.base_bytes == parameters + buffers + batch.nbytes
    assert bare.peak_bytes < found.peak_bytes


def test_times_come_from_the_clock_and_steps_are_counted():
    """With a clock that advances by 1, 2, 3, ... per step: median, spread and number are known."""
    ticks = iter([0, 1, 10, 12, 20, 23, 30, 34, 40, 45])
    model, batch = nn.Linear(4, 4), torch.randn(2, 4)
    found = remat.measure(model, batch, loss=square_mean, steps=5, clock=lambda: float(next(ticks)))
    assert found.step_seconds == (1, 2, 3, 4, 5)
    assert found.median_seconds == 3
    assert found.iqr_seconds == 3  # quartiles 1.5 and 4.5
    assert len(found.losses) == 7  # one to warm up, five timed, one recorded


def test_losses_are_those_of_training():
    """The losses are those of a hand-written loop from the same state."""
    model, batch = nn.Sequential(Block(16), Block(16)), torch.randn(8, 16)
    twin = copy.deepcopy(model)
    state = torch.get_rng_state()
    found = remat.measure(model, batch, loss=square_mean, steps=2)
    torch.set_rng_state(state)
    optimizer = torch.optim.AdamW(twin.parameters())
    for measured in found.losses:
        optimizer.zero_grad()
        loss = square_mean(twin, batch)
        loss.backward()
        optimizer.step()
        assert float(loss.detach()) == measured


def test_everything_is_put_back():
    """Parameters, buffers, gradients, a batch that is written to, random state: as before."""

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(16, norm=nn.BatchNorm1d(16))

        def forward(self, x):
            y = self.block(x * 1)
            x.mul_(0.5)
            return y

    model, batch = Writes(), torch.randn(8, 16)
    square_mean(model, batch).backward()
    batch.normal_()
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), batch]
    before = [t.detach().clone() for t in tensors]
    gradients = [p.grad for p in model.parameters()]
    state = torch.get_rng_state()
    remat.measure(model, batch, loss=square_mean, steps=2)
    made = remat.plan(model, batch, "1000%", loss=square_mean)
    assert remat.verify(model, batch, made, loss=square_mean).passed
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_batch_with_a_gradient_is_put_back():
    """A batch that requires a gradient is counted, differentiated, and left without one."""
    model, batch = nn.Sequential(Block(16), Block(16)), torch.randn(64, 16, requires_grad=True)
    made = tightest(model, batch, loss=square_mean)
    proof = remat.verify(model, batch, made, loss=square_mean)
    assert proof.passed
    assert abs(made.predicted_peak_bytes - proof.measured_peak_bytes) <= CRUMBS
    assert batch.grad is None


@pytest.mark.parametrize("share", ["100%", "least"])
def test_a_plan_on_the_model_is_measured(share):
    """Measuring under a plan gives the plan's peak; without it the keep-everything peak."""
    model, batch = nn.Sequential(*(Block(32) for _ in range(4))), torch.randn(128, 32)
    made = (
        tightest(model, batch, loss=square_mean)
        if share == "least"
        else remat.plan(model, batch, share, loss=square_mean)
    )
    with remat.apply(model, made):
        planned = remat.measure(model, batch, loss=square_mean, steps=1).peak_bytes
    bare = remat.measure(model, batch, loss=square_mean, steps=1).peak_bytes
    assert abs(planned - made.predicted_peak_bytes) <= CRUMBS
    assert abs(bare - made.keep_all_peak_bytes) <= CRUMBS
    assert (planned < bare) == bool(made.regions)
